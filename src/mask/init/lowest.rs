//! Pruning the lowest scores of each pool.

use barber_metric::Dims;
use rayon::prelude::*;

use crate::mask::{
    Mask,
    order::{Lowest, key},
};

/// Pools smaller than this are pruned several per task.
const BATCH: usize = 1 << 14;

/// Which of equal scores are pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ties {
    First,
    Last,
}

/// The mask that prunes the lowest scores of every `pool` consecutive ones; `count` gives their
/// number by the pool's index.
pub(super) fn prune_lowest(
    dims: Dims,
    scores: &[f32],
    pool: usize,
    count: impl Fn(usize) -> usize + Sync,
    ties: Ties,
) -> Mask {
    let pool = pool.max(1);
    let mut kept = vec![true; scores.len()];
    let pools = scores.par_chunks(pool).zip(kept.par_chunks_mut(pool));
    let pools = pools.enumerate().with_min_len(BATCH.div_ceil(pool));
    pools.for_each_init(Vec::new, |keys, (i, (scores, kept))| {
        keys.clear();
        keys.extend(scores.iter().map(|&score| key(score)));
        let mut lowest = Lowest::of(keys, count(i));
        let prune = |(kept, &score): (&mut bool, &f32)| *kept = !lowest.takes(key(score));
        let scores = kept.iter_mut().zip(scores);
        match ties {
            Ties::First => scores.for_each(prune),
            Ties::Last => scores.rev().for_each(prune),
        }
    });
    Mask::from_bools(dims, &kept)
}
