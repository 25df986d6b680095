//! How the pruned matrices of a checkpoint are stored: dense, or in a layout of
//! [compressed-tensors](https://github.com/vllm-project/compressed-tensors). There a matrix
//! `M.weight` is several tensors `M.…`: its shape, the values that it keeps, and a bitmask that says
//! where they are.

mod bitmask;
mod section;
mod sparse_24;
mod sparse_bitmask;

use barber_metric::Dims;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::bitmask::Bitmask;
pub(super) use self::section::{KEY, declared, section};
use super::Dtype;
use crate::mask::{Mask, Pattern};

/// How the pruned matrices of a checkpoint are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Format {
    /// With their zeros, as any matrix.
    #[default]
    #[serde(rename = "dense")]
    Dense,
    /// The kept values and a bitmask, for any mask.
    #[serde(rename = "sparse-bitmask")]
    SparseBitmask,
    /// Two values of every four and a bitmask, for masks of the pattern 2:4.
    #[serde(rename = "sparse-24-bitmask")]
    Sparse24Bitmask,
}

/// What a tensor tells of a compressed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// How many rows and columns it has.
    Shape,
    /// How many values come before those of each row.
    RowOffsets,
    /// The values that are stored, row-major.
    Values,
    /// Where they are.
    Bitmask,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 4] = [Self::Shape, Self::RowOffsets, Self::Values, Self::Bitmask];

    /// The name of the tensor that tells it of a module's matrix.
    pub(super) fn tensor(self, module: &str) -> String {
        let suffix = match self {
            Self::Shape => "shape",
            Self::RowOffsets => "row_offsets",
            Self::Values => "compressed",
            Self::Bitmask => "bitmask",
        };
        format!("{module}.{suffix}")
    }
}

/// One of the tensors that a compressed matrix is stored as.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    /// What it tells.
    pub(super) kind: Kind,
    /// Its format.
    pub(super) dtype: safetensors::Dtype,
    /// Its shape.
    pub(super) shape: Vec<usize>,
}

/// The module of a matrix, with which the names of its tensors begin.
pub(super) fn module(matrix: &str) -> Option<&str> {
    matrix.strip_suffix(".weight")
}

/// The matrix of a module.
pub(super) fn matrix(module: &str) -> String {
    format!("{module}.weight")
}

/// The shape that is stored with a matrix.
pub(super) fn shape(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<[usize; 2]> {
    let (sizes, []) = bytes.as_chunks::<8>() else { return None };
    let size = |bytes: &[u8; 8]| usize::try_from(i64::from_le_bytes(*bytes)).ok();
    match sizes {
        [rows, columns] if dtype == safetensors::Dtype::I64 => Some([size(rows)?, size(columns)?]),
        _ => None,
    }
}

impl Format {
    /// What recipes and `config.json` call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::SparseBitmask => "sparse-bitmask",
            Self::Sparse24Bitmask => "sparse-24-bitmask",
        }
    }

    /// What to know before anything but Barber loads it, if there is something.
    pub fn readers(self) -> Option<String> {
        (self != Self::Dense).then(|| {
            format!(
                "{}: compressed-tensors 0.9 to 0.14 read it, with transformers 4; later versions load \
                 random weights in place of its pruned matrices, and want `dense`",
                self.name()
            )
        })
    }

    /// The one pattern that it stores, if not any.
    pub const fn pattern(self) -> Option<Pattern> {
        match self {
            Self::Dense | Self::SparseBitmask => None,
            Self::Sparse24Bitmask => Some(sparse_24::PATTERN),
        }
    }

    /// The tensors that the matrix `name` is stored as. `None`, and it stays dense, where its mask
    /// has not the format's pattern or where they would take no less room.
    pub(super) fn parts(self, name: &str, mask: &Mask, dtype: Dtype) -> Option<Vec<Part>> {
        module(name)?;
        let dims = mask.dims();
        let parts = match self {
            Self::Dense => return None,
            Self::SparseBitmask => sparse_bitmask::parts(dims, mask.kept(), dtype),
            Self::Sparse24Bitmask => {
                sparse_24::PATTERN.check(name, mask).ok()?;
                sparse_24::parts(dims, dtype)
            }
        };
        let compressed: usize = parts.iter().map(|part| length(part.dtype, &part.shape)).sum();
        (compressed < dims.len() * dtype.size()).then_some(parts)
    }

    /// The bytes of one of these tensors; `dense` gives those of the matrix, whose elements have
    /// `size` bytes.
    ///
    /// # Errors
    /// What `dense` says.
    pub(super) fn content<E>(
        self,
        kind: Kind,
        mask: &Mask,
        size: usize,
        dense: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let Dims { rows, columns } = mask.dims();
        let bitmask = || match self {
            Self::Sparse24Bitmask => Bitmask::of(&sparse_24::filled(mask)),
            Self::Dense | Self::SparseBitmask => Bitmask::of(mask),
        };
        Ok(match kind {
            Kind::Shape => integers(&[rows, columns]),
            Kind::RowOffsets => integers(&bitmask().offsets()[..rows]),
            Kind::Values => bitmask().gather(&dense()?, size),
            Kind::Bitmask => bitmask().into_bytes(),
        })
    }
}

/// Bytes of a tensor.
pub(super) fn length(dtype: safetensors::Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

/// Numbers as 64-bit integers.
fn integers(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| (number as i64).to_le_bytes()).collect()
}

/// A compressed matrix as it is stored, in either layout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compressed<'a> {
    pub(super) dims: Dims,
    /// Bytes of an element.
    pub(super) size: usize,
    pub(super) bitmask: &'a [u8],
    pub(super) values: &'a [u8],
}

impl Compressed<'_> {
    /// The dense matrix.
    ///
    /// # Errors
    /// If bitmask and values do not belong together.
    pub(super) fn dense(&self) -> Result<Vec<u8>, String> {
        Bitmask::read(self.dims, self.bitmask)?.scatter(self.values, self.size)
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, path::Path};

    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    /// A mask of a matrix with bytes for its dense elements; with a pattern, one of whole tiles that
    /// keep two weights or fewer.
    fn matrices(pattern: Option<Pattern>) -> impl Strategy<Value = (Mask, Dtype, Vec<u8>)> {
        let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
        (0..6usize, 0..20usize, dtype).prop_flat_map(move |(rows, columns, dtype)| {
            let columns = if pattern.is_some() { columns.next_multiple_of(4) } else { columns };
            let dims = Dims { rows, columns };
            let bits = prop::collection::vec(any::<bool>(), dims.len());
            let bytes = prop::collection::vec(any::<u8>(), dims.len() * dtype.size());
            (bits, bytes).prop_map(move |(mut bits, bytes)| {
                if pattern.is_some() {
                    for tile in bits.chunks_mut(4) {
                        let kept = tile.iter_mut().filter(|bit| **bit);
                        kept.skip(2).for_each(|bit| *bit = false);
                    }
                }
                (Mask::from_bools(dims, &bits), dtype, bytes)
            })
        })
    }

    /// The bytes with zeros where the mask prunes.
    fn masked(mask: &Mask, size: usize, mut bytes: Vec<u8>) -> Vec<u8> {
        let weights = bytes.chunks_exact_mut(size).enumerate();
        weights.filter(|(i, _)| !mask.get(*i)).for_each(|(_, weight)| weight.fill(0));
        bytes
    }

    /// The parts of a matrix, whether or not they take less room.
    fn parts(format: Format, mask: &Mask, dtype: Dtype) -> Vec<Part> {
        match format {
            Format::Sparse24Bitmask => sparse_24::parts(mask.dims(), dtype),
            _ => sparse_bitmask::parts(mask.dims(), mask.kept(), dtype),
        }
    }

    fn content(format: Format, kind: Kind, mask: &Mask, dense: &[u8], size: usize) -> Vec<u8> {
        format.content(kind, mask, size, || Ok::<_, Infallible>(dense.to_vec())).unwrap()
    }

    /// That a matrix comes back to the bit, and its parts have the sizes that they were to have.
    fn comes_back(format: Format, mask: &Mask, dtype: Dtype, bytes: Vec<u8>) {
        let size = dtype.size();
        let dense = masked(mask, size, bytes);
        let content = |kind| content(format, kind, mask, &dense, size);
        for part in parts(format, mask, dtype) {
            let bytes = content(part.kind);
            assert_eq!(length(part.dtype, &part.shape), bytes.len(), "{part:?}");
        }
        let Dims { rows, columns } = mask.dims();
        assert_eq!(shape(safetensors::Dtype::I64, &content(Kind::Shape)), Some([rows, columns]));
        let (bitmask, values) = (content(Kind::Bitmask), content(Kind::Values));
        let stored = Compressed { dims: mask.dims(), size, bitmask: &bitmask, values: &values };
        assert_eq!(stored.dense(), Ok(dense));
    }

    proptest! {
        #[test]
        fn any_mask_comes_back((mask, dtype, bytes) in matrices(None)) {
            comes_back(Format::SparseBitmask, &mask, dtype, bytes);
        }

        #[test]
        fn two_of_four_come_back((mask, dtype, bytes) in matrices(Some(sparse_24::PATTERN))) {
            comes_back(Format::Sparse24Bitmask, &mask, dtype, bytes);
        }

        #[test]
        fn hostile_matrices_do_not_panic(
            rows: usize,
            columns: usize,
            bitmask: Vec<u8>,
            values: Vec<u8>,
            small: bool,
        ) {
            let dims = if small {
                Dims { rows: rows % 9, columns: columns % 20 }
            } else {
                Dims { rows, columns }
            };
            let of = Compressed { dims, size: 2, bitmask: &bitmask, values: &values };
            if let Ok(dense) = of.dense() {
                prop_assert_eq!(dense.len(), dims.len() * 2);
            }
        }
    }

    /// The dense matrices that compressed-tensors compressed, and what it made of them.
    #[test]
    fn bytes_are_those_of_compressed_tensors() {
        let path = Path::new("tests/fixtures/compressed-tensors.safetensors");
        let file = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let mut compared = 0;
        for name in tensors.names().into_iter().filter_map(|name| name.strip_suffix(".weight")) {
            let dense = tensors.tensor(&format!("{name}.weight")).unwrap();
            let dtype = Dtype::of(dense.dtype()).unwrap();
            let &[rows, columns] = dense.shape() else { panic!("{name} is a matrix") };
            let weights: Vec<&[u8]> = dense.data().chunks_exact(dtype.size()).collect();
            let zero = |weight: &[u8]| weight.iter().all(|byte| *byte == 0);
            let mask = Mask::from_fn(Dims { rows, columns }, |i| !zero(weights[i]));
            for format in [Format::SparseBitmask, Format::Sparse24Bitmask] {
                let module = format!("{name}.{}", format.name());
                let of = |kind: Kind| tensors.tensor(&kind.tensor(&module));
                if of(Kind::Shape).is_err() {
                    continue;
                }
                for part in parts(format, &mask, dtype) {
                    let theirs = of(part.kind).unwrap();
                    assert_eq!(theirs.dtype(), part.dtype, "{name} {part:?}");
                    assert_eq!(theirs.shape(), part.shape, "{name} {part:?}");
                    let bytes = content(format, part.kind, &mask, dense.data(), dtype.size());
                    assert_eq!(theirs.data(), bytes, "{name} {part:?}");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 3 * (3 * 4 + 2 * 3));
    }

    #[test]
    fn what_takes_no_less_room_stays_dense() {
        let dims = Dims { rows: 16, columns: 64 };
        let kept = |share: usize| Mask::from_fn(dims, |i| i % 100 < share);
        let stored = |format: Format, mask: &Mask| format.parts("q.weight", mask, Dtype::Bf16);
        assert!(stored(Format::SparseBitmask, &kept(50)).is_some());
        assert_eq!(stored(Format::SparseBitmask, &kept(95)), None);
        assert_eq!(stored(Format::Sparse24Bitmask, &kept(50)), None);
        let tiles = Mask::from_fn(dims, |i| i % 2 == 1);
        assert!(stored(Format::Sparse24Bitmask, &tiles).is_some());
        assert_eq!(stored(Format::Dense, &tiles), None);
        assert_eq!(Format::SparseBitmask.parts("q.kernel", &tiles, Dtype::Bf16), None);
        let tiny = Mask::from_fn(Dims { rows: 1, columns: 4 }, |i| i < 2);
        assert_eq!(stored(Format::Sparse24Bitmask, &tiny), None);
    }
}
