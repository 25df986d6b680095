//! Gated activations, SwiGLU and the like (arXiv 2002.05202): y = f(a) · b.
//!
//! ∂y/∂a = b f′(a), ∂y/∂b = f(a).

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, TensorFromVec},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::{
    Matrix,
    activation::{Activation, CHUNK},
    cpu,
};

/// y = f(gate) · up.
pub trait Gated: Device<f32> {
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
        let (a, b) = (cpu::values(&gate), cpu::values(&up));
        let mut y = vec![0.0; a.len()];
        y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(
            |(y, (a, b))| {
                activation.each(a, |i, value, _| y[i] = value * b[i]);
            },
        );
        let y = gate.device().try_tensor_from_vec(y, *gate.shape())?;

        let output = y.clone();
        tape.add_backward_op(move |gradients| {
            let g = cpu::take(gradients, &output)?;
            let (mut ga, mut gb) = (vec![0.0; g.len()], vec![0.0; g.len()]);
            ga.par_chunks_mut(CHUNK)
                .zip(gb.par_chunks_mut(CHUNK))
                .zip(g.par_chunks(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))))
                .for_each(|((ga, gb), (g, (a, b)))| {
                    activation.each(a, |i, value, slope| {
                        ga[i] = g[i] * b[i] * slope;
                        gb[i] = g[i] * value;
                    });
                });
            cpu::add(gradients, &gate, &ga)?;
            cpu::add(gradients, &up, &gb)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::{
        activation::ALL,
        testing::{check_gradient, noise},
    };

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let other = Cpu::default().tensor_from_vec(noise(12, 5), (3, 4));
        let other = || other.clone().put_tape(Default::default());
        for activation in ALL {
            check_gradient((3, 4), |x| Cpu::gated(x, other(), activation));
            check_gradient((3, 4), |x| Cpu::gated(other(), x, activation));
        }
    }
}
