//! Some columns of a matrix: a part of what a fused projection gives. And two matrices beside each
//! other.
//!
//! The gradient of the columns is added to theirs; the others get none.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};
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

    /// The columns of `a`, and then those of `b`, which has as many rows.
    fn join_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Computed<Self>;

    /// Some columns of each row.
    fn columns<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let width = x.shape().1;
        Self::columns_of_each(x, width, columns)
    }

    /// Some columns of every `width` consecutive columns of each row.
    fn columns_of_each<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        width: usize,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let (rows, groups) = (x.shape().0, x.shape().1 / width);
        let shape = (rows * groups, width);
        let y = Self::columns_forward(&x.reshaped(shape), columns.clone())?;
        let y = x.beside(y, (rows, groups * columns.len()))?;
        Ok(record(tape, [x.name()], y, move |g| Ok([Self::columns_backward(shape, columns, g)?])))
    }

    /// [`join_forward`](Self::join_forward), with its gradients.
    fn join<T: Tape<f32, Self>>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (a, tape) = a.split_tape();
        let ((rows, first), all) = (a.shape(), a.shape().1 + b.shape().1);
        let y = a.beside(Self::join_forward(&a, &b)?, (rows, all))?;
        let device = a.device().clone();
        Ok(record(tape, [a.name(), b.name()], y, move |g| {
            let g = Matrix::of(&device, g, (rows, all))?;
            Ok([Self::columns_forward(&g, 0..first)?, Self::columns_forward(&g, first..all)?])
        }))
    }
}

impl Columns for Cpu {
    fn columns_forward(x: &Matrix<Self>, columns: Range<usize>) -> Result<Buffer, CpuError> {
        let ((rows, width), part) = (x.shape(), columns.len());
        let mut y = stale(rows * part);
        let pairs = y.par_chunks_mut(part).zip(x.values.par_chunks(width));
        pairs.with_min_len(CHUNK.div_ceil(width)).for_each(|(y, x)| {
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
        let pairs = gx.par_chunks_mut(width).zip(g.par_chunks(columns.len()));
        pairs.with_min_len(CHUNK.div_ceil(width)).for_each(|(gx, g)| {
            gx[columns.clone()].copy_from_slice(g);
        });
        Ok(gx.into())
    }

    fn join_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Buffer, CpuError> {
        let ((rows, first), second) = (a.shape(), b.shape().1);
        let mut y = stale(rows * (first + second));
        let parts = a.values.par_chunks(first).zip(b.values.par_chunks(second));
        y.par_chunks_mut(first + second).zip(parts).for_each(|(y, (a, b))| {
            y[..first].copy_from_slice(a);
            y[first..].copy_from_slice(b);
        });
        Ok(y.into())
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::Merge;

    use super::*;
    use crate::executor::ops::testing::{check, matrix};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check!(|device: D| [(3, 7)], |[x]| D::columns(x, 2..5));
        check!(|device: D| [(3, 8)], |[x]| D::columns_of_each(x, 4, 1..3));
        check!(|device: D| [(3, 7), (3, 2)], |[a, b]| {
            let ((a, tape), (b, other)) = (a.split_tape(), b.split_tape());
            D::join(a.put_tape(tape.merge(other)), b)
        });
    }

    #[test]
    fn columns_are_those_of_each_group_of_a_row() {
        let x = matrix((0..8).map(|i| i as f32).collect(), (1, 8));
        let y = Cpu::columns_of_each(x, 4, 1..3).unwrap();
        assert_eq!((y.shape(), y.to_vec()), ((1, 4), vec![1.0, 2.0, 5.0, 6.0]));
    }

    #[test]
    fn joined_matrices_are_beside_each_other() {
        let [a, b] = [vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0]].map(|values| {
            let columns = values.len() / 2;
            matrix(values, (2, columns))
        });
        assert_eq!(Cpu::join(a, b).unwrap().to_vec(), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
    }

    #[test]
    fn columns_are_those_of_each_row() {
        let x = matrix((0..8).map(|i| i as f32).collect(), (2, 4));
        let y = Cpu::columns(x, 1..3).unwrap();
        assert_eq!((y.shape(), y.to_vec()), ((2, 2), vec![1.0, 2.0, 5.0, 6.0]));
    }
}
