//! Pruning the lowest scores of each pool.

use barber_metric::Dims;
use rayon::prelude::*;

use crate::mask::{
    Mask,
    order::{Lowest, key},
};

/// Pruning pools smaller than this together is faster than one by one.
const BATCH: usize = 1 << 14;

/// The mask that prunes the `count` lowest of every `pool` consecutive scores, the last among
/// equals.
pub(super) fn prune_lowest(dims: Dims, scores: &[f32], pool: usize, count: usize) -> Mask {
    let pool = pool.max(1);
    let mut kept = vec![true; scores.len()];
    let pools = scores.par_chunks(pool).zip(kept.par_chunks_mut(pool));
    pools.with_min_len(BATCH.div_ceil(pool)).for_each_init(Vec::new, |keys, (scores, kept)| {
        keys.clear();
        keys.extend(scores.iter().map(|&score| key(score)));
        let mut lowest = Lowest::of(keys, count);
        for (kept, &score) in kept.iter_mut().zip(scores).rev() {
            *kept = !lowest.takes(key(score));
        }
    });
    Mask::from_bools(dims, &kept)
}
