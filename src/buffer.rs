//! The CPU's memory for matrices, used again and again: every layer needs the same sizes, and fresh
//! pages and zeros for each result of each operation would cost a tenth of the time.

use std::{
    collections::{HashMap, VecDeque},
    ops::{Deref, DerefMut},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

/// Bytes that wait at most. What is beyond them is freed, and may come back in other sizes.
pub(crate) const MOST: usize = 96 << 20;

/// What waits, by length; the last ones came last.
#[derive(Default)]
struct Waiting {
    buffers: HashMap<usize, VecDeque<(u64, Vec<f32>)>>,
    bytes: usize,
    /// How many came so far.
    came: u64,
}

impl Waiting {
    fn take(&mut self, length: usize) -> Option<Vec<f32>> {
        let (_, buffer) = self.buffers.get_mut(&length)?.pop_back()?;
        self.bytes -= size(length);
        Some(buffer)
    }

    /// Adds a buffer; returns those for which there is no room any more, the ones that came first.
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

/// Lets the process keep the memory that it frees, as far as the C library can: it is soon asked
/// for again, and the operating system would hand it out page by page, and clear each.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[allow(unsafe_code, reason = "the C library's interface")]
        // SAFETY: the calls change how the allocator deals with large memory, and need nothing.
        unsafe {
            // No memory is mapped for itself, to go back when it is freed; and the heap is not cut.
            // Where a call fails, all works as before.
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        }
    }
}

/// A vector of `length` numbers without a meaning: what was in it last, or zeros.
pub(crate) fn stale(length: usize) -> Vec<f32> {
    let found = waiting().take(length);
    found.unwrap_or_else(|| vec![0.0; length])
}

/// So many zeros.
pub(crate) fn zeros(length: usize) -> Vec<f32> {
    let mut zeros = stale(length);
    zeros.fill(0.0);
    zeros
}

/// A copy of some numbers.
pub(crate) fn copy(values: &[f32]) -> Vec<f32> {
    let mut copy = stale(values.len());
    copy.copy_from_slice(values);
    copy
}

/// Gives a vector back.
pub(crate) fn recycle(values: Vec<f32>) {
    let length = values.len();
    // One that is larger than all that may wait would only drive out the others.
    if length > 0 && values.capacity() == length && size(length) <= MOST {
        let gone = waiting().add(values);
        // Freed while nobody waits for the lock.
        drop(gone);
    }
}

fn size(length: usize) -> usize {
    length * size_of::<f32>()
}

/// Numbers that go back to where they came from when nobody needs them any more.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self(values)
    }
}

impl Buffer {
    /// The numbers, which go nowhere.
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
