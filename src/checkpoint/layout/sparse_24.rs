//! `sparse-24-bitmask`: two values of every four consecutive inputs, as a matrix of half the width,
//! which can be cut by rows and by columns.

use barber_metric::Dims;
use safetensors::Dtype::{I64, U8};

use super::{Kind, Part, bitmask::width};
use crate::{
    checkpoint::Dtype,
    mask::{Mask, Pattern},
};

/// The pattern that can be stored so.
pub(super) const PATTERN: Pattern = Pattern::n_of_m(2, 4);

/// The tensors of a matrix.
pub(super) fn parts(dims: Dims, dtype: Dtype) -> Vec<Part> {
    let Dims { rows, columns } = dims;
    vec![
        Part { kind: Kind::Shape, dtype: I64, shape: vec![2, 1] },
        Part { kind: Kind::Values, dtype: dtype.stored(), shape: vec![rows, columns / 2] },
        Part { kind: Kind::Bitmask, dtype: U8, shape: vec![rows, width(columns)] },
    ]
}

/// The mask with two weights in every tile: where it keeps fewer, the first pruned ones are stored
/// as the zeros that they are.
pub(super) fn filled(mask: &Mask) -> Mask {
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
