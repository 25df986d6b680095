//! Sums over chunks of samples, with a share of each on every rank.

use std::{collections::BTreeMap, ops::Range};

use rayon::prelude::*;
use serde::{Serialize, de::DeserializeOwned};

use super::Ranks;
use crate::buffer::recycle;

/// Sums of vectors by their names. A rank adds the numbers of its own share of each, in the chunks'
/// order; it holds the vectors of one chunk beside them.
#[derive(Debug)]
pub(crate) struct Sums<K> {
    ranks: Ranks,
    /// Number of numbers that are not shared out, such as those of a row.
    unit: usize,
    /// The length of each vector, and the sums of this rank's share.
    shares: BTreeMap<K, (usize, Vec<f32>)>,
}

/// The share of one rank of `size` ranks of `length` numbers.
pub(crate) fn share(length: usize, rank: usize, size: usize) -> Range<usize> {
    let end = |rank: usize| (length as u128 * rank as u128 / size as u128) as usize;
    end(rank)..end(rank + 1)
}

/// Adds vectors of the same length.
pub(crate) fn add(sum: &mut [f32], other: &[f32]) {
    const PIECE: usize = 1 << 14;
    let pieces = sum.par_chunks_mut(PIECE).zip(other.par_chunks(PIECE));
    pieces.for_each(|(sum, other)| sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x));
}

impl<K: Clone + Ord + Serialize + DeserializeOwned> Sums<K> {
    pub(crate) fn new(ranks: &Ranks) -> Self {
        Self::of_rows(ranks, 1)
    }

    /// Sums of matrices with so many columns: a rank's share is its [own rows](Ranks::own_rows).
    pub(crate) fn of_rows(ranks: &Ranks, columns: usize) -> Self {
        Self { ranks: ranks.clone(), unit: columns.max(1), shares: BTreeMap::new() }
    }

    /// The ranks that share the sums.
    pub(crate) fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Ends a turn, with the vectors of this rank's chunk. A chunk need not have all vectors.
    pub(crate) fn add(&mut self, mut chunk: BTreeMap<K, Vec<f32>>) {
        let Self { ranks, unit, shares } = self;
        let (rank, size) = (ranks.rank(), ranks.size());
        let share = |length: usize, rank| share(length / *unit, rank, size).len() * *unit;
        if size == 1 {
            for (name, vector) in chunk {
                match shares.get_mut(&name) {
                    Some((_, sum)) => {
                        add(sum, &vector);
                        recycle(vector);
                    }
                    None => drop(shares.insert(name, (vector.len(), vector))),
                }
            }
            return;
        }
        let own: Vec<(K, usize)> =
            chunk.iter().map(|(name, of)| (name.clone(), of.len())).collect();
        let mut lengths: BTreeMap<K, Vec<usize>> = BTreeMap::new();
        for (rank, found) in ranks.gather_values(own).into_iter().enumerate() {
            for (name, length) in found {
                lengths.entry(name).or_insert_with(|| vec![0; size])[rank] = length;
            }
        }
        for (name, lengths) in lengths {
            let vector = chunk.remove(&name).unwrap_or_default();
            let outgoing: Vec<usize> = (0..size).map(|rank| share(vector.len(), rank)).collect();
            let incoming: Vec<usize> = lengths.iter().map(|length| share(*length, rank)).collect();
            let found = ranks.exchange(&vector, &outgoing, &incoming);
            recycle(vector);
            let length = lengths.iter().copied().max().unwrap_or(0);
            let mut rest = &found[..];
            for count in incoming.into_iter().filter(|count| *count > 0) {
                let (own, others) = rest.split_at(count);
                match shares.get_mut(&name) {
                    Some((_, sum)) => add(sum, own),
                    None => drop(shares.insert(name.clone(), (length, own.to_vec()))),
                }
                rest = others;
            }
            shares.entry(name).or_insert_with(|| (length, Vec::new()));
        }
    }

    /// This rank's share of the sums.
    pub(crate) fn own(self) -> BTreeMap<K, Vec<f32>> {
        self.shares.into_iter().map(|(name, (_, own))| (name, own)).collect()
    }

    /// The whole sums.
    pub(crate) fn finish(self) -> BTreeMap<K, Vec<f32>> {
        let Self { ranks, unit, shares } = self;
        let size = ranks.size();
        let whole = |(name, (length, own)): (K, (usize, Vec<f32>))| {
            let counts: Vec<usize> =
                (0..size).map(|rank| share(length / unit, rank, size).len() * unit).collect();
            (name, if size == 1 { own } else { ranks.share_all(&own, &counts) })
        };
        shares.into_iter().map(whole).collect()
    }
}

impl Ranks {
    /// The numbers of all ranks, in the ranks' order, of which each has so many.
    pub(crate) fn share_all(&self, own: &[f32], counts: &[usize]) -> Vec<f32> {
        self.exchange(&own.repeat(self.size()), &vec![own.len(); self.size()], counts)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::ranks::{Chunks, threads};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Any number of ranks adds the chunks in one order, and counts what it sends.
        #[test]
        fn ranks_agree_on_every_bit(
            values in vec(vec(-1e6..1e6_f32, 7), 1..40),
            missing in 0..40_usize,
        ) {
            let sums = |ranks: &Ranks| {
                let (runs, mut sums) = (values.len(), Sums::new(ranks));
                for turn in Chunks::new(runs, runs, ranks).turns(0..runs) {
                    let mut chunk: BTreeMap<String, Vec<f32>> = BTreeMap::new();
                    for run in turn.runs {
                        for name in ["all", "some"] {
                            if name == "all" || run != missing {
                                let sum = chunk.entry(name.into()).or_insert_with(|| vec![0.0; 7]);
                                add(sum, &values[run]);
                            }
                        }
                    }
                    sums.add(chunk);
                }
                sums.finish()
            };
            let one = sums(&Ranks::ONE);
            for size in 2..5 {
                for found in threads::run(size, |ranks| sums(&ranks)) {
                    prop_assert_eq!(&found, &one);
                }
                // A rank's share of a matrix is of whole rows.
                let shares = threads::run(size, |ranks| {
                    let mut sums = Sums::of_rows(&ranks, 3);
                    let matrix = (0..12).map(|i| (i * (ranks.rank() + 1)) as f32).collect();
                    sums.add([((), matrix)].into());
                    let own = sums.own().remove(&()).unwrap();
                    assert_eq!(own.len(), 3 * ranks.own_rows(4, 1).len());
                    own
                });
                let factor = size * (size + 1) / 2;
                let expected: Vec<f32> = (0..12).map(|i| (i * factor) as f32).collect();
                prop_assert_eq!(shares.concat(), expected);
            }
        }
    }
}
