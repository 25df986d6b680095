//! The storage layouts of pruned matrices: one file per layout, and a table of all. As in
//! [compressed-tensors](https://github.com/vllm-project/compressed-tensors), a compressed matrix
//! `M.weight` is stored as several tensors `M.…`: its shape, the kept values, and an index of their
//! places.

mod bitmask;
mod dense;
mod section;
mod sparse_24;
mod sparse_bitmask;

use barber_metric::Dims;

pub(super) use self::{
    bitmask::{Bitmask, width},
    section::{KEY, declared, section},
};
use super::Dtype;
use crate::{
    choice::{Choice, Named, Table},
    mask::{Mask, Pattern},
};

/// Every layout.
static ALL: Table<Layout> =
    Table::new(&[&dense::DENSE, &sparse_bitmask::SPARSE_BITMASK, &sparse_24::SPARSE_24]);

/// A storage layout of the pruned matrices of a checkpoint.
pub struct Layout {
    /// The layout's name in recipes and in `config.json`.
    pub name: &'static str,
    /// Description of the layout.
    pub help: &'static str,
    /// The only pattern that the layout stores; `None` for any.
    pub pattern: Option<Pattern>,
    /// Instructions to load such a checkpoint, in Markdown, for the model card.
    pub loading: &'static str,
    /// The compression of matrices; `None` for the dense layout.
    packing: Option<Packing>,
}

/// The choice of a layout. The default is `dense`.
pub type Format = Choice<Layout>;

/// The compression of matrices in a layout.
#[derive(Debug)]
pub(super) struct Packing {
    /// The programs that read the layout, to follow its name.
    readers: &'static str,
    /// The names of a matrix's tensors, to follow the name of its module.
    pub(super) tensors: &'static [&'static str],
    /// The name of the tensor with the places of the values.
    pub(super) index: &'static str,
    /// Computes the tensors of a matrix.
    parts: fn(&Mask, Dtype) -> Vec<Part>,
    /// Decompresses a matrix, or says why index and values do not fit.
    dense: fn(&Compressed<'_>) -> Result<Vec<u8>, String>,
}

/// The name of the tensor with a matrix's numbers of rows and columns.
pub(super) const SHAPE: &str = "shape";
/// The name of the tensor with the stored values, row-major.
pub(super) const VALUES: &str = "compressed";

/// One of the tensors that a compressed matrix is stored as.
pub(super) struct Part {
    /// Name of the tensor, to follow the name of the module.
    pub(super) name: &'static str,
    /// Format of the elements.
    pub(super) dtype: safetensors::Dtype,
    /// Shape of the tensor.
    pub(super) shape: Vec<usize>,
    /// Function that computes the bytes.
    pub(super) content: Content,
}

/// The function that computes the bytes of a tensor of a compressed matrix.
#[derive(Clone, Copy)]
pub(super) enum Content {
    /// From the mask alone.
    Index(fn(&Mask) -> Vec<u8>),
    /// From the mask, the bytes of the dense matrix, and the number of bytes of an element.
    Values(fn(&Mask, &[u8], usize) -> Vec<u8>),
}

impl Part {
    /// The tensor with a matrix's numbers of rows and columns; `shape` is its own shape.
    fn shape(shape: Vec<usize>) -> Self {
        let content = Content::Index(|mask| integers(&[mask.dims().rows, mask.dims().columns]));
        Self { name: SHAPE, dtype: safetensors::Dtype::I64, shape, content }
    }

    /// The tensor with the stored values.
    fn values(dtype: Dtype, shape: Vec<usize>, gather: fn(&Mask, &[u8], usize) -> Vec<u8>) -> Self {
        Self { name: VALUES, dtype: dtype.stored(), shape, content: Content::Values(gather) }
    }
}

/// The full name of a tensor of a module.
pub(super) fn tensor(module: &str, name: &str) -> String {
    format!("{module}.{name}")
}

/// The module of a matrix, which is the prefix of its tensors' names.
pub(super) fn module(matrix: &str) -> Option<&str> {
    matrix.strip_suffix(".weight")
}

/// The tensor name of a module's matrix.
pub(super) fn matrix(module: &str) -> String {
    format!("{module}.weight")
}

/// Decodes the stored shape of a matrix.
pub(super) fn shape(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<[usize; 2]> {
    let (sizes, []) = bytes.as_chunks::<8>() else { return None };
    let size = |bytes: &[u8; 8]| usize::try_from(i64::from_le_bytes(*bytes)).ok();
    match sizes {
        [rows, columns] if dtype == safetensors::Dtype::I64 => Some([size(rows)?, size(columns)?]),
        _ => None,
    }
}

impl Default for Format {
    fn default() -> Self {
        Self(&dense::DENSE)
    }
}

impl Named for Layout {
    const SET: &str = "Format";

    fn table() -> &'static Table<Self> {
        &ALL
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn help(&self) -> &'static str {
        self.help
    }
}

impl Format {
    /// The compression of matrices; `None` for the dense layout.
    pub(super) fn packing(self) -> Option<&'static Packing> {
        self.0.packing.as_ref()
    }
}

impl Layout {
    /// Whether all matrices are stored dense.
    pub fn is_dense(&self) -> bool {
        self.packing.is_none()
    }

    /// The programs that read the layout, in a sentence; `None` if all do.
    pub fn readers(&self) -> Option<String> {
        self.packing.as_ref().map(|packing| format!("{}: {}", self.name, packing.readers))
    }

    /// The tensors that the matrix `name` is stored as. `None` if it stays dense, because its mask
    /// does not follow the layout's pattern, or because the tensors would not be smaller.
    pub(super) fn parts(&self, name: &str, mask: &Mask, dtype: Dtype) -> Option<Vec<Part>> {
        module(name)?;
        let packing = self.packing.as_ref()?;
        if let Some(pattern) = self.pattern {
            pattern.check(name, mask).ok()?;
        }
        let parts = (packing.parts)(mask, dtype);
        let compressed: usize = parts.iter().map(|part| length(part.dtype, &part.shape)).sum();
        (compressed < mask.dims().len() * dtype.size()).then_some(parts)
    }
}

/// Bytes of a tensor.
pub(super) fn length(dtype: safetensors::Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

/// Numbers as little-endian 64-bit integers.
fn integers(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| (number as i64).to_le_bytes()).collect()
}

/// The stored form of a compressed matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compressed<'a> {
    pub(super) packing: &'static Packing,
    pub(super) dims: Dims,
    /// Bytes of an element.
    pub(super) size: usize,
    pub(super) index: &'a [u8],
    pub(super) values: &'a [u8],
}

impl Compressed<'_> {
    /// The bytes of the dense matrix.
    ///
    /// # Errors
    /// If index and values do not fit each other.
    pub(super) fn dense(&self) -> Result<Vec<u8>, String> {
        (self.packing.dense)(self)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    /// A mask of a matrix with bytes for its dense elements; with a pattern, one of whole tiles
    /// that keep two weights or fewer.
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

    fn format(name: &str) -> Format {
        Format::named(name).unwrap()
    }

    fn packing(name: &str) -> &'static Packing {
        format(name).packing().unwrap()
    }

    impl Part {
        fn bytes(&self, mask: &Mask, dense: &[u8], size: usize) -> Vec<u8> {
            match self.content {
                Content::Index(bytes) => bytes(mask),
                Content::Values(gather) => gather(mask, dense, size),
            }
        }
    }

    /// That a matrix comes back to the bit, and its parts have the sizes that they were to have.
    fn comes_back(name: &str, mask: &Mask, dtype: Dtype, bytes: Vec<u8>) {
        let (size, packing) = (dtype.size(), packing(name));
        let dense = masked(mask, size, bytes);
        let parts = (packing.parts)(mask, dtype);
        let content = |name: &str| {
            let part = parts.iter().find(|part| part.name == name).unwrap();
            let bytes = part.bytes(mask, &dense, size);
            assert_eq!(length(part.dtype, &part.shape), bytes.len(), "{name}");
            bytes
        };
        assert!(parts.iter().all(|part| packing.tensors.contains(&part.name)));
        let Dims { rows, columns } = mask.dims();
        assert_eq!(shape(safetensors::Dtype::I64, &content(SHAPE)), Some([rows, columns]));
        let (index, values) = (content(packing.index), content(VALUES));
        let stored =
            Compressed { packing, dims: mask.dims(), size, index: &index, values: &values };
        assert_eq!(stored.dense(), Ok(dense));
    }

    proptest! {
        #[test]
        fn any_mask_comes_back((mask, dtype, bytes) in matrices(None)) {
            comes_back("sparse-bitmask", &mask, dtype, bytes);
        }

        #[test]
        fn two_of_four_come_back((mask, dtype, bytes) in matrices(format("sparse-24-bitmask").pattern)) {
            comes_back("sparse-24-bitmask", &mask, dtype, bytes);
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
            let packing = packing("sparse-bitmask");
            let of = Compressed { packing, dims, size: 2, index: &bitmask, values: &values };
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
            for format in Format::all().filter(|format| !format.is_dense()) {
                let module = format!("{name}.{format}");
                let of = |name: &str| tensors.tensor(&tensor(&module, name));
                if of(SHAPE).is_err() {
                    continue;
                }
                for part in (packing(format.name).parts)(&mask, dtype) {
                    let (theirs, place) = (of(part.name).unwrap(), (name, part.name));
                    assert_eq!(theirs.dtype(), part.dtype, "{place:?}");
                    assert_eq!(theirs.shape(), part.shape, "{place:?}");
                    let bytes = part.bytes(&mask, dense.data(), dtype.size());
                    assert_eq!(theirs.data(), bytes, "{place:?}");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 3 * (3 * 4 + 2 * 3));
    }

    #[test]
    fn what_takes_no_less_room_stays_dense() {
        let dims = Dims { rows: 16, columns: 64 };
        let kept = |percent: usize| Mask::from_fn(dims, |i| i % 100 < percent);
        let stored =
            |name: &str, mask: &Mask| format(name).parts("q.weight", mask, Dtype::Bf16).is_some();
        assert!(stored("sparse-bitmask", &kept(50)));
        assert!(!stored("sparse-bitmask", &kept(95)));
        assert!(!stored("sparse-24-bitmask", &kept(50)));
        let tiles = Mask::from_fn(dims, |i| i % 2 == 1);
        assert!(stored("sparse-24-bitmask", &tiles));
        assert!(!stored("dense", &tiles));
        assert!(format("sparse-bitmask").parts("q.kernel", &tiles, Dtype::Bf16).is_none());
        let tiny = Mask::from_fn(Dims { rows: 1, columns: 4 }, |i| i < 2);
        assert!(!stored("sparse-24-bitmask", &tiny));
    }
}
