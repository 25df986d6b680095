//! `sparse-bitmask`: the values of all kept weights, one after the other, and where those of each row
//! begin.

use barber_metric::Dims;
use safetensors::Dtype::{I64, U8};

use super::{Kind, Part, bitmask::width};
use crate::checkpoint::Dtype;

/// The tensors of a matrix that keeps so many weights.
pub(super) fn parts(dims: Dims, kept: usize, dtype: Dtype) -> Vec<Part> {
    let Dims { rows, columns } = dims;
    vec![
        Part { kind: Kind::Shape, dtype: I64, shape: vec![2] },
        Part { kind: Kind::RowOffsets, dtype: I64, shape: vec![rows] },
        Part { kind: Kind::Values, dtype: dtype.stored(), shape: vec![kept] },
        Part { kind: Kind::Bitmask, dtype: U8, shape: vec![rows, width(columns)] },
    ]
}
