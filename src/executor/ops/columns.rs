//! Some columns of a matrix: a part of what a fused projection gives.
//!
//! The gradient of the columns is added to theirs; the others get none.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Hold, Matrix, cpu};
use crate::buffer::{stale, zeros};

/// y = x[:, columns].
pub trait Columns: Hold {
    /// Some columns of each row.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Columns for Cpu {
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let ((rows, width), part) = (x.shape(), columns.len());
        let mut y = stale(rows * part);
        y.par_chunks_mut(part).zip(x.values.par_chunks(width)).for_each(|(y, x)| {
            y.copy_from_slice(&x[columns.clone()]);
        });
        let y = x.device().hold(y, (rows, part))?;
        let output = y.without_values();
        tape.add_backward_op(move |gradients| {
            let g = Cpu::take_gradient(gradients, &output)?;
            let mut gx = zeros(rows * width);
            gx.par_chunks_mut(width).zip(g.par_chunks(part)).for_each(|(gx, g)| {
                gx[columns.clone()].copy_from_slice(g);
            });
            cpu::add(gradients, &x, gx)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::check_gradient;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check_gradient((3, 7), |x| Cpu::columns(x, 2..5));
    }
}
