//! Activations, alone: y = f(x).
//!
//! ∂y/∂x = f′(x).

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Buffer, Computed, Hold, Matrix,
    cpu::{CHUNK, exp},
    tape::record,
};
use crate::{buffer::stale, family::Activation, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

impl Activation {
    /// f(x) and f′(x).
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = 1.0 / (1.0 + exp(-x));
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::QuickGelu => {
                const STEEP: f32 = 1.702;
                let s = 1.0 / (1.0 + exp(-STEEP * x));
                (x * s, s * (1.0 + STEEP * x * (1.0 - s)))
            }
            Self::Gelu => {
                use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
                let below = 0.5 * (1.0 + libm::erff(x * FRAC_1_SQRT_2));
                let density = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * exp(-0.5 * x * x);
                (x * below, below + x * density)
            }
            Self::GeluTanh => {
                const FACTOR: f32 = 0.797_884_6;
                const CUBE: f32 = 0.044_715;
                // tanh(u) = 1 − 2 / (e²ᵘ + 1).
                let t = 1.0 - 2.0 / (exp(2.0 * FACTOR * (x + CUBE * x * x * x)) + 1.0);
                let slope = FACTOR * (1.0 + 3.0 * CUBE * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
            }
            Self::Relu if x > 0.0 => (x, 1.0),
            Self::SquaredRelu if x > 0.0 => (x * x, 2.0 * x),
            Self::Relu | Self::SquaredRelu => (0.0, 0.0),
        }
    }

    /// Shows `see` each of `x` with f(x) and f′(x), by index, or f and f′ at `limit` if x is above it;
    /// the function is chosen once, so that each has a loop of its own.
    #[inline(always)]
    pub(super) fn each(self, x: &[f32], limit: f32, mut see: impl FnMut(usize, f32, f32)) {
        macro_rules! run {
            ($function:expr) => {
                for (i, &x) in x.iter().enumerate() {
                    // NaN stays.
                    let (y, slope) = $function.at(if x > limit { limit } else { x });
                    see(i, y, slope);
                }
            };
        }
        match self {
            Self::Silu => run!(Self::Silu),
            Self::Gelu => run!(Self::Gelu),
            Self::GeluTanh => run!(Self::GeluTanh),
            Self::Relu => run!(Self::Relu),
            Self::QuickGelu => run!(Self::QuickGelu),
            Self::SquaredRelu => run!(Self::SquaredRelu),
        }
    }
}

/// y = f(x), element by element.
pub trait Activate: Hold {
    /// y.
    fn activate_forward(x: &Matrix<Self>, activation: Activation) -> Computed<Self>;

    /// ∂L/∂x, for ∂L/∂y in `g`.
    fn activate_backward(
        x: &Matrix<Self>,
        activation: Activation,
        g: Self::Numbers,
    ) -> Computed<Self>;

    /// The activation of each element.
    fn activate<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let y = x.beside(Self::activate_forward(&x, activation)?, x.shape())?;
        Ok(record(tape, [x.name()], y, move |g| Ok([Self::activate_backward(&x, activation, g)?])))
    }
}

impl Activate for Cpu {
    fn activate_forward(x: &Matrix<Self>, activation: Activation) -> Result<Buffer, CpuError> {
        let mut y = stale(x.values.len());
        y.par_chunks_mut(CHUNK).zip(x.values.par_chunks(CHUNK)).for_each(|(y, x)| {
            simd!({
                let y = &mut y[..x.len()];
                activation.each(
                    x,
                    f32::INFINITY,
                    #[inline(always)]
                    |i, value, _| y[i] = value,
                );
            });
        });
        Ok(y.into())
    }

    fn activate_backward(
        x: &Matrix<Self>,
        activation: Activation,
        mut g: Buffer,
    ) -> Result<Buffer, CpuError> {
        g.par_chunks_mut(CHUNK).zip(x.values.par_chunks(CHUNK)).for_each(|(g, x)| {
            simd!({
                let g = &mut g[..x.len()];
                activation.each(
                    x,
                    f32::INFINITY,
                    #[inline(always)]
                    |i, _, slope| g[i] *= slope,
                );
            });
        });
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::check;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for activation in Activation::ALL {
            check!(|device: D| [(5, 7)], |[x]| D::activate(x, activation));
        }
    }

    #[test]
    fn values_and_slopes_are_those_of_transformers() {
        // Each at −3, −0.5, 0.75 and 4: the value, and what torch's autograd gives for the slope.
        const AT: [f32; 4] = [-3.0, -0.5, 0.75, 4.0];
        let expected: [[(f32, f32); 4]; 6] = [
            [
                (-0.142_277_6, -0.088_104_1),
                (-0.188_770_3, 0.260_038_8),
                (0.509_384, 0.842_599_9),
                (3.928_055_2, 1.052_664_6),
            ],
            [
                (-0.004_049_7, -0.011_945_7),
                (-0.154_268_8, 0.132_504_9),
                (0.580_029_5, 0.999_225_7),
                (3.999_873_3, 1.000_503_7),
            ],
            [
                (-0.003_637_4, -0.011_584_2),
                (-0.154_286, 0.132_630_1),
                (0.579_960_6, 0.998_938_3),
                (3.999_929_7, 1.000_335_1),
            ],
            [(0.0, 0.0), (0.0, 0.0), (0.75, 1.0), (4.0, 1.0)],
            [
                (-0.018_071_3, -0.024_548_3),
                (-0.149_611_6, 0.120_778_1),
                (0.586_390_1, 0.999_571_5),
                (3.995_585_3, 1.006_401_9),
            ],
            [(0.0, 0.0), (0.0, 0.0), (0.562_5, 1.5), (16.0, 8.0)],
        ];
        for (activation, expected) in Activation::ALL.into_iter().zip(expected) {
            for (x, (value, slope)) in AT.into_iter().zip(expected) {
                let found = activation.at(x);
                let close = |a: f32, b: f32| (a - b).abs() < 2e-6 * (1.0 + b.abs());
                assert!(
                    close(found.0, value) && close(found.1, slope),
                    "{activation:?} at {x}: {found:?}"
                );
            }
        }
    }
}
