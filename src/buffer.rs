//! The CPU's memory for matrices, used again and again: every layer needs the same sizes, and fresh
//! pages and zeros for each result of each operation would cost a tenth of the time.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{LazyLock, Mutex, PoisonError},
};

/// Bytes that wait at most. Larger models need larger buffers than this, but do so much more with
/// each number that fresh ones cost little.
pub(crate) const MOST: usize = 160 << 20;

/// What waits, by length.
#[derive(Default)]
struct Waiting {
    buffers: HashMap<usize, Vec<Vec<f32>>>,
    bytes: usize,
}

static WAITING: LazyLock<Mutex<Waiting>> = LazyLock::new(Mutex::default);

/// A vector of `length` numbers without a meaning: what was in it last, or zeros.
pub(crate) fn stale(length: usize) -> Vec<f32> {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    let found = waiting.buffers.get_mut(&length).and_then(Vec::pop);
    if found.is_some() {
        waiting.bytes -= size(length);
    }
    drop(waiting);
    found.unwrap_or_else(|| vec![0.0; length])
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
    if length == 0 || values.capacity() != length {
        return;
    }
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    let alike = waiting.buffers.get(&length).map_or(0, Vec::len);
    // No length takes all: then all the others would be missed.
    if waiting.bytes + size(length) <= MOST && (alike + 1) * size(length) <= MOST / 4 * 3 {
        waiting.bytes += size(length);
        waiting.buffers.entry(length).or_default().push(values);
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
}
