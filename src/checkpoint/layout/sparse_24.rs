//! `sparse-24-bitmask`: two values of every four consecutive inputs, in a matrix of half the width,
//! which can be sharded by rows and by columns.

use barber_metric::Dims;

use super::{
    Layout, Part,
    bitmask::{self, Bitmask},
};
use crate::{
    dtype::Dtype,
    mask::{Mask, Pattern},
};

pub(super) static SPARSE_24: Layout = Layout {
    name: "sparse-24-bitmask",
    help: "two of every four weights and a bit for each weight, a layout of compressed-tensors for \
           the pattern 2:4",
    pattern: Some(Pattern::n_of_m(2, 4)),
    loading: include_str!("sparse_24.md"),
    packing: Some(bitmask::packing(parts)),
};

/// The tensors of a matrix.
pub(super) fn parts(mask: &Mask, dtype: Dtype) -> Vec<Part> {
    let Dims { rows, columns } = mask.dims();
    vec![
        Part::shape(vec![2, 1]),
        Part::values(dtype, vec![rows, columns / 2], |mask, dense, size| {
            Bitmask::of(&filled(mask)).gather(dense, size)
        }),
        bitmask::part(rows, columns, |mask| Bitmask::of(&filled(mask)).into_bytes()),
    ]
}

/// The mask filled up to two weights in every tile: where it keeps fewer, the first pruned ones are
/// stored as zeros.
fn filled(mask: &Mask) -> Mask {
    let mut filled = mask.clone();
    for start in (0..mask.dims().len()).step_by(4) {
        let tile = start..start + 4;
        let missing = 2usize.saturating_sub(tile.clone().filter(|&i| mask.get(i)).count());
        for i in tile.filter(|&i| !mask.get(i)).take(missing) {
            filled.set(i, true);
        }
    }
    filled
}
