//! `sparse-bitmask`: the values of all kept weights in order, and the offset of each row in them.

use barber_metric::Dims;
use safetensors::Dtype::I64;

use super::{
    Content, Layout, Part,
    bitmask::{self, Bitmask},
    integers,
};
use crate::{dtype::Dtype, mask::Mask};

pub(super) static SPARSE_BITMASK: Layout = Layout {
    name: "sparse-bitmask",
    help: "the kept weights and a bit for each, a layout of compressed-tensors for any mask",
    pattern: None,
    loading: include_str!("sparse_bitmask.md"),
    packing: Some(bitmask::packing(parts)),
};

/// The tensors of a matrix.
pub(super) fn parts(mask: &Mask, dtype: Dtype) -> Vec<Part> {
    let Dims { rows, columns } = mask.dims();
    let offsets = |mask: &Mask| integers(&Bitmask::of(mask).offsets()[..mask.dims().rows]);
    vec![
        Part::shape(vec![2]),
        Part {
            name: bitmask::OFFSETS,
            dtype: I64,
            shape: vec![rows],
            content: Content::Index(offsets),
        },
        Part::values(dtype, vec![mask.kept()], |mask, dense, size| {
            Bitmask::of(mask).gather(dense, size)
        }),
        bitmask::part(rows, columns, |mask| Bitmask::of(mask).into_bytes()),
    ]
}
