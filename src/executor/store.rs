//! Stores matrices of samples between two layers: on the device, and beyond a budget in scratch
//! space.

use std::{
    fmt,
    io::{self, Read, Seek, SeekFrom, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Error,
    ops::{Blend, Hold, Matrix},
};
use crate::dtype::Dtype;

/// Opens scratch space for matrices that do not fit into memory. Its `Display` names it in errors.
pub trait Spill: fmt::Debug + fmt::Display + Send + Sync {
    /// Opens new, empty scratch space.
    ///
    /// # Errors
    /// If the scratch space cannot be created.
    fn open(&self) -> io::Result<Box<dyn Scratch>>;
}

/// Scratch space, such as a temporary file.
pub trait Scratch: fmt::Debug + Read + Write + Seek + Send {}

impl<T: fmt::Debug + Read + Write + Seek + Send> Scratch for T {}

/// The format and the memory budget of stored matrices.
#[derive(Clone, Debug)]
pub struct Storage {
    dtype: Dtype,
    /// Bytes of memory left for all stores together.
    left: Arc<AtomicU64>,
    spill: Option<Arc<dyn Spill>>,
}

impl Storage {
    /// Stores values as `dtype`, in at most `memory` bytes of memory and then in scratch space.
    pub fn new(dtype: Dtype, memory: u64, spill: impl Spill + 'static) -> Self {
        Self { dtype, left: Arc::new(AtomicU64::new(memory)), spill: Some(Arc::new(spill)) }
    }

    /// The format of the values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Whether this count of f32 numbers fits into the memory that is left.
    pub(super) fn fits(&self, numbers: usize) -> bool {
        numbers as u64 * Dtype::F32.size() as u64 <= self.left.load(Ordering::Relaxed)
    }

    /// A store of `count` matrices.
    pub(crate) fn store<D: Hold>(&self, count: usize) -> Store<D> {
        let slots = (0..count).map(|_| Slot::Empty).collect();
        Store { slots, scratch: None, end: 0, held: 0, storage: self.clone() }
    }

    /// The storage without rounding.
    pub(crate) fn exact(&self) -> Self {
        Self { dtype: Dtype::F32, ..self.clone() }
    }

    /// The storage in bf16: half precision with the range of f32.
    pub(crate) fn half(&self) -> Self {
        Self { dtype: Dtype::Bf16, ..self.clone() }
    }

    /// The storage in scratch space alone, if there is any: for what a run needs once in a while, and
    /// then matrix by matrix.
    pub(crate) fn in_scratch(&self) -> Self {
        match &self.spill {
            Some(_) => Self { left: Arc::default(), ..self.clone() },
            None => self.clone(),
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let left = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok()
    }

    fn scratch_error(&self, problem: &io::Error) -> Error {
        Error::Scratch(match &self.spill {
            Some(spill) => format!("{spill}: {problem}"),
            None => problem.to_string(),
        })
    }
}

impl Default for Storage {
    /// f32 in unlimited memory.
    fn default() -> Self {
        Self { dtype: Dtype::F32, left: Arc::new(AtomicU64::new(u64::MAX)), spill: None }
    }
}

/// Stored matrices, one for each run of samples.
#[derive(Debug)]
pub struct Store<D: Hold> {
    slots: Vec<Slot<D>>,
    scratch: Option<Mutex<Box<dyn Scratch>>>,
    /// End of the used scratch space, in bytes.
    end: u64,
    /// Bytes held in memory.
    held: u64,
    storage: Storage,
}

#[derive(Debug)]
enum Slot<D: Hold> {
    Empty,
    /// On the device, in f32.
    Held(Matrix<D>),
    /// On the host, in half precision, with the shape.
    Half(Vec<u8>, (usize, usize)),
    /// In scratch space at this offset, with the shape.
    Scratch(u64, (usize, usize)),
}

impl<D: Hold> Slot<D> {
    fn shape(&self) -> Option<(usize, usize)> {
        match self {
            Self::Empty => None,
            Self::Held(matrix) => Some(matrix.shape()),
            Self::Half(_, shape) | Self::Scratch(_, shape) => Some(*shape),
        }
    }
}

impl<D: Hold> Store<D> {
    /// Stores a matrix, in place of an earlier one if there is one.
    pub(crate) fn put(&mut self, i: usize, matrix: Matrix<D>) -> Result<(), Error> {
        let (dtype, shape) = (self.storage.dtype, matrix.shape());
        let bytes = (shape.0 * shape.1 * dtype.size()) as u64;
        if self.slots[i].shape() != Some(shape) {
            self.release(i);
            if self.storage.take(bytes) {
                self.held += bytes;
            } else {
                self.slots[i] = Slot::Scratch(self.end, shape);
                self.end += bytes;
            }
        }
        let start = match self.slots[i] {
            Slot::Scratch(start, _) => Some(start),
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
            Some(start) => self.write(start, &encoded).map_err(|e| self.storage.scratch_error(&e)),
            None => {
                self.slots[i] = Slot::Half(encoded, shape);
                Ok(())
            }
        }
    }

    fn write(&mut self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let scratch = match &mut self.scratch {
            Some(scratch) => scratch,
            None => {
                let spill = self.storage.spill.as_ref().ok_or(io::ErrorKind::OutOfMemory)?;
                self.scratch.insert(Mutex::new(spill.open()?))
            }
        };
        let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
        scratch.seek(SeekFrom::Start(start))?;
        scratch.write_all(bytes)
    }

    fn read(&self, start: u64, bytes: &mut [u8]) -> io::Result<()> {
        let scratch = self.scratch.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.seek(SeekFrom::Start(start))?;
        scratch.read_exact(bytes)
    }

    /// A stored matrix, which must exist.
    pub(crate) fn get(&self, i: usize, device: &D) -> Result<Matrix<D>, Error> {
        let dtype = self.storage.dtype;
        let (values, shape) = match &self.slots[i] {
            Slot::Empty => (Vec::new(), (0, 0)),
            Slot::Held(matrix) => return Ok(matrix.clone()),
            Slot::Half(bytes, shape) => (dtype.decode(bytes), *shape),
            Slot::Scratch(start, shape) => {
                let mut bytes = vec![0; shape.0 * shape.1 * dtype.size()];
                self.read(*start, &mut bytes).map_err(|e| self.storage.scratch_error(&e))?;
                (dtype.decode(&bytes), *shape)
            }
        };
        device.hold(values, shape).map_err(Error::device)
    }

    /// A stored matrix; `None` if it does not exist.
    pub(super) fn find(&self, i: usize, device: &D) -> Result<Option<Matrix<D>>, Error> {
        self.slots[i].shape().map(|_| self.get(i, device)).transpose()
    }

    /// Removes and returns a matrix, if one was stored, so that it can be updated in place.
    pub(super) fn take(&mut self, i: usize, device: &D) -> Result<Option<Matrix<D>>, Error> {
        let found = self.find(i, device)?;
        self.release(i);
        Ok(found)
    }

    /// Blends matrices: a ← (1 − `fraction`) · a + `fraction` · b, for b in `other`.
    ///
    /// # Errors
    /// If the device runs out of memory, or the scratch space fails.
    pub fn blend(&mut self, other: &Self, fraction: f32, device: &D) -> Result<(), Error>
    where
        D: Blend,
    {
        let stored = |i: &usize| self.slots[*i].shape().is_some();
        for i in (0..self.slots.len()).filter(stored).collect::<Vec<_>>() {
            let (a, b) = (self.get(i, device)?, other.get(i, device)?);
            self.put(i, D::blend(&a, &b, fraction).map_err(Error::device)?)?;
        }
        Ok(())
    }

    /// Releases the memory of a matrix.
    fn release(&mut self, i: usize) {
        let bytes = match &self.slots[i] {
            Slot::Empty | Slot::Scratch(..) => 0,
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

    #[derive(Debug)]
    struct Cursors;

    impl fmt::Display for Cursors {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("cursors")
        }
    }

    impl Spill for Cursors {
        fn open(&self) -> io::Result<Box<dyn Scratch>> {
            Ok(Box::new(io::Cursor::new(Vec::new())))
        }
    }

    fn storage(dtype: Dtype, memory: u64) -> Storage {
        Storage::new(dtype, memory, Cursors)
    }

    #[test]
    fn values_come_back_from_memory_and_from_scratch_space() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let size = 2 * dtype.size() as u64;
            for memory in [0, 3 * size, 1 << 20] {
                let storage = storage(dtype, memory);
                let mut store: Store<Cpu> = storage.store(5);
                let left = || storage.left.load(Ordering::Relaxed);
                let get = |store: &Store<Cpu>, i| store.get(i, &Cpu::default()).unwrap().to_vec();
                // Again, in place: neither memory nor scratch space grows.
                for round in [0.5, 0.25] {
                    for i in 0..5 {
                        store.put(i, matrix(vec![i as f32, round], (1, 2))).unwrap();
                    }
                    assert_eq!(store.scratch.is_some(), memory < 5 * size);
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
    fn scratch_space_takes_no_memory() {
        let storage = storage(Dtype::Bf16, 100);
        let mut store: Store<Cpu> = storage.in_scratch().store(1);
        store.put(0, matrix(vec![0.5, 3.0], (1, 2))).unwrap();
        assert_eq!((store.held, storage.left.load(Ordering::Relaxed)), (0, 100));
        assert_eq!(store.get(0, &Cpu::default()).unwrap().to_vec(), [0.5, 3.0]);
        // Where there is none, there is memory.
        let mut store: Store<Cpu> = Storage::default().in_scratch().store(1);
        store.put(0, matrix(vec![0.5, 3.0], (1, 2))).unwrap();
        assert_eq!(store.held, 8);
    }

    #[test]
    fn what_does_not_fit_the_format_is_refused() {
        let storage = storage(Dtype::F16, 100);
        let mut store = storage.store(1);
        assert!(matches!(store.put(0, matrix(vec![1e6], (1, 1))), Err(Error::Overflow { .. })));
        assert!(storage.fits(24) && !storage.fits(26));
    }
}
