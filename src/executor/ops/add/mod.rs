//! The sum of two matrices: y = a + b.
//!
//! ∂L/∂a = ∂L/∂b = ∂L/∂y.

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};
use crate::{buffer::stale, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = a + b.
pub trait Add: Hold {
    /// y.
    fn add_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Computed<Self>;

    /// The sum of two matrices of one shape.
    fn add<T: Tape<f32, Self>>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (a, tape) = a.split_tape();
        let y = a.beside(Self::add_forward(&a, &b)?, a.shape())?;
        Ok(record(tape, [a.name(), b.name()], y, |g| Ok([Self::copy(&g)?, g])))
    }
}

impl Add for Cpu {
    fn add_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Buffer, CpuError> {
        let mut y = stale(a.values.len());
        let inputs = a.values.par_chunks(CHUNK).zip(b.values.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| {
            simd!(y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b));
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
        check!(|device: D| [(3, 7), (3, 7)], |[a, b]| {
            let ((a, tape), (b, other)) = (a.split_tape(), b.split_tape());
            D::add(a.put_tape(tape.merge(other)), b)
        });
        // The same matrix twice.
        check!(|device: D| [(3, 7)], |[a]| {
            let (a, tape) = a.split_tape();
            D::add(a.clone().put_tape(tape), a)
        });
    }

    #[test]
    fn sums_are_element_by_element() {
        let [a, b] = [vec![1.0, 2.0], vec![3.0, -5.0]].map(|values| matrix(values, (2, 1)));
        assert_eq!(Cpu::add(a, b).unwrap().to_vec(), [4.0, -3.0]);
    }
}
