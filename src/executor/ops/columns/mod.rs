//! Some columns of a matrix: a part of what a fused projection gives. And two matrices beside each
//! other, or one beside each group of columns of the other.
//!
//! The gradient of the columns is added to theirs; the others get none.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Add, Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};
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

    /// The columns of `a`, in so many `groups` of equal width, each followed by all columns of `b`,
    /// which has as many rows.
    fn join_forward(a: &Matrix<Self>, b: &Matrix<Self>, groups: usize) -> Computed<Self>;

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
        groups: usize,
    ) -> Result<Matrix<Self, T>, Self::Err>
    where
        Self: Add,
    {
        let (a, tape) = a.split_tape();
        let (tokens, added) = b.shape();
        let (rows, first) = (tokens * groups, a.shape().1 / groups);
        let all = first + added;
        let y = a.beside(Self::join_forward(&a, &b, groups)?, (tokens, groups * all))?;
        let device = a.device().clone();
        Ok(record(tape, [a.name(), b.name()], y, move |g| {
            let g = Matrix::of(&device, g, (rows, all))?;
            let of_groups = Self::columns_forward(&g, first..all)?;
            let of_groups = Matrix::of(&device, of_groups, (tokens, groups * added))?;
            let group = |i: usize| Self::columns_forward(&of_groups, i * added..(i + 1) * added);
            let held = |x| Matrix::of(&device, x, (tokens, added));
            let of_b = (1..groups)
                .try_fold(group(0)?, |sum, i| Self::add_forward(&held(sum)?, &held(group(i)?)?))?;
            Ok([Self::columns_forward(&g, 0..first)?, of_b])
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

    fn join_forward(a: &Matrix<Self>, b: &Matrix<Self>, groups: usize) -> Result<Buffer, CpuError> {
        let (first, (tokens, second)) = (a.shape().1 / groups, b.shape());
        let width = first + second;
        let mut y = stale(tokens * groups * width);
        let parts = a.values.par_chunks(groups * first).zip(b.values.par_chunks(second));
        y.par_chunks_mut(groups * width).zip(parts).for_each(|(y, (a, b))| {
            for (y, a) in y.chunks_mut(width).zip(a.chunks(first)) {
                y[..first].copy_from_slice(a);
                y[first..].copy_from_slice(b);
            }
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
            D::join(a.put_tape(tape.merge(other)), b, 1)
        });
        check!(|device: D| [(3, 6), (3, 2)], |[a, b]| {
            let ((a, tape), (b, other)) = (a.split_tape(), b.split_tape());
            D::join(a.put_tape(tape.merge(other)), b, 3)
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
        let joined = |groups| Cpu::join(a.clone(), b.clone(), groups).unwrap().to_vec();
        assert_eq!(joined(1), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
        assert_eq!(joined(2), [1.0, 5.0, 2.0, 5.0, 3.0, 6.0, 4.0, 6.0]);
    }

    #[test]
    fn columns_are_those_of_each_row() {
        let x = matrix((0..8).map(|i| i as f32).collect(), (2, 4));
        let y = Cpu::columns(x, 1..3).unwrap();
        assert_eq!((y.shape(), y.to_vec()), ((2, 2), vec![1.0, 2.0, 5.0, 6.0]));
    }
}
