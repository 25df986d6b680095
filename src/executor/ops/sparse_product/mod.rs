//! The product with a matrix that has few entries: y + x Δᵀ.
//!
//! Swapped weights are few among many, so correcting a layer's output costs less than computing it.

use std::sync::Arc;

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{Hold, Matrix, transpose::transpose};
use crate::{
    buffer::{recycle, stale},
    simd::simd,
};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// An entry of Δ: its row, its column and its value.
pub type Entry = (usize, usize, f32);

/// y + x Δᵀ.
pub trait SparseProduct: Hold {
    /// A matrix of few entries on the device.
    type Entries;

    /// The Δ of `dims`, (outputs, inputs), with these entries, row after row.
    fn entries(
        &self,
        entries: Vec<Entry>,
        dims: (usize, usize),
    ) -> Result<Self::Entries, Self::Err>;

    /// `y` of [tokens, outputs] and the product of `x`, [tokens, inputs], with Δ.
    fn add_sparse_product(
        y: Matrix<Self>,
        x: &Matrix<Self>,
        entries: &Self::Entries,
    ) -> Result<Matrix<Self>, Self::Err>;
}

/// The entries of the CPU, in compressed rows.
#[derive(Debug)]
pub struct Rows {
    /// Index of the end of each row's entries.
    ends: Vec<usize>,
    entries: Vec<(u32, f32)>,
}

impl Rows {
    fn row(&self, row: usize) -> &[(u32, f32)] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.entries[start..self.ends[row]]
    }
}

/// Number of tokens that are processed together, with a column of `x` as their inputs side by side,
/// and number of outputs that are added to `y` together.
const TOKENS: usize = 64;
const OUTPUTS: usize = 64;

impl SparseProduct for Cpu {
    type Entries = Rows;

    fn entries(&self, entries: Vec<Entry>, (outputs, _): (usize, usize)) -> Result<Rows, CpuError> {
        let mut ends = vec![0; outputs];
        for (row, _, _) in &entries {
            ends[*row] += 1;
        }
        let mut end = 0;
        for count in &mut ends {
            end += *count;
            *count = end;
        }
        let entries = entries.into_iter().map(|(_, column, value)| (column as u32, value));
        Ok(Rows { ends, entries: entries.collect() })
    }

    fn add_sparse_product(
        y: Matrix<Self>,
        x: &Matrix<Self>,
        entries: &Rows,
    ) -> Result<Matrix<Self>, CpuError> {
        let (inputs, shape) = (x.shape().1, y.shape());
        let outputs = shape.1;
        // An output that has no other owner is updated in place.
        let mut values = Arc::unwrap_or_clone(y.values);
        let blocks = values.par_chunks_mut((TOKENS * outputs).max(1)).with_max_len(1);
        blocks.zip(x.values.par_chunks((TOKENS * inputs).max(1))).for_each(|(y, x)| {
            let (mut columns, mut padded) = (stale(inputs * TOKENS), Vec::new());
            let x = if x.len() == columns.len() {
                x
            } else {
                padded.extend_from_slice(x);
                padded.resize(columns.len(), 0.0);
                &padded
            };
            transpose(x, inputs, &mut columns);
            let (columns_of, _) = columns.as_chunks::<TOKENS>();
            let (mut tile, mut turned) = ([[0.0; TOKENS]; OUTPUTS], [[0.0; OUTPUTS]; TOKENS]);
            for first in (0..outputs).step_by(OUTPUTS) {
                let rows = first..outputs.min(first + OUTPUTS);
                simd!({
                    for (sums, row) in tile.iter_mut().zip(rows.clone()) {
                        *sums = row_product(entries.row(row), columns_of);
                    }
                    transpose(tile.as_flattened(), TOKENS, turned.as_flattened_mut());
                    for (y, sums) in y.chunks_exact_mut(outputs).zip(&turned) {
                        y[rows.clone()].iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
                    }
                });
            }
            recycle(columns);
        });
        x.beside(values, shape)
    }
}

/// Σ over a row's entries, for each token.
#[inline(always)]
fn row_product(row: &[(u32, f32)], columns: &[[f32; TOKENS]]) -> [f32; TOKENS] {
    let mut sums = [0.0; TOKENS];
    for (column, value) in row {
        let x = &columns[*column as usize];
        for i in 0..TOKENS {
            sums[i] += value * x[i];
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn a_sparse_product_is_the_dense_one() {
        for (tokens, inputs, outputs) in [(1, 3, 2), (70, 5, 33), (128, 40, 16)] {
            let (x, y) = (noise(tokens * inputs, 1), noise(tokens * outputs, 2));
            let values = noise(outputs * inputs, 3);
            let entries: Vec<Entry> = (0..outputs * inputs)
                .filter(|i| i % 3 == 1)
                .map(|i| (i / inputs, i % inputs, values[i]))
                .collect();
            let expected: Vec<f32> = (0..tokens * outputs)
                .map(|i| {
                    let (token, output) = (i / outputs, i % outputs);
                    let row = entries.iter().filter(|entry| entry.0 == output);
                    y[i] + row.map(|(_, j, value)| value * x[token * inputs + j]).sum::<f32>()
                })
                .collect();
            let device = Cpu::default();
            let delta = device.entries(entries, (outputs, inputs)).unwrap();
            let (x, y) = (matrix(x, (tokens, inputs)), matrix(y, (tokens, outputs)));
            let found = Cpu::add_sparse_product(y, &x, &delta).unwrap().to_vec();
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
        assert_agrees!(|device: D| {
            let [x, y] = [(33, 1), (4, 2)]
                .map(|(width, seed)| device.hold(noise(50 * width, seed), (50, width)).unwrap());
            let entries = device.entries(vec![(1, 0, 0.5), (3, 32, -2.0)], (4, 33)).unwrap();
            vec![D::add_sparse_product(y, &x, &entries).unwrap().on_host().unwrap()]
        });
    }
}
