//! The file of masks beside the weights of an output. The mask of a pruned matrix has the name of the
//! matrix's tensor and its shape, with eight weights in a byte: a set bit is a kept weight, the lowest
//! bit of a byte is the first weight, and each row starts at a new byte.

use std::{collections::BTreeMap, io::Write, path::Path};

use barber_metric::Dims;
use serde_json::json;

use super::{
    Error, Masks, Reader, TensorView, check_inside,
    layout::{self, Bitmask, width},
    output::header,
    reader::Shard,
};
use crate::{files, limits::HEADERS, mask::Mask};

/// The name of the file.
pub const MASKS: &str = "masks.safetensors";

/// The format of the elements.
const BYTE: safetensors::Dtype = safetensors::Dtype::U8;

/// A tensor of the file.
struct Tensor<'a> {
    /// Shape of the packed mask.
    shape: Vec<usize>,
    /// The matrices of the checkpoint's tensor: one, or one of each expert if they are stored stacked.
    matrices: Vec<TensorView<'a>>,
}

impl Tensor<'_> {
    fn length(&self) -> usize {
        layout::length(BYTE, &self.shape)
    }
}

/// The file's tensors by name, for a checkpoint with these pruned matrices.
fn tensors(reader: &Reader, is_pruned: impl Fn(&str) -> bool) -> BTreeMap<&str, Tensor<'_>> {
    let mut all = BTreeMap::new();
    for view in (0..reader.shards().len()).flat_map(|shard| reader.in_shard(shard)) {
        let (name, shape) = view.stack.map_or((view.name, view.shape), |of| (of.name, of.shape));
        let tensor = all.entry(name).or_insert_with(|| {
            let mut shape = shape.to_vec();
            shape.iter_mut().last().into_iter().for_each(|columns| *columns = width(*columns));
            Tensor { shape, matrices: Vec::new() }
        });
        tensor.matrices.push(view);
    }
    all.retain(|_, tensor| tensor.matrices.iter().any(|view| is_pruned(view.name)));
    all
}

/// The header of the file with these tensors.
fn header_of(tensors: &BTreeMap<&str, Tensor<'_>>) -> Vec<u8> {
    let bits = "1 is a kept weight; the lowest bit is the first; each row starts at a new byte";
    let all = tensors.iter().map(|(name, of)| (*name, BYTE, &of.shape[..], of.length()));
    header(json!({ "format": "pt", "bits": bits }), all)
}

/// The packed mask of a matrix, which is transposed if its file has the matrix's columns one after the
/// other.
fn packed(view: &TensorView<'_>, mask: &Mask) -> Vec<u8> {
    if !view.is_transposed() {
        return Bitmask::of(mask).into_bytes();
    }
    let Dims { rows, columns } = mask.dims();
    let turned = Dims { rows: columns, columns: rows };
    let mask = Mask::from_fn(turned, |i| mask.get(i % rows * columns + i / rows));
    Bitmask::of(&mask).into_bytes()
}

/// Bytes of the file for a checkpoint with these pruned matrices.
///
/// # Errors
/// If the checkpoint has weights in a file of that name.
pub fn mask_bytes(reader: &Reader, is_pruned: impl Fn(&str) -> bool) -> Result<u64, Error> {
    let taken = reader.weight_files().find(|file| file.ends_with(MASKS));
    if let Some(path) = taken {
        return Err(Error::MasksTaken(path.to_owned()));
    }
    let tensors = tensors(reader, is_pruned);
    let data: usize = tensors.values().map(Tensor::length).sum();
    Ok((8 + header_of(&tensors).len() + data) as u64)
}

/// Writes the file. One matrix is packed at a time.
pub(super) fn write(path: &Path, reader: &Reader, masks: &Masks) -> Result<(), Error> {
    let io = |e| Error::io(path, e);
    let tensors = tensors(reader, |name| masks.contains_key(name));
    let mut file = files::create(path).map_err(io)?;
    let header = header_of(&tensors);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    for view in tensors.values().flat_map(|tensor| &tensor.matrices) {
        let bytes = match (masks.get(view.name), view.shape) {
            (Some(mask), _) => packed(view, mask),
            // A matrix of an expert that is not pruned.
            (None, &[rows, columns]) => {
                packed(view, &Mask::kept_everywhere(Dims { rows, columns }))
            }
            (None, _) => continue,
        };
        file.write_all(&bytes).map_err(io)?;
    }
    file.finish().map_err(io)
}

/// The masks beside the weights of a result.
#[derive(Debug)]
pub struct StoredMasks(Shard);

/// How a stored mask fits its matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Number of weights that the mask keeps.
    pub kept: usize,
    /// Number of weights that the mask prunes although they are not zero.
    pub not_zero: usize,
}

impl StoredMasks {
    /// Opens the masks in the directory of a result; `None` if it has none.
    ///
    /// # Errors
    /// If the file cannot be read, or is damaged.
    pub fn open(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(MASKS);
        if !path.exists() {
            return Ok(None);
        }
        check_inside(dir, &path)?;
        Shard::open(path, HEADERS).map(|shard| Some(Self(shard)))
    }

    /// Compares the masks with the weights of `reader`, in which these matrices are pruned: for each of
    /// them, and for the others in the same tensors, how the mask fits; `None` without a mask of its
    /// shape.
    ///
    /// # Errors
    /// If a matrix is compressed and damaged.
    pub fn compare<'a>(
        &self,
        reader: &'a Reader,
        is_pruned: impl Fn(&str) -> bool,
    ) -> Result<Vec<(&'a str, Option<Fit>)>, Error> {
        let mut found = Vec::new();
        for (name, Tensor { shape, matrices }) in tensors(reader, is_pruned) {
            let info = self.0.header.info(name);
            let info = info.filter(|info| info.dtype == BYTE && info.shape == shape);
            let masks = info.map(|info| self.0.bytes(info.data_offsets));
            let size = masks.map_or(0, |masks| masks.len() / matrices.len());
            for (i, view) in matrices.iter().enumerate() {
                let mask = masks.and_then(|masks| masks.get(i * size..(i + 1) * size));
                let fit = match (mask, view.not_zero()?) {
                    (Some(mask), Some(not_zero)) => Some(fit(mask, &packed(view, &not_zero))),
                    _ => None,
                };
                found.push((view.name, fit));
            }
        }
        Ok(found)
    }

    /// The names of tensors of which there are masks, although none of their matrices is pruned.
    pub fn others(&self, reader: &Reader, is_pruned: impl Fn(&str) -> bool) -> Vec<String> {
        let pruned = tensors(reader, is_pruned);
        let names = self.0.header.tensors().into_keys();
        let mut others: Vec<String> = names.filter(|name| !pruned.contains_key(&**name)).collect();
        others.sort();
        others
    }
}

/// Compares a packed mask with the packed bits of the weights that are not zero.
fn fit(mask: &[u8], not_zero: &[u8]) -> Fit {
    let ones = |bytes: &mut dyn Iterator<Item = u8>| -> usize {
        bytes.map(|byte| byte.count_ones() as usize).sum()
    };
    Fit {
        kept: ones(&mut mask.iter().copied()),
        not_zero: ones(&mut mask.iter().zip(not_zero).map(|(mask, of)| of & !mask)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    /// The bits of a packed matrix, as `numpy.unpackbits` gives them with `axis=-1`, `count=columns` and
    /// `bitorder="little"`.
    fn unpacked(bytes: &[u8], columns: usize) -> Vec<bool> {
        let rows = bytes.chunks(width(columns));
        rows.flat_map(|row| (0..columns).map(|i| row[i / 8] & (1 << (i % 8)) != 0)).collect()
    }

    /// A checkpoint of one matrix `a.weight` and of two experts' matrices, which are transposed if
    /// `turned`.
    fn checkpoint(dims: Dims, turned: bool) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let Dims { rows, columns } = dims;
        // The shapes say whether matrices are transposed.
        let (gate_up, down) = ([2 * rows, columns], [columns, rows]);
        let stored = |[a, b]: [usize; 2]| if turned { [b, a] } else { [a, b] };
        let tensors = [
            ("a.weight", vec![rows, columns]),
            ("m.experts.gate_up_proj", [&[2], &stored(gate_up)[..]].concat()),
            ("m.experts.down_proj", [&[2], &stored(down)[..]].concat()),
        ];
        let ones = vec![1; 16 * dims.len()];
        let views = tensors.iter().map(|(name, shape)| {
            let bytes = &ones[..4 * shape.iter().product::<usize>()];
            (
                *name,
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes)
                    .unwrap(),
            )
        });
        safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        dir
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Each mask is read back as numpy reads it, from matrices of any width, stacked and transposed
        /// ones too; a mask that prunes another weight does not fit.
        #[test]
        fn masks_are_read_back(
            rows in 1..6_usize,
            columns in 1..20_usize,
            turned: bool,
            bits in prop::collection::vec(any::<bool>(), 256),
        ) {
            let dims = Dims { rows, columns };
            let dir = checkpoint(dims, turned);
            let reader = Reader::open(dir.path()).unwrap();
            let experts = Dims { rows: 2 * rows, columns };
            let of = |dims, by: usize| Mask::from_fn(dims, |i| bits[(i + by) % bits.len()]);
            let masks = Masks::from([
                ("a.weight".to_owned(), of(dims, 0)),
                ("m.experts.1.gate_up_proj.weight".to_owned(), of(experts, 7)),
            ]);
            let path = dir.path().join(MASKS);
            write(&path, &reader, &masks).unwrap();
            let file = std::fs::read(&path).unwrap();
            let is_pruned = |name: &str| masks.contains_key(name);
            let found = SafeTensors::deserialize(&file).unwrap();
            prop_assert_eq!(found.len(), 2);
            let a = found.tensor("a.weight").unwrap();
            prop_assert_eq!(a.shape(), [rows, columns.div_ceil(8)]);
            prop_assert_eq!(unpacked(a.data(), columns), masks["a.weight"].to_bools());
            let stack = found.tensor("m.experts.gate_up_proj").unwrap();
            let [height, length] = if turned { [columns, 2 * rows] } else { [2 * rows, columns] };
            prop_assert_eq!(stack.shape(), [2, height, length.div_ceil(8)]);
            let stack = unpacked(stack.data(), length);
            let (first, second) = stack.split_at(experts.len());
            prop_assert!(first.iter().all(|kept| *kept));
            for (i, kept) in second.iter().enumerate() {
                let (row, column) = (i / length, i % length);
                let at = if turned { column * columns + row } else { i };
                prop_assert_eq!(*kept, masks["m.experts.1.gate_up_proj.weight"].get(at));
            }

            // No weight of the checkpoint is zero.
            let stored = StoredMasks::open(dir.path()).unwrap().unwrap();
            let fits = stored.compare(&reader, is_pruned).unwrap();
            prop_assert_eq!(fits.len(), 3);
            for (name, fit) in fits {
                let (all, kept) = match masks.get(name) {
                    Some(mask) => (mask.dims().len(), mask.kept()),
                    None => (experts.len(), experts.len()),
                };
                prop_assert_eq!(fit, Some(Fit { kept, not_zero: all - kept }), "{}", name);
            }
            prop_assert!(stored.others(&reader, is_pruned).is_empty());
            let others = stored.others(&reader, |name| name == "a.weight");
            prop_assert_eq!(others, ["m.experts.gate_up_proj"]);
            let without = stored.compare(&reader, |name| name.ends_with("down_proj.weight")).unwrap();
            prop_assert!(without.len() == 2 && without.iter().all(|(_, fit)| fit.is_none()));
            prop_assert_eq!(mask_bytes(&reader, is_pruned).unwrap(), file.len() as u64);
        }
    }

    #[test]
    fn weights_in_a_file_of_that_name_are_refused() {
        let dir = checkpoint(Dims { rows: 1, columns: 3 }, false);
        std::fs::rename(dir.path().join("model.safetensors"), dir.path().join(MASKS)).unwrap();
        let index = json!({ "weight_map": { "a.weight": MASKS } });
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let reader = Reader::open(dir.path()).unwrap();
        let error = mask_bytes(&reader, |_| true).unwrap_err().to_string();
        assert!(error.contains("masks.safetensors has weights of the model"), "{error}");
    }
}
