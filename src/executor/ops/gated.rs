//! Gated activations, SwiGLU and the like (arXiv 2002.05202): y = f(a) · b.
//!
//! ∂y/∂a = b f′(a), ∂y/∂b = f(a).

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Hold, Matrix,
    cpu::{self, CHUNK},
};
use crate::{buffer::stale, family::Activation, simd::simd};

/// y = f(gate) · up.
pub trait Gated: Hold {
    /// The gated activation of two matrices of one shape.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn gated<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Gated for Cpu {
    fn gated<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (gate, tape) = gate.split_tape();
        let (up, up_tape) = up.split_tape();
        let mut tape = tape.merge(up_tape);
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
        let y = gate.device().hold(y, gate.shape())?;

        let output = y.without_values();
        tape.add_backward_op(move |gradients| {
            let mut ga = Cpu::take_gradient(gradients, &output)?;
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
            cpu::add(gradients, &gate, ga)?;
            cpu::add(gradients, &up, gb)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check_gradient, matrix, noise};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let other = matrix(noise(12, 5), (3, 4));
        let other = || other.clone().put_tape(Default::default());
        for activation in Activation::ALL {
            check_gradient((3, 4), |x| Cpu::gated(x, other(), activation));
            check_gradient((3, 4), |x| Cpu::gated(other(), x, activation));
        }
    }
}
