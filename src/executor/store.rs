//! What is kept of the samples between two layers: on the device, or beyond a budget in a scratch
//! file.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Error,
    ops::{Hold, Matrix},
};
use crate::checkpoint::Dtype;

/// How matrices of samples are stored.
#[derive(Clone, Debug)]
pub struct Storage {
    dtype: Dtype,
    /// Bytes of memory that are left for all stores together.
    left: Arc<AtomicU64>,
    scratch: PathBuf,
}

impl Storage {
    /// Values as `dtype`, in at most `memory` bytes of memory, the others in files in `scratch`.
    pub fn new(dtype: Dtype, memory: u64, scratch: impl Into<PathBuf>) -> Self {
        Self { dtype, left: Arc::new(AtomicU64::new(memory)), scratch: scratch.into() }
    }

    /// The format of the values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Whether so many numbers fit into the memory that is left, as they are.
    pub(super) fn fits(&self, numbers: usize) -> bool {
        numbers as u64 * Dtype::F32.size() as u64 <= self.left.load(Ordering::Relaxed)
    }

    /// A store of `count` matrices.
    pub(super) fn store<D: Hold>(&self, count: usize) -> Store<D> {
        let slots = (0..count).map(|_| Slot::Empty).collect();
        Store { slots, file: None, end: 0, held: 0, storage: self.clone() }
    }

    /// The same, in which values are not rounded.
    pub(crate) fn exact(&self) -> Self {
        Self { dtype: Dtype::F32, ..self.clone() }
    }

    fn take(&self, bytes: u64) -> bool {
        let left = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok()
    }
}

impl Default for Storage {
    /// As they are, in memory.
    fn default() -> Self {
        Self::new(Dtype::F32, u64::MAX, std::env::temp_dir())
    }
}

/// Matrices, one for each run of samples.
#[derive(Debug)]
pub struct Store<D: Hold> {
    slots: Vec<Slot<D>>,
    file: Option<File>,
    /// Where the file ends.
    end: u64,
    /// Bytes in memory.
    held: u64,
    storage: Storage,
}

#[derive(Debug)]
enum Slot<D: Hold> {
    Empty,
    /// On the device, as it is.
    Held(Matrix<D>),
    /// In half precision.
    Half(Vec<u8>, (usize, usize)),
    /// In the file, from this byte on.
    File(u64, (usize, usize)),
}

impl<D: Hold> Slot<D> {
    fn shape(&self) -> Option<(usize, usize)> {
        match self {
            Self::Empty => None,
            Self::Held(matrix) => Some(matrix.shape()),
            Self::Half(_, shape) | Self::File(_, shape) => Some(*shape),
        }
    }
}

impl<D: Hold> Store<D> {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Stores one matrix more.
    pub(super) fn push(&mut self, matrix: Matrix<D>) -> Result<(), Error> {
        self.slots.push(Slot::Empty);
        self.put(self.slots.len() - 1, matrix)
    }

    /// Stores a matrix in the place of the one that was there.
    pub(super) fn put(&mut self, i: usize, matrix: Matrix<D>) -> Result<(), Error> {
        let (dtype, shape) = (self.storage.dtype, matrix.shape());
        let bytes = (shape.0 * shape.1 * dtype.size()) as u64;
        if self.slots[i].shape() != Some(shape) {
            self.release(i);
            if self.storage.take(bytes) {
                self.held += bytes;
            } else {
                self.slots[i] = Slot::File(self.end, shape);
                self.end += bytes;
            }
        }
        let start = match self.slots[i] {
            Slot::File(start, _) => Some(start),
            _ if dtype == Dtype::F32 => {
                self.slots[i] = Slot::Held(matrix);
                return Ok(());
            }
            _ => None,
        };
        let values = matrix.on_host().map_err(Error::device)?;
        let most = half::f16::MAX.to_f32();
        if dtype == Dtype::F16
            && let Some(value) = values.iter().find(|value| value.abs() > most)
        {
            return Err(Error::Overflow { value: *value, dtype: dtype.name() });
        }
        let encoded = dtype.encode(&values);
        match start {
            Some(start) => {
                self.write(start, &encoded).map_err(|e| Error::scratch(&self.storage.scratch, &e))
            }
            None => {
                self.slots[i] = Slot::Half(encoded, shape);
                Ok(())
            }
        }
    }

    fn write(&mut self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(&self.storage.scratch)?),
        };
        file.seek(SeekFrom::Start(start))?;
        file.write_all(bytes)
    }

    /// A matrix that was stored.
    pub(super) fn get(&self, i: usize, device: &D) -> Result<Matrix<D>, Error> {
        let dtype = self.storage.dtype;
        let (values, shape) = match &self.slots[i] {
            Slot::Empty => (Vec::new(), (0, 0)),
            Slot::Held(matrix) => return Ok(matrix.clone()),
            Slot::Half(bytes, shape) => (dtype.decode(bytes), *shape),
            Slot::File(start, shape) => {
                let mut bytes = vec![0; shape.0 * shape.1 * dtype.size()];
                let read = match &self.file {
                    Some(file) => {
                        let mut file = file;
                        let at = file.seek(SeekFrom::Start(*start));
                        at.and_then(|_| file.read_exact(&mut bytes))
                    }
                    None => Err(io::ErrorKind::NotFound.into()),
                };
                read.map_err(|e| Error::scratch(&self.storage.scratch, &e))?;
                (dtype.decode(&bytes), *shape)
            }
        };
        device.hold(values, shape).map_err(Error::device)
    }

    /// A matrix, if one was stored.
    pub(super) fn find(&self, i: usize, device: &D) -> Result<Option<Matrix<D>>, Error> {
        self.slots[i].shape().map(|_| self.get(i, device)).transpose()
    }

    /// The same, which is there no more: what nobody else holds can be worked on in place.
    pub(super) fn take(&mut self, i: usize, device: &D) -> Result<Option<Matrix<D>>, Error> {
        let found = self.find(i, device)?;
        self.release(i);
        Ok(found)
    }

    /// Gives back the memory of a matrix.
    fn release(&mut self, i: usize) {
        let bytes = match &self.slots[i] {
            Slot::Empty | Slot::File(..) => 0,
            Slot::Held(matrix) => (matrix.shape().0 * matrix.shape().1 * Dtype::F32.size()) as u64,
            Slot::Half(bytes, _) => bytes.len() as u64,
        };
        self.slots[i] = Slot::Empty;
        self.held -= bytes;
        self.storage.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl<D: Hold> Drop for Store<D> {
    fn drop(&mut self) {
        self.storage.left.fetch_add(self.held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::Cpu;

    use super::*;
    use crate::executor::ops::testing::matrix;

    fn storage(dtype: Dtype, memory: u64) -> Storage {
        Storage::new(dtype, memory, std::env::temp_dir())
    }

    #[test]
    fn values_come_back_from_memory_and_from_the_file() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let size = 2 * dtype.size() as u64;
            for memory in [0, 3 * size, 1 << 20] {
                let storage = storage(dtype, memory);
                let mut store: Store<Cpu> = storage.store(5);
                let left = || storage.left.load(Ordering::Relaxed);
                let get = |store: &Store<Cpu>, i| store.get(i, &Cpu::default()).unwrap().to_vec();
                // Again, in place: neither memory nor file grows.
                for round in [0.5, 0.25] {
                    for i in 0..5 {
                        store.put(i, matrix(vec![i as f32, round], (1, 2))).unwrap();
                    }
                    assert_eq!(store.file.is_some(), memory < 5 * size);
                    assert_eq!(left() + store.held, memory);
                    assert_eq!(store.held + store.end, 5 * size);
                    assert_eq!(get(&store, 3), [3.0, round]);
                    assert_eq!(get(&store, 0), [0.0, round]);
                }
                store.put(4, matrix(vec![7.0, 8.0, 9.0], (3, 1))).unwrap();
                assert_eq!(
                    (get(&store, 3), get(&store, 4)),
                    (vec![3.0, 0.25], vec![7.0, 8.0, 9.0])
                );
                drop(store);
                assert_eq!(left(), memory);
            }
        }
    }

    #[test]
    fn what_does_not_fit_the_format_is_refused() {
        let storage = storage(Dtype::F16, 100);
        let mut store = storage.store(1);
        assert!(matches!(store.put(0, matrix(vec![1e6], (1, 1))), Err(Error::Overflow { .. })));
        assert!(storage.fits(24) && !storage.fits(26));
    }

    #[test]
    fn a_scratch_directory_that_is_not_there_is_an_error() {
        let mut store = Storage::new(Dtype::F32, 0, "no/such/directory").store(1);
        let message = store.put(0, matrix(vec![1.0], (1, 1))).unwrap_err().to_string();
        assert!(message.contains("no/such/directory"), "{message}");
    }
}
