//! Sums over samples that stay on the device: of squared weight gradients, and of Gram matrices.
//!
//! Each sample's part is added in the samples' order, whatever the number of threads.

use std::{fmt, ops::Range, sync::Arc};

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{
    Hold, Matrix, Trace,
    gemm::{View, gemm, task_rows},
    panels::{self, Panels},
};
use crate::{
    buffer::{Buffer, recycle, stale, zeros},
    ranks::add,
    simd::simd,
};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// Sums over samples.
pub trait Sums: Hold {
    /// A matrix of sums on the device.
    type Sum: fmt::Debug;

    /// Zeros, [rows, columns].
    fn nothing(&self, rows: usize, columns: usize) -> Result<Self::Sum, Self::Err>;

    /// Adds other sums of the same matrix.
    fn add_sum(sum: &mut Self::Sum, other: Self::Sum) -> Result<(), Self::Err>;

    /// The sums, row-major, on the host.
    fn sums(sum: Self::Sum) -> Result<Vec<f32>, Self::Err>;

    /// Adds, for each of some layers, the square of ∂L/∂W, [outputs, inputs], of each of the
    /// `samples`, which are rows of the traces: squared sample by sample (LLM-Barber, arXiv
    /// 2408.10631). A device may lay out the input once for layers that share it, in a row.
    fn add_squared_gradients(
        layers: &mut [(&mut Self::Sum, Trace<Self>)],
        samples: &[Range<usize>],
    ) -> Result<(), Self::Err>;

    /// Adds the Gram matrix Σ x xᵀ of the rows of `x` at and below the diagonal; values above it
    /// are undefined. Twice the mean is the Hessian of SparseGPT (arXiv 2301.00774).
    fn add_gram(sum: &mut Self::Sum, x: &Matrix<Self>) -> Result<(), Self::Err>;

    /// Adds Σ a bᵀ of the rows of `a` and `b`: [columns of a, columns of b].
    fn add_product(
        sum: &mut Self::Sum,
        a: &Matrix<Self>,
        b: &Matrix<Self>,
    ) -> Result<(), Self::Err>;
}

/// Number of computed values of a Gram matrix with this number of columns: whole panels up to the
/// diagonal, and some beyond it.
pub(crate) fn gram_numbers(columns: usize) -> usize {
    let (rows, panel) = (task_rows(columns).max(1), panels::width());
    let strips = (0..columns).step_by(rows);
    strips
        .map(|first| {
            let end = columns.min(first + rows);
            (end - first) * end.next_multiple_of(panel).min(columns)
        })
        .sum()
}

/// Some columns of a matrix.
#[derive(Clone, Copy)]
struct Strip<'a> {
    values: &'a [f32],
    /// Columns of the matrix.
    width: usize,
    first: usize,
    columns: usize,
}

impl Strip<'_> {
    /// A contiguous copy of some rows, which products read repeatedly.
    fn rows(self, rows: Range<usize>) -> Buffer {
        let mut laid = stale(rows.len() * self.columns);
        for (row, to) in rows.zip(laid.chunks_exact_mut(self.columns)) {
            let at = row * self.width + self.first;
            to.copy_from_slice(&self.values[at..at + self.columns]);
        }
        laid.into()
    }
}

/// For each strip of columns of `a`, on its own thread: adds to its rows of the sums.
fn each_strip(
    (sums, columns): &mut (Vec<f32>, usize),
    a: &Matrix<Cpu>,
    add: impl Fn(&mut [f32], Strip<'_>) + Sync,
) {
    let width = a.shape().1;
    let each = task_rows(width).max(1);
    let strips = sums.par_chunks_mut((each * *columns).max(1)).with_max_len(1).enumerate();
    strips.for_each(|(i, sums)| {
        let first = i * each;
        let columns = each.min(width - first);
        add(sums, Strip { values: &a.values, width, first, columns });
    });
}

/// Adds the products of the rows of `a` with the panels up to the column at which its strip ends.
fn add_panels(
    sums: &mut (Vec<f32>, usize),
    a: &Matrix<Cpu>,
    b: &Panels,
    end: impl Fn(Strip<'_>) -> usize + Sync,
) {
    let (rows, columns) = (a.shape().0, b.columns());
    each_strip(sums, a, |sums, strip| {
        let a = strip.rows(0..rows);
        let a = View::new(&a, rows, strip.columns).t();
        for (first, b) in b.iter().take_while(|(first, _)| *first < end(strip)) {
            gemm(&mut sums[first..], columns, 1.0, 1.0, a, b);
        }
    });
}

impl Sums for Cpu {
    /// The sums, and the number of columns.
    type Sum = (Vec<f32>, usize);

    fn nothing(&self, rows: usize, columns: usize) -> Result<Self::Sum, CpuError> {
        Ok((zeros(rows * columns), columns))
    }

    fn add_sum(sum: &mut Self::Sum, other: Self::Sum) -> Result<(), CpuError> {
        add(&mut sum.0, &other.0);
        recycle(other.0);
        Ok(())
    }

    fn sums(sum: Self::Sum) -> Result<Vec<f32>, CpuError> {
        Ok(sum.0)
    }

    fn add_squared_gradients(
        layers: &mut [(&mut Self::Sum, Trace<Self>)],
        samples: &[Range<usize>],
    ) -> Result<(), CpuError> {
        let same = |a: &Trace<Self>, b: &Trace<Self>| Arc::ptr_eq(&a.input.values, &b.input.values);
        for layers in layers.chunk_by_mut(|(_, a), (_, b)| same(a, b)) {
            let Some((_, Trace { input, .. })) = layers.first() else { continue };
            let (x, inputs) = (Panels::of(&input.values, input.shape().1), input.shape().1);
            for (sums, Trace { gradient, .. }) in layers {
                each_strip(sums, gradient, |sums, strip| {
                    let outputs = strip.columns;
                    let mut tile = stale(outputs * x.width());
                    // A tile of one sample's gradient is squared while it is in the cache.
                    for sample in samples {
                        let g = strip.rows(sample.clone());
                        let g = View::new(&g, sample.len(), outputs).t();
                        for (first, x) in x.iter() {
                            gemm(&mut tile, x.columns(), 0.0, 1.0, g, x.rows(sample.clone()));
                            simd!({
                                let rows = tile.chunks_exact(x.columns());
                                for (sums, g) in sums.chunks_exact_mut(inputs).zip(rows) {
                                    let sums = &mut sums[first..first + g.len()];
                                    sums.iter_mut().zip(g).for_each(|(sum, g)| *sum += g * g);
                                }
                            });
                        }
                    }
                    recycle(tile);
                });
            }
        }
        Ok(())
    }

    fn add_gram(sums: &mut Self::Sum, x: &Matrix<Self>) -> Result<(), CpuError> {
        let panels = Panels::of(&x.values, x.shape().1);
        add_panels(sums, x, &panels, |strip| strip.first + strip.columns);
        Ok(())
    }

    fn add_product(
        sums: &mut Self::Sum,
        a: &Matrix<Self>,
        b: &Matrix<Self>,
    ) -> Result<(), CpuError> {
        let panels = Panels::of(&b.values, b.shape().1);
        add_panels(sums, a, &panels, |_| panels.columns());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn gradients_are_squared_sample_by_sample() {
        let (inputs, outputs) = (3, 100);
        let trace = Trace {
            input: matrix(noise(5 * inputs, 1), (5, inputs)),
            gradient: matrix(noise(5 * outputs, 2), (5, outputs)),
            rows: None,
        };
        let mut sum = Cpu::default().nothing(outputs, inputs).unwrap();
        let mut other = Cpu::default().nothing(outputs, inputs).unwrap();
        let mut layers = [(&mut sum, trace.clone()), (&mut other, trace.clone())];
        Cpu::add_squared_gradients(&mut layers, &[0..2, 2..5]).unwrap();
        assert_eq!(sum, other);
        let sums = Cpu::sums(sum).unwrap();
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
        let sum = Cpu::sums(sum).unwrap();
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
        let sum = Cpu::sums(sum).unwrap();
        for (i, j) in [(0, 0), (95, 2), (96, 1), (199, 2)] {
            let rows = a.values.chunks(200).zip(b.values.chunks(3));
            let expected: f32 = rows.map(|(a, b)| 2.0 * a[i] * b[j]).sum();
            assert!((sum[i * 3 + j] - expected).abs() < 1e-5, "{i}, {j}");
        }
    }

    #[test]
    fn a_gpu_agrees() {
        assert_agrees!(|device: D| {
            let [input, gradient] = [(33, 1), (4, 2)]
                .map(|(width, seed)| device.hold(noise(50 * width, seed), (50, width)).unwrap());
            let trace = Trace { input, gradient, rows: None };
            let mut squares = device.nothing(4, 33).unwrap();
            let mut layers = [(&mut squares, trace.clone())];
            D::add_squared_gradients(&mut layers, &[0..20, 20..50]).unwrap();
            let (mut gram, mut product) =
                [33, 4].map(|rows| device.nothing(rows, 33).unwrap()).into();
            for _ in 0..2 {
                D::add_gram(&mut gram, &trace.input).unwrap();
                D::add_product(&mut product, &trace.gradient, &trace.input).unwrap();
            }
            // Of a Gram matrix what lies below the diagonal counts.
            let gram = D::sums(gram).unwrap();
            let below = (0..33).flat_map(|i| gram[i * 33..=i * 34].to_vec()).collect();
            vec![D::sums(squares).unwrap(), below, D::sums(product).unwrap()]
        });
    }
}
