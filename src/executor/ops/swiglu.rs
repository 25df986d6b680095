//! SwiGLU (arXiv 2002.05202): y = silu(a) · b with silu(a) = a σ(a).
//!
//! ∂y/∂a = b σ(a) (1 + a (1 − σ(a))), ∂y/∂b = silu(a).

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, TensorFromVec},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::{Matrix, cpu};

/// y = silu(gate) · up.
pub trait SwiGlu: Device<f32> {
    /// The gated activation of two matrices of one shape.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn swiglu<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Elements that one task works on: enough to be worth a task.
const CHUNK: usize = 1 << 14;

impl SwiGlu for Cpu {
    fn swiglu<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (gate, tape) = gate.split_tape();
        let (up, up_tape) = up.split_tape();
        let mut tape = tape.merge(up_tape);
        let (a, b) = (cpu::values(&gate), cpu::values(&up));
        let mut y = vec![0.0; a.len()];
        y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(
            |(y, (a, b))| {
                for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                    *y = a * sigmoid(*a) * b;
                }
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
                    for i in 0..g.len() {
                        let s = sigmoid(a[i]);
                        ga[i] = g[i] * b[i] * s * (1.0 + a[i] * (1.0 - s));
                        gb[i] = g[i] * a[i] * s;
                    }
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
    use crate::executor::ops::testing::{check_gradient, noise};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let other = Cpu::default().tensor_from_vec(noise(12, 5), (3, 4));
        check_gradient((3, 4), |x| Cpu::swiglu(x, other.clone().put_tape(Default::default())));
        check_gradient((3, 4), |x| Cpu::swiglu(other.clone().put_tape(Default::default()), x));
    }
}
