//! Activations, alone: y = f(x).
//!
//! ∂y/∂x = f′(x). SiLU: x σ(x). GELU (arXiv 1606.08415): x Φ(x), Φ being the normal distribution
//! function, or its approximation by tanh. ReLU: max(x, 0).

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Hold, Matrix,
    cpu::{self, CHUNK, exp},
};
use crate::{buffer::stale, simd::simd};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x σ(x).
    Silu,
    /// x Φ(x).
    Gelu,
    /// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2.
    GeluTanh,
    /// max(x, 0).
    Relu,
}

impl Activation {
    /// f(x) and f′(x).
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = 1.0 / (1.0 + exp(-x));
                (x * s, s * (1.0 + x * (1.0 - s)))
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
            Self::Relu => (0.0, 0.0),
        }
    }

    /// Shows `see` each of `x` with f(x) and f′(x), by index; the function is chosen once, so that
    /// each has a loop of its own.
    #[inline(always)]
    pub(super) fn each(self, x: &[f32], mut see: impl FnMut(usize, f32, f32)) {
        macro_rules! run {
            ($function:expr) => {
                for (i, x) in x.iter().enumerate() {
                    let (y, slope) = $function.at(*x);
                    see(i, y, slope);
                }
            };
        }
        match self {
            Self::Silu => run!(Self::Silu),
            Self::Gelu => run!(Self::Gelu),
            Self::GeluTanh => run!(Self::GeluTanh),
            Self::Relu => run!(Self::Relu),
        }
    }
}

/// y = f(x), element by element.
pub trait Activate: Hold {
    /// The activation of each element.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn activate<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Activate for Cpu {
    fn activate<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let mut y = stale(x.values.len());
        y.par_chunks_mut(CHUNK).zip(x.values.par_chunks(CHUNK)).for_each(|(y, x)| {
            simd!({
                let y = &mut y[..x.len()];
                activation.each(
                    x,
                    #[inline(always)]
                    |i, value, _| y[i] = value,
                );
            });
        });
        let y = x.device().hold(y, x.shape())?;
        let output = y.without_values();
        tape.add_backward_op(move |gradients| {
            let mut g = Cpu::take_gradient(gradients, &output)?;
            g.par_chunks_mut(CHUNK).zip(x.values.par_chunks(CHUNK)).for_each(|(g, x)| {
                simd!({
                    let g = &mut g[..x.len()];
                    activation.each(
                        x,
                        #[inline(always)]
                        |i, _, slope| g[i] *= slope,
                    );
                });
            });
            cpu::add(gradients, &x, g)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
pub(super) const ALL: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::check_gradient;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for activation in ALL {
            check_gradient((3, 4), |x| Cpu::activate(x, activation));
        }
    }

    #[test]
    fn values_are_known() {
        for (activation, expected) in
            ALL.into_iter().zip([0.731_058_6, 0.841_344_7, 0.841_192, 1.0])
        {
            assert!((activation.at(1.0).0 - expected).abs() < 1e-6, "{activation:?}");
        }
    }
}
