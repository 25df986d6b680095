//! The sums of squares of a matrix's columns: the input norms of Wanda (arXiv 2306.11695).

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError},
    tensor_ops::Device,
};

use super::{Matrix, cpu};

/// Σ x² over the rows of each column.
pub trait ColumnSquares: Device<f32> {
    /// The sums of squares of the columns, on the host.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn column_squares<T>(x: &Matrix<Self, T>) -> Result<Vec<f32>, Self::Err>;
}

impl ColumnSquares for Cpu {
    fn column_squares<T>(x: &Matrix<Self, T>) -> Result<Vec<f32>, CpuError> {
        let width = x.shape().1;
        let mut sums = vec![0.0; width];
        for row in cpu::values(x).chunks_exact(width) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfdx::tensor::TensorFromVec;

    #[test]
    fn sums_run_over_rows() {
        let x = Cpu::default().tensor_from_vec(vec![1.0, 2.0, 3.0, -4.0], (2, 2));
        assert_eq!(Cpu::column_squares(&x).unwrap(), [10.0, 20.0]);
    }
}
