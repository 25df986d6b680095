//! The sum of two matrices: y = a + b.
//!
//! ∂L/∂a = ∂L/∂b = ∂L/∂y.

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Hold, Matrix,
    cpu::{self, CHUNK},
};
use crate::{
    buffer::{copy, stale},
    simd::simd,
};

/// y = a + b.
pub trait Add: Hold {
    /// The sum of two matrices of one shape.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn add<T: Tape<f32, Self> + 'static>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Add for Cpu {
    fn add<T: Tape<f32, Self> + 'static>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (a, mut tape) = a.split_tape();
        let mut y = stale(a.values.len());
        let inputs = a.values.par_chunks(CHUNK).zip(b.values.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| {
            simd!(y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b));
        });
        let y = a.device().hold(y, a.shape())?;
        let (output, a, b) = (y.without_values(), a.without_values(), b.without_values());
        tape.add_backward_op(move |gradients| {
            let g = Cpu::take_gradient(gradients, &output)?;
            cpu::add(gradients, &a, copy(&g))?;
            cpu::add(gradients, &b, g)
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
        let b = matrix(noise(12, 5), (3, 4));
        check_gradient((3, 4), |a| Cpu::add(a, b.clone()));
        // The same matrix twice.
        check_gradient((3, 4), |a| {
            let (a, tape) = a.split_tape();
            Cpu::add(a.clone().put_tape(tape), a)
        });
    }
}
