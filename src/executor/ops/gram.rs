//! The Gram matrix Σ x xᵀ of a matrix's rows: the Hessian of SparseGPT (arXiv 2301.00774), but for
//! a factor.

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError},
    tensor_ops::Device,
};

use super::{
    Matrix, cpu,
    gemm::{Threads, View, gemm},
};

/// Σ x xᵀ over rows.
pub trait Gram: Device<f32> {
    /// Adds the Gram matrix of `x`, [rows, columns], to `sum`, [columns, columns] on the host, at
    /// and below the diagonal; what it adds above is of no meaning.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn add_gram<T>(x: &Matrix<Self, T>, sum: &mut [f32]) -> Result<(), Self::Err>;
}

/// Rows of the product that are computed together; half of the product is never computed.
const TILE: usize = 256;

impl Gram for Cpu {
    fn add_gram<T>(x: &Matrix<Self, T>, sum: &mut [f32]) -> Result<(), CpuError> {
        let (rows, columns) = *x.shape();
        let values = cpu::values(x);
        for start in (0..columns).step_by(TILE) {
            let end = columns.min(start + TILE);
            let tile = View::strided(&values[start..], rows, end - start, columns);
            let left = View::strided(&values, rows, end, columns);
            gemm(&mut sum[start * columns..], columns, 1.0, 1.0, tile.t(), left, Threads::All);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::noise;
    use dfdx::tensor::TensorFromVec;

    #[test]
    fn products_run_over_rows() {
        let (rows, columns) = (5, 300);
        let values = noise(rows * columns, 1);
        let x = Cpu::default().tensor_from_vec(values.clone(), (rows, columns));
        let mut sum = vec![1.0; columns * columns];
        Cpu::add_gram(&x, &mut sum).unwrap();
        for (i, j) in [(0, 0), (7, 3), (255, 255), (256, 2), (299, 298)] {
            let expected: f32 = values.chunks(columns).map(|x| x[i] * x[j]).sum();
            let found = sum[i * columns + j] - 1.0;
            assert!((found - expected).abs() < 1e-5, "{i}, {j}: {found}, not {expected}");
        }
    }
}
