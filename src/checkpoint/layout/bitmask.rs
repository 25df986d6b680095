//! Bitmasks in the format of compressed-tensors: one bit per weight, set if its value is stored.
//! Each row starts at a new byte; the lowest bit of a byte comes first.

use std::borrow::Cow;

use barber_metric::Dims;
use rayon::prelude::*;

use super::{Content, Packing, Part, SHAPE, VALUES};
use crate::{dtype::Dtype, mask::Mask};

/// The name of a bitmask's tensor.
const BITMASK: &str = "bitmask";
/// The name of the tensor with the number of values before each row.
pub(super) const OFFSETS: &str = "row_offsets";

/// The packing of a matrix with a bitmask in compressed-tensors, with these tensors.
pub(super) const fn packing(parts: fn(&Mask, Dtype) -> Vec<Part>) -> Packing {
    Packing {
        readers: "compressed-tensors 0.9 to 0.14 read it, with transformers 4; later versions load \
                  random weights in place of its pruned matrices and need `dense`",
        tensors: &[SHAPE, OFFSETS, VALUES, BITMASK],
        index: BITMASK,
        parts,
        dense: |of| Bitmask::read(of.dims, of.index)?.scatter(of.values, of.size),
    }
}

/// The bitmask's tensor of a matrix of this shape.
pub(super) fn part(rows: usize, columns: usize, bytes: fn(&Mask) -> Vec<u8>) -> Part {
    let shape = vec![rows, width(columns)];
    Part { name: BITMASK, dtype: safetensors::Dtype::U8, shape, content: Content::Index(bytes) }
}

/// The bitmask of a matrix.
pub(in crate::checkpoint) struct Bitmask<'a> {
    dims: Dims,
    bytes: Cow<'a, [u8]>,
}

/// Number of bytes of a row.
pub(in crate::checkpoint) const fn width(columns: usize) -> usize {
    columns.div_ceil(8)
}

impl<'a> Bitmask<'a> {
    /// The bitmask of the weights that a mask keeps.
    pub(in crate::checkpoint) fn of(mask: &Mask) -> Self {
        let dims = mask.dims();
        let mut bytes = vec![0; dims.rows * width(dims.columns)];
        for (row, bytes) in bytes.chunks_exact_mut(width(dims.columns).max(1)).enumerate() {
            for column in 0..dims.columns {
                bytes[column / 8] |=
                    u8::from(mask.get(row * dims.columns + column)) << (column % 8);
            }
        }
        Self { dims, bytes: bytes.into() }
    }

    /// Reads a stored bitmask.
    ///
    /// # Errors
    /// If the bytes do not fit the shape.
    pub(super) fn read(dims: Dims, bytes: &'a [u8]) -> Result<Self, String> {
        let width = width(dims.columns);
        if dims.rows.checked_mul(width) != Some(bytes.len()) {
            return Err(format!("{} bytes are not the bitmask of a {dims} matrix", bytes.len()));
        }
        let padding = match dims.columns % 8 {
            0 => 0,
            used => !0 << used,
        };
        if bytes.chunks_exact(width.max(1)).any(|row| row[width - 1] & padding != 0) {
            return Err("the bitmask has bits beyond the ends of its rows".into());
        }
        Ok(Self { dims, bytes: bytes.into() })
    }

    /// The packed bits.
    pub(in crate::checkpoint) fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_owned()
    }

    /// The rows.
    fn rows(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(width(self.dims.columns).max(1))
    }

    /// Number of stored values before each row, and of all.
    pub(super) fn offsets(&self) -> Vec<usize> {
        let mut offsets = vec![0; self.dims.rows + 1];
        for (i, row) in self.rows().enumerate() {
            offsets[i + 1] =
                offsets[i] + row.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
        }
        offsets
    }

    /// The values of a dense matrix at the set bits, `size` bytes each.
    pub(super) fn gather(&self, dense: &[u8], size: usize) -> Vec<u8> {
        let mut values = Vec::new();
        let row = (self.dims.columns * size).max(1);
        for (row, bits) in dense.chunks_exact(row).zip(self.rows()) {
            for (column, value) in row.chunks_exact(size).enumerate() {
                if bits[column / 8] >> (column % 8) & 1 == 1 {
                    values.extend_from_slice(value);
                }
            }
        }
        values
    }

    /// The dense matrix with these values at the set bits, and zeros elsewhere.
    ///
    /// # Errors
    /// If there is not exactly one value per set bit.
    pub(super) fn scatter(&self, values: &[u8], size: usize) -> Result<Vec<u8>, String> {
        if self.dims.is_empty() && values.is_empty() {
            return Ok(Vec::new());
        }
        let offsets = self.offsets();
        let count = offsets[self.dims.rows];
        if count * size != values.len() {
            let found = values.len() / size;
            return Err(format!("the bitmask marks {count} values, but {found} are stored"));
        }
        let mut dense = vec![0; self.dims.len() * size];
        let width = width(self.dims.columns).max(1);
        dense
            .par_chunks_mut((self.dims.columns * size).max(1))
            .zip(self.bytes.par_chunks(width))
            .zip(&offsets)
            .for_each(|((row, bits), start)| {
                let mut values = values[start * size..].chunks_exact(size);
                for (column, weight) in row.chunks_exact_mut(size).enumerate() {
                    if bits[column / 8] >> (column % 8) & 1 == 1
                        && let Some(value) = values.next()
                    {
                        weight.copy_from_slice(value);
                    }
                }
            });
        Ok(dense)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_begin_with_bytes_of_their_own() {
        let dims = Dims { rows: 2, columns: 9 };
        let mask = Mask::from_fn(dims, |i| [0, 3, 8, 10, 17].contains(&i));
        let bitmask = Bitmask::of(&mask);
        assert_eq!(*bitmask.bytes, [0b1001, 1, 0b10, 1]);
        assert_eq!(bitmask.offsets(), [0, 3, 5]);
        let dense: Vec<u8> = (0..18).collect();
        let values = bitmask.gather(&dense, 1);
        assert_eq!(values, [0, 3, 8, 10, 17]);
    }

    #[test]
    fn what_is_damaged_is_no_bitmask() {
        let dims = Dims { rows: 2, columns: 9 };
        assert!(Bitmask::read(dims, &[0; 4]).is_ok());
        let error = |dims, bytes| Bitmask::read(dims, bytes).err().unwrap();
        assert_eq!(error(dims, &[0; 3]), "3 bytes are not the bitmask of a [2, 9] matrix");
        let beyond = error(dims, &[0, 0, 0, 2]);
        assert_eq!(beyond, "the bitmask has bits beyond the ends of its rows");
        let huge = Dims { rows: usize::MAX, columns: 64 };
        assert!(error(huge, &[0; 8]).contains("not the bitmask"));
        let bitmask = Bitmask::read(dims, &[1, 0, 1, 1]).unwrap();
        let values = bitmask.scatter(&[0; 4], 2).unwrap_err();
        assert_eq!(values, "the bitmask marks 3 values, but 2 are stored");
    }

    #[test]
    fn empty_matrices_have_empty_bitmasks() {
        for (rows, columns) in [(0, 5), (5, 0), (0, 0)] {
            let dims = Dims { rows, columns };
            let bitmask = Bitmask::of(&Mask::kept_everywhere(dims));
            assert!(bitmask.gather(&[], 2).is_empty());
            assert!(bitmask.scatter(&[], 2).unwrap().is_empty());
            assert!(Bitmask::read(dims, &[]).is_ok());
        }
    }
}
