//! A pool of the CPU's memory for matrices. Every layer needs the same sizes; allocating and
//! clearing fresh pages for each result would take a tenth of the time.

use std::{
    collections::{HashMap, VecDeque},
    ops::{Deref, DerefMut},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

/// Maximum number of bytes in the pool; what exceeds it is freed.
pub(crate) const MOST: usize = 96 << 20;

/// Pooled vectors by length, the latest last.
#[derive(Default)]
struct Waiting {
    buffers: HashMap<usize, VecDeque<(u64, Vec<f32>)>>,
    bytes: usize,
    /// Number of vectors added so far.
    came: u64,
}

impl Waiting {
    fn take(&mut self, length: usize) -> Option<Vec<f32>> {
        let (_, buffer) = self.buffers.get_mut(&length)?.pop_back()?;
        self.bytes -= size(length);
        Some(buffer)
    }

    /// Adds a vector; returns the oldest ones that the pool has no room for.
    fn add(&mut self, buffer: Vec<f32>) -> Vec<Vec<f32>> {
        self.bytes += size(buffer.len());
        self.came += 1;
        self.buffers.entry(buffer.len()).or_default().push_back((self.came, buffer));
        let mut gone = Vec::new();
        while self.bytes > MOST {
            let first = |alike: &&mut VecDeque<(u64, Vec<f32>)>| {
                alike.front().map_or(u64::MAX, |(came, _)| *came)
            };
            let oldest = self.buffers.values_mut().min_by_key(first);
            let Some((_, buffer)) = oldest.and_then(VecDeque::pop_front) else { break };
            self.bytes -= size(buffer.len());
            gone.push(buffer);
        }
        gone
    }
}

static WAITING: LazyLock<Mutex<Waiting>> = LazyLock::new(Mutex::default);

fn waiting() -> MutexGuard<'static, Waiting> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the C library keep the memory that the process frees. The process needs it again soon, and
/// the operating system would map and clear it page by page.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[allow(unsafe_code, reason = "the C library's interface")]
        // SAFETY: the calls set parameters of the allocator and have no preconditions.
        unsafe {
            // Do not map large blocks on their own, and do not shrink the heap. If a call fails,
            // the default remains.
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        }
    }
}

/// A vector of `length` numbers with arbitrary contents.
pub(crate) fn stale(length: usize) -> Vec<f32> {
    let found = waiting().take(length);
    found.unwrap_or_else(|| vec![0.0; length])
}

/// A vector of zeros.
pub(crate) fn zeros(length: usize) -> Vec<f32> {
    let mut zeros = stale(length);
    zeros.fill(0.0);
    zeros
}

/// A copy of a slice.
pub(crate) fn copy(values: &[f32]) -> Vec<f32> {
    let mut copy = stale(values.len());
    copy.copy_from_slice(values);
    copy
}

/// Returns a vector to the pool.
pub(crate) fn recycle(values: Vec<f32>) {
    let length = values.len();
    // A vector larger than the pool would only drive out all others.
    if length > 0 && values.capacity() == length && size(length) <= MOST {
        let gone = waiting().add(values);
        // Free outside the lock.
        drop(gone);
    }
}

fn size(length: usize) -> usize {
    length * size_of::<f32>()
}

/// A vector that returns to the pool when it is dropped.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self(values)
    }
}

impl Buffer {
    /// The numbers, without returning them to the pool.
    pub(crate) fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.0)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self(copy(&self.0))
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        recycle(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        // A length that no other test has.
        const LENGTH: usize = 7919;
        let first = Buffer::from(vec![1.0; LENGTH]);
        let place = first.as_ptr();
        let copy = first.clone();
        assert!(copy.as_ptr() != place && copy[..] == first[..]);
        drop(first);
        let again = stale(LENGTH);
        assert_eq!((again.as_ptr(), again.len()), (place, LENGTH));
        assert_eq!(stale(LENGTH), vec![0.0; LENGTH]);
    }

    #[test]
    fn those_that_came_first_make_room() {
        let mut waiting = Waiting::default();
        let quarter = MOST / 4 / size_of::<f32>();
        let lengths = |buffers: Vec<Vec<f32>>| buffers.iter().map(Vec::len).collect::<Vec<_>>();
        for length in [quarter, quarter + 1, quarter - 1] {
            assert!(waiting.add(vec![0.0; length]).is_empty());
        }
        assert_eq!(lengths(waiting.add(vec![0.0; quarter + 1])), [quarter]);
        assert!(waiting.take(quarter).is_none() && waiting.take(quarter - 1).is_some());
        assert_eq!(waiting.bytes, 2 * size(quarter + 1));
        assert_eq!(lengths(waiting.add(vec![0.0; 4 * quarter])), [quarter + 1; 2]);
    }
}
