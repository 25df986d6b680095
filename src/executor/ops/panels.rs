//! The right factor of the CPU's matrix products, as they read it best: in panels of columns, each
//! of them contiguous. A row-major factor is read a few columns at a time, with a page's step from
//! row to row, and copied for every share of the product; its transpose is slower still.

use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use super::gemm::View;
use crate::buffer::{Buffer, stale};

/// Columns of a panel: so many times what the kernels of each vector width take at a time.
const WIDTH: usize = 192;

/// A matrix of [rows, columns] in panels; the last one may be narrower.
#[derive(Debug)]
pub(super) struct Panels {
    values: Buffer,
    rows: usize,
    columns: usize,
}

impl Panels {
    /// The transpose of a row-major matrix of `columns` rows.
    fn of_transposed(values: &[f32], columns: usize, rows: usize) -> Self {
        let mut panels = stale(values.len());
        let size = (WIDTH * rows).max(1);
        let pairs = panels.par_chunks_mut(size).zip(values.par_chunks(size));
        pairs.for_each(|(panel, values)| transpose(values, rows, panel));
        Self { values: panels.into(), rows, columns }
    }

    /// The transpose.
    fn t(&self) -> Self {
        let (rows, columns) = (self.columns, self.rows);
        let mut panels = stale(rows * columns);
        panels.par_chunks_mut((WIDTH * rows).max(1)).enumerate().for_each(|(i, panel)| {
            let width = panel.len() / rows;
            // Its rows are the columns of one panel after the other.
            for (j, block) in panel.chunks_mut(WIDTH * width).enumerate() {
                let columns = block.len() / width;
                let first = WIDTH * (j * self.rows + i * columns);
                transpose(&self.values[first..first + block.len()], columns, block);
            }
        });
        Self { values: panels.into(), rows, columns }
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The panels, each with its first column.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, View<'_>)> {
        let panels = self.values.chunks((WIDTH * self.rows).max(1)).enumerate();
        panels.map(|(i, panel)| {
            (i * WIDTH, View::new(panel, self.rows, panel.len() / self.rows.max(1)))
        })
    }
}

/// The transpose of a row-major matrix, a tile at a time: a column read from top to bottom would
/// miss the cache at every number.
#[inline]
pub(super) fn transpose(values: &[f32], columns: usize, to: &mut [f32]) {
    const TILE: usize = 16;
    let rows = values.len().checked_div(columns).unwrap_or(0);
    for top in (0..rows).step_by(TILE) {
        let bottom = rows.min(top + TILE);
        for left in (0..columns).step_by(TILE) {
            for j in left..columns.min(left + TILE) {
                let to = &mut to[j * rows + top..j * rows + bottom];
                for (i, to) in to.iter_mut().enumerate() {
                    *to = values[(top + i) * columns + j];
                }
            }
        }
    }
}

/// The weight of a linear layer, [outputs, inputs], as a factor of products.
#[derive(Clone, Debug)]
pub struct Factor(Arc<Both>);

#[derive(Debug)]
struct Both {
    /// [inputs, outputs], for outputs.
    forward: Panels,
    /// [outputs, inputs], for the gradients of inputs; made when it is first needed.
    backward: OnceLock<Panels>,
}

impl Factor {
    pub(super) fn new(values: &[f32], (outputs, inputs): (usize, usize)) -> Self {
        let forward = Panels::of_transposed(values, outputs, inputs);
        Self(Arc::new(Both { forward, backward: OnceLock::new() }))
    }

    pub(super) fn forward(&self) -> &Panels {
        &self.0.forward
    }

    pub(super) fn backward(&self) -> &Panels {
        self.0.backward.get_or_init(|| self.0.forward.t())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::noise;

    #[test]
    fn panels_have_the_values_of_the_matrix() {
        for (outputs, inputs) in [(1, 1), (3, 0), (0, 3), (33, 200), (192, 384), (500, 193)] {
            let values = noise(outputs * inputs, 4);
            let factor = Factor::new(&values, (outputs, inputs));
            let (forward, backward) = (factor.forward(), factor.backward());
            assert_eq!((forward.rows, forward.columns), (inputs, outputs));
            assert_eq!((backward.rows, backward.columns), (outputs, inputs));
            let at = |panels: &Panels, row: usize, column: usize| {
                let width = WIDTH.min(panels.columns - column / WIDTH * WIDTH);
                let first = column / WIDTH * WIDTH * panels.rows;
                panels.values[first + row * width + column % WIDTH]
            };
            for (i, value) in values.iter().enumerate() {
                let (output, input) = (i / inputs, i % inputs);
                assert_eq!(at(forward, input, output), *value);
                assert_eq!(at(backward, output, input), *value);
            }
        }
    }
}
