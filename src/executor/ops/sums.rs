//! Sums over samples that stay on the device: of squared weight gradients, and of Gram matrices.
//!
//! Each sample's part is added in the samples' order, whatever the number of threads.

use std::{fmt, ops::Range};

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{
    Hold, Matrix, Trace,
    gemm::{View, gemm},
};
use crate::{
    buffer::{recycle, stale},
    simd::simd,
};

/// Sums over samples.
pub trait Sums: Hold {
    /// A matrix of sums on the device.
    type Sum: fmt::Debug;

    /// A sum of nothing, [rows, columns].
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn nothing(&self, rows: usize, columns: usize) -> Result<Self::Sum, Self::Err>;

    /// The sums, row-major, on the host.
    fn sums(sum: Self::Sum) -> Vec<f32>;

    /// Adds the square of ∂L/∂W, [outputs, inputs], of each of the `samples`, which are rows of
    /// the trace: squared sample by sample (LLM-Barber, arXiv 2408.10631).
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn add_squared_gradients(
        sum: &mut Self::Sum,
        trace: &Trace<Self>,
        samples: &[Range<usize>],
    ) -> Result<(), Self::Err>;

    /// Adds the Gram matrix Σ x xᵀ of the rows of `x` at and below the diagonal; what it adds above
    /// is of no meaning. Twice the mean is the Hessian of SparseGPT (arXiv 2301.00774).
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn add_gram(sum: &mut Self::Sum, x: &Matrix<Self>) -> Result<(), Self::Err>;

    /// Adds Σ a bᵀ of the rows of `a` and `b`: [columns of a, columns of b].
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn add_product(
        sum: &mut Self::Sum,
        a: &Matrix<Self>,
        b: &Matrix<Self>,
    ) -> Result<(), Self::Err>;
}

/// Rows of a sum that one task computes: enough that packing the other factor costs little, and
/// few enough that threads end together.
fn tile(rows: usize) -> usize {
    const MOST: usize = 768;
    let tasks = 4 * rows.div_ceil(4 * MOST).max(1);
    rows.div_ceil(tasks).next_multiple_of(48).max(96)
}

impl Sums for Cpu {
    /// With the number of columns.
    type Sum = (Vec<f32>, usize);

    fn nothing(&self, rows: usize, columns: usize) -> Result<Self::Sum, CpuError> {
        Ok((vec![0.0; rows * columns], columns))
    }

    fn sums(sum: Self::Sum) -> Vec<f32> {
        sum.0
    }

    fn add_squared_gradients(
        (sums, inputs): &mut Self::Sum,
        Trace { input, gradient }: &Trace<Self>,
        samples: &[Range<usize>],
    ) -> Result<(), CpuError> {
        let (inputs, outputs) = (*inputs, gradient.shape().1);
        let share = tile(outputs);
        let tiles = sums.par_chunks_mut((share * inputs).max(1)).with_max_len(1).enumerate();
        // A tile of one sample's gradient is squared while it is in the cache.
        tiles.for_each(|(i, sums)| {
            let mut tile = stale(sums.len());
            let (first, rows) = (i * share, sums.len() / inputs);
            for sample in samples {
                let g = &gradient.values[sample.start * outputs + first..];
                let g = View::strided(g, sample.len(), rows, outputs);
                let x = &input.values[sample.start * inputs..];
                gemm(&mut tile, inputs, 0.0, 1.0, g.t(), View::new(x, sample.len(), inputs));
                simd!(sums.iter_mut().zip(&tile).for_each(|(sum, g)| *sum += g * g));
            }
            recycle(tile);
        });
        Ok(())
    }

    fn add_gram((sums, width): &mut Self::Sum, x: &Matrix<Self>) -> Result<(), CpuError> {
        let (rows, width) = (x.shape().0, *width);
        let share = tile(width);
        sums.par_chunks_mut((share * width).max(1)).enumerate().for_each(|(i, sums)| {
            let (start, end) = (i * share, width.min((i + 1) * share));
            let tile = View::strided(&x.values[start..], rows, end - start, width);
            let left = View::strided(&x.values, rows, end, width);
            gemm(sums, width, 1.0, 1.0, tile.t(), left);
        });
        Ok(())
    }

    fn add_product(
        (sums, columns): &mut Self::Sum,
        a: &Matrix<Self>,
        b: &Matrix<Self>,
    ) -> Result<(), CpuError> {
        let ((rows, width), columns) = (a.shape(), *columns);
        let share = tile(width);
        sums.par_chunks_mut((share * columns).max(1)).enumerate().for_each(|(i, sums)| {
            let (start, end) = (i * share, width.min((i + 1) * share));
            let tile = View::strided(&a.values[start..], rows, end - start, width);
            gemm(sums, columns, 1.0, 1.0, tile.t(), View::new(&b.values, rows, columns));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{matrix, noise};

    #[test]
    fn gradients_are_squared_sample_by_sample() {
        let (inputs, outputs) = (3, 100);
        let trace = Trace {
            input: matrix(noise(5 * inputs, 1), (5, inputs)),
            gradient: matrix(noise(5 * outputs, 2), (5, outputs)),
        };
        let mut sum = Cpu::default().nothing(outputs, inputs).unwrap();
        Cpu::add_squared_gradients(&mut sum, &trace, &[0..2, 2..5]).unwrap();
        let sums = Cpu::sums(sum);
        for (i, j) in [(0, 0), (95, 2), (96, 0), (99, 2)] {
            let product = |t: usize| {
                trace.gradient.values[t * outputs + i] * trace.input.values[t * inputs + j]
            };
            let of = |samples: Range<usize>| samples.map(product).sum::<f32>().powi(2);
            let expected = of(0..2) + of(2..5);
            let found = sums[i * inputs + j];
            assert!((found - expected).abs() < 1e-5, "{i}, {j}: {found}, not {expected}");
        }
    }

    #[test]
    fn gram_products_run_over_rows() {
        let (rows, columns) = (5, 300);
        let values = noise(rows * columns, 1);
        let x = matrix(values.clone(), (rows, columns));
        let mut sum = Cpu::default().nothing(columns, columns).unwrap();
        Cpu::add_gram(&mut sum, &x).unwrap();
        Cpu::add_gram(&mut sum, &x).unwrap();
        let sum = Cpu::sums(sum);
        for (i, j) in [(0, 0), (7, 3), (255, 255), (256, 2), (299, 298)] {
            let expected: f32 = values.chunks(columns).map(|x| 2.0 * x[i] * x[j]).sum();
            let found = sum[i * columns + j];
            assert!((found - expected).abs() < 1e-5, "{i}, {j}: {found}, not {expected}");
        }
    }

    #[test]
    fn products_of_two_run_over_rows() {
        let (a, b) = (noise(4 * 200, 1), noise(4 * 3, 2));
        let [a, b] = [matrix(a, (4, 200)), matrix(b, (4, 3))];
        let mut sum = Cpu::default().nothing(200, 3).unwrap();
        Cpu::add_product(&mut sum, &a, &b).unwrap();
        Cpu::add_product(&mut sum, &a, &b).unwrap();
        let sum = Cpu::sums(sum);
        for (i, j) in [(0, 0), (95, 2), (96, 1), (199, 2)] {
            let rows = a.values.chunks(200).zip(b.values.chunks(3));
            let expected: f32 = rows.map(|(a, b)| 2.0 * a[i] * b[j]).sum();
            assert!((sum[i * 3 + j] - expected).abs() < 1e-5, "{i}, {j}");
        }
    }
}
