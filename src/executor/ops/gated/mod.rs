//! Gated activations, SwiGLU and the like (arXiv 2002.05202): y = f(a) · b.
//!
//! ∂y/∂a = b f′(a), ∂y/∂b = f(a).

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};
use crate::{buffer::stale, family::Activation, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = f(gate) · up.
pub trait Gated: Hold {
    /// y.
    fn gated_forward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
    ) -> Computed<Self>;

    /// ∂L/∂gate and ∂L/∂up, for ∂L/∂y in `g`.
    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
        g: Self::Numbers,
    ) -> Result<[Self::Numbers; 2], Self::Err>;

    /// The gated activation of two matrices of one shape.
    fn gated<T: Tape<f32, Self>>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (gate, tape) = gate.split_tape();
        let (up, up_tape) = up.split_tape();
        let y = gate.beside(Self::gated_forward(&gate, &up, activation)?, gate.shape())?;
        let inputs = [gate.name(), up.name()];
        Ok(record(tape.merge(up_tape), inputs, y, move |g| {
            Self::gated_backward(&gate, &up, activation, g)
        }))
    }
}

impl Gated for Cpu {
    fn gated_forward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
    ) -> Result<Buffer, CpuError> {
        let mut y = stale(gate.values.len());
        let inputs = gate.values.par_chunks(CHUNK).zip(up.values.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| {
            simd!({
                let (y, b) = (&mut y[..a.len()], &b[..a.len()]);
                activation.each(
                    a,
                    #[inline(always)]
                    |i, value, _| y[i] = value * b[i],
                );
            });
        });
        Ok(y.into())
    }

    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
        mut ga: Buffer,
    ) -> Result<[Buffer; 2], CpuError> {
        let mut gb = stale(ga.len());
        let inputs = gate.values.par_chunks(CHUNK).zip(up.values.par_chunks(CHUNK));
        let outputs = ga.par_chunks_mut(CHUNK).zip(gb.par_chunks_mut(CHUNK));
        outputs.zip(inputs).for_each(|((ga, gb), (a, b))| {
            simd!({
                let n = a.len();
                let (ga, gb, b) = (&mut ga[..n], &mut gb[..n], &b[..n]);
                activation.each(
                    a,
                    #[inline(always)]
                    |i, value, slope| {
                        gb[i] = ga[i] * value;
                        ga[i] *= b[i] * slope;
                    },
                );
            });
        });
        Ok([ga, gb.into()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for activation in Activation::ALL {
            check!(|device: D| [(3, 100); 2], |[gate, up]| D::gated(gate, up, activation));
        }
    }

    #[test]
    fn the_activation_is_the_gates() {
        let [gate, up] = [vec![-3.0, 2.0], vec![5.0, 7.0]].map(|values| matrix(values, (1, 2)));
        let y = Cpu::gated(gate, up, Activation::SquaredRelu).unwrap();
        assert_eq!(y.to_vec(), [0.0, 28.0]);
    }
}
