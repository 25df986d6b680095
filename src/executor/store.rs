//! What is kept of every sample between two layers: in memory, or beyond a budget in a scratch
//! file.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::Error;
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

    /// Whether so many numbers fit into the memory that is left, as they are.
    pub(super) fn fits(&self, numbers: usize) -> bool {
        numbers as u64 * Dtype::F32.size() as u64 <= self.left.load(Ordering::Relaxed)
    }

    /// A store of `count` matrices.
    pub(super) fn store(&self, count: usize) -> Store {
        let slots = (0..count).map(|_| Slot::Empty).collect();
        Store { slots, file: None, end: 0, held: 0, storage: self.clone() }
    }

    /// The same, whose values are not rounded.
    pub(super) fn exact(&self, count: usize) -> Store {
        Self { dtype: Dtype::F32, ..self.clone() }.store(count)
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

/// A matrix for each sample.
#[derive(Debug)]
pub struct Store {
    slots: Vec<Slot>,
    file: Option<File>,
    /// Where the file ends.
    end: u64,
    /// Bytes in memory.
    held: u64,
    storage: Storage,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Numbers(Vec<f32>),
    Bytes(Vec<u8>),
    File { start: u64, length: usize },
}

impl Store {
    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Stores the matrix of sample `i`, in the place of the one that was there.
    ///
    /// # Errors
    /// If a value is too large for the format, or the scratch file cannot be written.
    pub fn put(&mut self, i: usize, values: &[f32]) -> Result<(), Error> {
        if let Slot::Numbers(held) = &mut self.slots[i]
            && held.len() == values.len()
        {
            held.copy_from_slice(values);
            return Ok(());
        }
        let dtype = self.storage.dtype;
        if dtype == Dtype::F16
            && let Some(value) = values.iter().find(|value| value.abs() > half::f16::MAX.to_f32())
        {
            return Err(Error::Overflow { value: *value, dtype: dtype.name() });
        }
        let size = values.len() * dtype.size();
        let file = match self.slots[i] {
            Slot::File { length, .. } if length == size => true,
            Slot::Bytes(ref held) if held.len() == size => false,
            _ => {
                self.release(i);
                let fits = self.storage.take(size as u64);
                self.held += if fits { size as u64 } else { 0 };
                !fits
            }
        };
        if !file && dtype == Dtype::F32 {
            self.slots[i] = Slot::Numbers(values.to_vec());
            return Ok(());
        }
        let bytes = dtype.encode(values);
        if !file {
            self.slots[i] = Slot::Bytes(bytes);
            return Ok(());
        }
        let start = match self.slots[i] {
            Slot::File { start, .. } => start,
            _ => self.end,
        };
        self.write(start, &bytes).map_err(|e| Error::scratch(&self.storage.scratch, &e))?;
        self.end = self.end.max(start + size as u64);
        self.slots[i] = Slot::File { start, length: size };
        Ok(())
    }

    fn write(&mut self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(&self.storage.scratch)?),
        };
        file.seek(SeekFrom::Start(start))?;
        file.write_all(bytes)
    }

    /// The matrices of some samples, one below the other.
    ///
    /// # Errors
    /// If the scratch file cannot be read.
    pub fn read(&self, samples: Range<usize>) -> Result<Vec<f32>, Error> {
        let dtype = self.storage.dtype;
        let mut values = Vec::new();
        for slot in &self.slots[samples] {
            match slot {
                Slot::Empty => (),
                Slot::Numbers(held) => values.extend_from_slice(held),
                Slot::Bytes(bytes) => values.append(&mut dtype.decode(bytes)),
                Slot::File { start, length } => {
                    let mut bytes = vec![0; *length];
                    let read = match &self.file {
                        Some(file) => {
                            let mut file = file;
                            let at = file.seek(SeekFrom::Start(*start));
                            at.and_then(|_| file.read_exact(&mut bytes))
                        }
                        None => Err(io::ErrorKind::NotFound.into()),
                    };
                    read.map_err(|e| Error::scratch(&self.storage.scratch, &e))?;
                    values.append(&mut dtype.decode(&bytes));
                }
            }
        }
        Ok(values)
    }

    /// Gives back the memory of a matrix.
    fn release(&mut self, i: usize) {
        let size = match &self.slots[i] {
            Slot::Empty | Slot::File { .. } => 0,
            Slot::Numbers(held) => (held.len() * Dtype::F32.size()) as u64,
            Slot::Bytes(held) => held.len() as u64,
        };
        self.slots[i] = Slot::Empty;
        self.held -= size;
        self.storage.left.fetch_add(size, Ordering::Relaxed);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.storage.left.fetch_add(self.held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(store: &mut Store) {
        for i in 0..store.len() {
            store.put(i, &[i as f32, 0.5]).unwrap();
        }
    }

    #[test]
    fn values_come_back_from_memory_and_from_the_file() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let size = 2 * dtype.size() as u64;
            for memory in [0, 3 * size, u64::MAX / 2] {
                let storage = Storage::new(dtype, memory, std::env::temp_dir());
                let mut store = storage.store(5);
                fill(&mut store);
                assert_eq!(store.file.is_some(), memory < 5 * size);
                assert_eq!(store.read(1..4).unwrap(), [1.0, 0.5, 2.0, 0.5, 3.0, 0.5]);
                // Again, in place: neither memory nor file grows.
                let end = store.end;
                fill(&mut store);
                assert_eq!(
                    (store.end, storage.left.load(Ordering::Relaxed)),
                    (end, memory.saturating_sub(store.held))
                );
                store.put(4, &[7.0, 8.0, 9.0]).unwrap();
                assert_eq!(store.read(3..5).unwrap(), [3.0, 0.5, 7.0, 8.0, 9.0]);
                drop(store);
                assert_eq!(storage.left.load(Ordering::Relaxed), memory);
            }
        }
    }

    #[test]
    fn what_does_not_fit_the_format_is_refused() {
        let mut store = Storage::new(Dtype::F16, 100, std::env::temp_dir()).store(1);
        assert!(matches!(store.put(0, &[1e6]), Err(Error::Overflow { .. })));
        assert!(store.storage.fits(25) && !store.storage.fits(26));
    }

    #[test]
    fn a_scratch_directory_that_is_not_there_is_an_error() {
        let mut store = Storage::new(Dtype::F32, 0, "no/such/directory").store(1);
        let message = store.put(0, &[1.0]).unwrap_err().to_string();
        assert!(message.contains("no/such/directory"), "{message}");
    }
}
