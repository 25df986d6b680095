//! The result of pruning: masks, and weights that an initialiser or a stage changed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use super::{Dtype, Error, Reader};
use crate::mask::Mask;

/// The masks of a model, by tensor name; tensors without a mask are dense.
pub type Masks = BTreeMap<String, Mask>;

/// The masks and changed weights of a model. The default is the dense model.
#[derive(Debug, Default)]
pub struct Pruned {
    /// The masks of the pruned matrices.
    pub masks: Masks,
    changed: Option<Changed>,
}

/// Changed matrices, in a scratch file, as they may be as large as the model.
#[derive(Debug)]
struct Changed {
    file: File,
    end: u64,
    matrices: BTreeMap<String, Stored>,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    start: u64,
    length: usize,
    dtype: Dtype,
}

/// Saved weights of some matrices.
#[derive(Debug)]
pub struct Saved(Vec<(String, Option<Stored>)>);

impl From<Masks> for Pruned {
    fn from(masks: Masks) -> Self {
        Self { masks, changed: None }
    }
}

impl Pruned {
    /// The dense model: no masks, no changed weights.
    pub fn dense() -> Self {
        Self::default()
    }

    /// Sets the weights of matrix `name` to `values`, row-major, rounded to `dtype`, or to the
    /// format in `reader`; returns the rounded values. They are kept in a file in the directory
    /// `scratch`.
    ///
    /// # Errors
    /// If a value does not fit the format, or the file cannot be written.
    pub fn change(
        &mut self,
        reader: &Reader,
        name: &str,
        values: &[f32],
        dtype: Option<Dtype>,
        scratch: &Path,
    ) -> Result<Vec<f32>, Error> {
        let (dtype, bytes) = Self::rounded(reader, name, values, dtype)?;
        self.store(name, dtype, &bytes, scratch)?;
        Ok(dtype.decode(&bytes))
    }

    /// Values of matrix `name`, rounded to `dtype`, or to the format in `reader`.
    pub(crate) fn rounded(
        reader: &Reader,
        name: &str,
        values: &[f32],
        dtype: Option<Dtype>,
    ) -> Result<(Dtype, Vec<u8>), Error> {
        let dtype = Self::stored_as(reader, name, dtype);
        Ok((dtype, dtype.round(name, values)?))
    }

    /// The format of changed weights of matrix `name`: `dtype`, or the format in `reader`.
    pub(crate) fn stored_as(reader: &Reader, name: &str, dtype: Option<Dtype>) -> Dtype {
        let dtype = dtype.or_else(|| Dtype::of(reader.tensor(name).ok()?.dtype));
        dtype.unwrap_or(Dtype::F32)
    }

    /// [`Pruned::change`] for weights that are rounded to `dtype` already.
    pub(crate) fn store(
        &mut self,
        name: &str,
        dtype: Dtype,
        bytes: &[u8],
        scratch: &Path,
    ) -> Result<(), Error> {
        self.write(name, (dtype, bytes), scratch, |changed| changed.end)
    }

    /// [`Pruned::store`] in the place of the matrix's changed weights, if it has some: a stage that
    /// changes them often does not fill the disk. What was saved of them is lost.
    pub(crate) fn overwrite(
        &mut self,
        name: &str,
        dtype: Dtype,
        bytes: &[u8],
        scratch: &Path,
    ) -> Result<(), Error> {
        self.write(name, (dtype, bytes), scratch, |changed| {
            let before = changed.matrices.get(name).filter(|of| of.length == bytes.len());
            before.map_or(changed.end, |of| of.start)
        })
    }

    /// Writes weights to the scratch file, which it makes if there is none, at the `place` there.
    fn write(
        &mut self,
        name: &str,
        (dtype, bytes): (Dtype, &[u8]),
        scratch: &Path,
        place: impl FnOnce(&Changed) -> u64,
    ) -> Result<(), Error> {
        let io = |e| Error::io(scratch, e);
        let changed = match &mut self.changed {
            Some(changed) => changed,
            None => {
                let file = tempfile::tempfile_in(scratch).map_err(io)?;
                self.changed.insert(Changed { file, end: 0, matrices: BTreeMap::new() })
            }
        };
        let stored = Stored { start: place(changed), length: bytes.len(), dtype };
        changed.file.seek(SeekFrom::Start(stored.start)).map_err(io)?;
        changed.file.write_all(bytes).map_err(io)?;
        changed.end = changed.end.max(stored.start + bytes.len() as u64);
        changed.matrices.insert(name.into(), stored);
        Ok(())
    }

    /// A copy with its own scratch file in the directory `scratch`.
    ///
    /// # Errors
    /// If a scratch file cannot be read or written.
    pub fn copy(&self, scratch: &Path) -> Result<Self, Error> {
        let io = |e| Error::io(scratch, e);
        let changed = self.changed.as_ref().map(|changed| -> Result<Changed, Error> {
            let (mut from, mut file) = (&changed.file, tempfile::tempfile_in(scratch).map_err(io)?);
            from.seek(SeekFrom::Start(0)).map_err(io)?;
            std::io::copy(&mut from, &mut file).map_err(io)?;
            Ok(Changed { file, end: changed.end, matrices: changed.matrices.clone() })
        });
        Ok(Self { masks: self.masks.clone(), changed: changed.transpose()? })
    }

    /// Restores the dense weights of a matrix; returns whether it had changed ones.
    pub fn restore(&mut self, name: &str) -> bool {
        let changed = self.changed.as_mut();
        changed.is_some_and(|changed| changed.matrices.remove(name).is_some())
    }

    /// Whether a tensor has changed values.
    pub fn has_changed(&self, name: &str) -> bool {
        self.format(name).is_some()
    }

    /// Forgets a tensor's changed values and its mask; returns whether it had changed ones.
    pub fn forget(&mut self, name: &str) -> bool {
        self.masks.remove(name);
        self.restore(name)
    }

    /// Saves the weights of some matrices, for [`Pruned::put_back`].
    pub fn save(&self, names: &[String]) -> Saved {
        let stored = |name: &String| self.changed.as_ref()?.matrices.get(name).copied();
        Saved(names.iter().map(|name| (name.clone(), stored(name))).collect())
    }

    /// Puts saved weights back.
    pub fn put_back(&mut self, Saved(saved): Saved) {
        let Some(changed) = &mut self.changed else { return };
        for (name, stored) in saved {
            match stored {
                Some(stored) => changed.matrices.insert(name, stored),
                None => changed.matrices.remove(&name),
            };
        }
    }

    /// The changed weights of a matrix, row-major, those of pruned weights included; `None` if the
    /// matrix has its dense weights.
    ///
    /// # Errors
    /// If the scratch file cannot be read.
    pub fn values(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        Ok(self.bytes(name)?.map(|(dtype, bytes)| dtype.decode(&bytes)))
    }

    /// The format of a matrix's changed weights; `None` if the matrix has its dense weights.
    pub(crate) fn format(&self, name: &str) -> Option<Dtype> {
        Some(self.changed.as_ref()?.matrices.get(name)?.dtype)
    }

    /// The format and the bytes of a matrix's changed weights; `None` if the matrix has its dense
    /// weights.
    pub(crate) fn bytes(&self, name: &str) -> Result<Option<(Dtype, Vec<u8>)>, Error> {
        let Some(changed) = &self.changed else { return Ok(None) };
        let Some(&Stored { start, length, dtype }) = changed.matrices.get(name) else {
            return Ok(None);
        };
        let mut bytes = vec![0; length];
        let mut file = &changed.file;
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|e| Error::io(Path::new("scratch file of changed weights"), e))?;
        Ok(Some((dtype, bytes)))
    }
}
