//! Some columns of a matrix: a part of what a fused projection gives.
//!
//! The gradient of the columns is added to theirs; the others get none.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, tape::record};
use crate::buffer::{stale, zeros};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = x[:, columns].
pub trait Columns: Hold {
    /// y.
    fn columns_forward(x: &Matrix<Self>, columns: Range<usize>) -> Computed<Self>;

    /// ∂L/∂x, of `shape`, for ∂L/∂y in `g`.
    fn columns_backward(
        shape: (usize, usize),
        columns: Range<usize>,
        g: Self::Numbers,
    ) -> Computed<Self>;

    /// Some columns of each row.
    fn columns<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let shape = x.shape();
        let y = Self::columns_forward(&x, columns.clone())?;
        let y = x.beside(y, (shape.0, columns.len()))?;
        Ok(record(tape, [x.name()], y, move |g| Ok([Self::columns_backward(shape, columns, g)?])))
    }
}

impl Columns for Cpu {
    fn columns_forward(x: &Matrix<Self>, columns: Range<usize>) -> Result<Buffer, CpuError> {
        let ((rows, width), part) = (x.shape(), columns.len());
        let mut y = stale(rows * part);
        y.par_chunks_mut(part).zip(x.values.par_chunks(width)).for_each(|(y, x)| {
            y.copy_from_slice(&x[columns.clone()]);
        });
        Ok(y.into())
    }

    fn columns_backward(
        (rows, width): (usize, usize),
        columns: Range<usize>,
        g: Buffer,
    ) -> Result<Buffer, CpuError> {
        let mut gx = zeros(rows * width);
        gx.par_chunks_mut(width).zip(g.par_chunks(columns.len())).for_each(|(gx, g)| {
            gx[columns.clone()].copy_from_slice(g);
        });
        Ok(gx.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check!(|device: D| [(3, 7)], |[x]| D::columns(x, 2..5));
    }

    #[test]
    fn columns_are_those_of_each_row() {
        let x = matrix((0..8).map(|i| i as f32).collect(), (2, 4));
        let y = Cpu::columns(x, 1..3).unwrap();
        assert_eq!((y.shape(), y.to_vec()), ((2, 2), vec![1.0, 2.0, 5.0, 6.0]));
    }
}
