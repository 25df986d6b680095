//! The layout of the right factor of the CPU's matrix products: contiguous panels of columns.
//! Products read a few columns at a time; in a row-major factor, rows would be a page apart, and
//! every task would copy them. A transposed factor is even slower.

use std::{
    ops::Range,
    sync::{Arc, LazyLock, OnceLock},
};

use rayon::prelude::*;

use super::{
    gemm::{TASK_ROWS, View},
    transpose::transpose,
};
use crate::buffer::{Buffer, stale};

/// Number of columns of a panel: as many as the widest kernels take at a time, so that they read a
/// panel from start to end. Copying is turned off, which they would do for products of many rows.
static WIDTH: LazyLock<usize> = LazyLock::new(|| {
    let (width, together) = match wide() {
        true => (64, 6),
        false if cfg!(target_arch = "x86_64") => (16, 4),
        false => (48, 4),
    };
    gemm::set_lhs_packing_threshold_single_thread(TASK_ROWS.div_ceil(together));
    width
});

/// Number of outputs whose weights are transposed at a time, where the transpose is not kept.
const BLOCK: usize = 4096;

/// Number of columns of a panel.
pub(super) fn width() -> usize {
    *WIDTH
}

/// Whether the CPU has vectors of 512 bits.
fn wide() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A matrix of [rows, columns] in panels; the last one may be narrower.
#[derive(Debug)]
pub(super) struct Panels {
    values: Buffer,
    rows: usize,
    columns: usize,
    /// Columns of a panel.
    width: usize,
}

impl Panels {
    /// The panels of a row-major matrix, as wide as those of a right factor.
    pub(super) fn of(values: &[f32], columns: usize) -> Self {
        let width = *WIDTH;
        let rows = values.len().checked_div(columns).unwrap_or(0);
        let mut panels = stale(values.len());
        panels.par_chunks_mut((width * rows).max(1)).enumerate().for_each(|(i, panel)| {
            let first = i * width;
            let from = values.chunks_exact(columns);
            for (to, from) in panel.chunks_exact_mut(width.min(columns - first)).zip(from) {
                to.copy_from_slice(&from[first..first + to.len()]);
            }
        });
        Self { values: panels.into(), rows, columns, width }
    }

    /// The panels of the transpose of a row-major matrix of `columns` rows.
    fn of_transposed(values: &[f32], columns: usize, rows: usize) -> Self {
        let (mut panels, width) = (stale(values.len()), *WIDTH);
        let size = (width * rows).max(1);
        let pairs = panels.par_chunks_mut(size).zip(values.par_chunks(size));
        pairs.for_each(|(panel, values)| transpose(values, rows, panel));
        Self { values: panels.into(), rows, columns, width }
    }

    /// The transpose of some columns, of which the first begins a panel.
    fn t(&self, of: Range<usize>) -> Self {
        let (rows, columns, most) = (of.len(), self.rows, self.width);
        let before = of.start / most;
        let mut panels = stale(rows * columns);
        panels.par_chunks_mut((most * rows).max(1)).enumerate().for_each(|(i, panel)| {
            let width = panel.len() / rows;
            // The rows of the transpose are the columns of one panel after the other.
            for (j, block) in panel.chunks_mut(most * width).enumerate() {
                let columns = block.len() / width;
                let first = most * ((before + j) * self.rows + i * columns);
                transpose(&self.values[first..first + block.len()], columns, block);
            }
        });
        Self { values: panels.into(), rows, columns, width: most }
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Number of columns of all panels except the last.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// A panel.
    pub(super) fn panel(&self, number: usize) -> View<'_> {
        let first = number * self.width;
        let columns = self.width.min(self.columns - first);
        View::new(&self.values[first * self.rows..], self.rows, columns)
    }

    /// The panels, each with its first column.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, View<'_>)> {
        let panels = 0..self.columns.div_ceil(self.width);
        panels.map(|number| (number * self.width, self.panel(number)))
    }
}

/// The weight of a linear layer, [outputs, inputs], as a factor of products.
#[derive(Clone, Debug)]
pub struct Factor(Arc<Both>);

#[derive(Debug)]
struct Both {
    /// [inputs, outputs], for outputs.
    forward: Panels,
    /// [outputs, inputs], for the gradients of inputs; computed on first use.
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
        let forward = &self.0.forward;
        self.0.backward.get_or_init(|| forward.t(0..forward.columns))
    }

    /// Blocks of the rows of [`Factor::backward`], with the outputs of each; nothing is kept of them.
    pub(super) fn backward_blocks(&self) -> impl Iterator<Item = (Range<usize>, Panels)> {
        let forward = &self.0.forward;
        let size = BLOCK.next_multiple_of(forward.width);
        let blocks = (0..forward.columns).step_by(size);
        let blocks = blocks.map(move |first| first..forward.columns.min(first + size));
        blocks.map(|outputs| (outputs.clone(), forward.t(outputs)))
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
                let (first, width) = (column / panels.width * panels.width, panels.width);
                let width = width.min(panels.columns - first);
                panels.values[first * panels.rows + row * width + column - first]
            };
            let straight = Panels::of(&values, inputs);
            for (i, value) in values.iter().enumerate() {
                let (output, input) = (i / inputs, i % inputs);
                assert_eq!(at(forward, input, output), *value);
                assert_eq!(at(backward, output, input), *value);
                assert_eq!(at(&straight, output, input), *value);
            }
        }
    }
}
