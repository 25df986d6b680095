//! The sums of squares of a matrix's columns: the input norms of Wanda (arXiv 2306.11695).

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{Hold, Matrix};
use crate::simd::simd;

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// Σ x² over the rows of each column.
pub trait ColumnSquares: Hold {
    /// The sums of squares of the columns over each of some ranges of rows, on the host.
    fn column_squares(x: &Matrix<Self>, rows: &[Range<usize>]) -> Result<Vec<Vec<f32>>, Self::Err>;
}

impl ColumnSquares for Cpu {
    fn column_squares(x: &Matrix<Self>, rows: &[Range<usize>]) -> Result<Vec<Vec<f32>>, CpuError> {
        let width = x.shape().1;
        let of = |rows: &Range<usize>| {
            let mut sums = vec![0.0; width];
            for x in x.values[rows.start * width..rows.end * width].chunks_exact(width) {
                simd!(sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x));
            }
            sums
        };
        Ok(rows.par_iter().map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn sums_run_over_rows() {
        let x = matrix(vec![1.0, 2.0, 3.0, -4.0, 5.0, 6.0], (3, 2));
        let sums = Cpu::column_squares(&x, &[0..2, 2..3]).unwrap();
        assert_eq!(sums, [[10.0, 20.0], [25.0, 36.0]]);
        assert_agrees!(|device: D| {
            let x = device.hold(noise(50 * 33, 1), (50, 33)).unwrap();
            D::column_squares(&x, &[0..20, 20..50]).unwrap()
        });
    }
}
