//! Weights and Gram matrices for the tests of initial masks.

use crate::random::SplitMix64;

/// Random numbers from -1 to 1.
pub(super) fn noise(length: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64::new(seed);
    (0..length).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect()
}

/// The Gram matrix of `tokens` random inputs that hang together.
pub(super) fn gram(columns: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let mut x = noise(tokens * columns, seed);
    for row in x.chunks_mut(columns) {
        (1..columns).for_each(|j| row[j] += 0.8 * row[j - 1]);
    }
    let product = |i: usize, j: usize| x.chunks(columns).map(|x| x[i] * x[j]).sum();
    (0..columns.pow(2)).map(|k| product(k / columns, k % columns)).collect()
}
