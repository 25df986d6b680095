//! What ranks do and send of the work that they share, counted beforehand.

use std::ops::AddAssign;

use super::Chunks;

/// Bytes per number.
const SIZE: f64 = size_of::<f32>() as f64;

/// Work on some runs of samples that ranks share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Number of ranks.
    pub ranks: usize,
    /// Number of runs.
    pub runs: usize,
}

/// Bytes that are sent to other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sent {
    /// Those of the first rank, which sends as many as any other.
    pub first: f64,
    /// Those of all ranks.
    pub all: f64,
}

impl AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.first += other.first;
        self.all += other.all;
    }
}

impl Sent {
    /// What is sent if each rank has a part of so many bytes, and all get the whole.
    pub fn gathered(bytes: f64, ranks: usize) -> Self {
        let all = bytes * (ranks as f64 - 1.0);
        Self { first: all / ranks as f64, all }
    }

    /// The bytes of so many times the same.
    #[must_use]
    pub fn times(self, count: f64) -> Self {
        Self { first: count * self.first, all: count * self.all }
    }
}

impl Split {
    fn chunks(self) -> usize {
        self.runs.div_ceil(Chunks::each(self.runs))
    }

    /// The fraction of the runs that the first rank takes; no rank takes more.
    pub fn fraction(self) -> f64 {
        if self.runs == 0 {
            return 1.0;
        }
        Chunks::of_first(self.runs, self.ranks).own().count() as f64 / self.runs as f64
    }

    /// Number of ranks that have something to do.
    pub fn busy(self) -> usize {
        self.ranks.min(self.chunks())
    }

    /// What is sent for sums over all runs, which have so many numbers and which all ranks get: a chunk
    /// goes to the ranks that add a share of it, and each of these sends its share of the sums to all.
    pub fn sums(self, numbers: f64) -> Sent {
        let mut sent = self.shares(numbers);
        sent += Sent::gathered(SIZE * numbers, self.ranks);
        sent
    }

    /// What is sent for sums of which each rank gets its own share alone.
    pub fn shares(self, numbers: f64) -> Sent {
        let (ranks, chunks) = (self.ranks as f64, self.chunks() as f64);
        let to_others = SIZE * numbers * (ranks - 1.0) / ranks;
        Sent { first: to_others * (chunks / ranks).ceil(), all: to_others * chunks }
    }

    /// What is sent if all ranks get the numbers that each has of its runs.
    pub fn copies(self, numbers: f64) -> Sent {
        let to_others = SIZE * numbers * (self.ranks as f64 - 1.0);
        Sent { first: to_others * self.fraction(), all: to_others }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::ranks::{Ranks, Sums, threads};

    #[test]
    fn more_ranks_than_chunks_are_idle() {
        let of = |ranks, runs| {
            let split = Split { ranks, runs };
            (split.fraction(), split.busy())
        };
        assert_eq!(of(1, 40), (1.0, 1));
        assert_eq!(of(8, 128), (1.0 / 8.0, 8));
        assert_eq!(of(64, 128), (1.0 / 16.0, 16));
        // The runs are in 14 chunks of three, but for the last.
        assert_eq!(of(16, 40), (3.0 / 40.0, 14));
        assert_eq!(of(64, 1), (1.0, 1));
        assert_eq!(of(64, 0), (1.0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// What is counted is what ranks send, but for the names of sums.
        #[test]
        fn sums_send_what_is_counted(
            runs in 1..40_usize,
            ranks in 2..6_usize,
            whole in any::<bool>(),
        ) {
            let (numbers, split) = (50_000, Split { ranks, runs });
            let sent = threads::run(ranks, |ranks: Ranks| {
                let mut sums = Sums::new(&ranks);
                for turn in Chunks::new(runs, runs, &ranks).turns(0..runs) {
                    let chunk = (!turn.runs.is_empty()).then(|| ((), vec![1.0; numbers]));
                    sums.add(chunk.into_iter().collect::<BTreeMap<(), Vec<f32>>>());
                }
                let expected = if whole { numbers } else { numbers / ranks.size() };
                let found = if whole { sums.finish() } else { sums.own() };
                assert!(found[&()].len().abs_diff(expected) <= 1);
                ranks.sent() as f64
            });
            let count = if whole { Split::sums } else { Split::shares };
            let expected = count(split, numbers as f64);
            let near = |one: f64, other: f64| (one / other - 1.0).abs() < 0.01;
            prop_assert!(near(sent[0], expected.first), "{sent:?} {expected:?}");
            prop_assert!(near(sent.iter().sum(), expected.all), "{sent:?} {expected:?}");
        }
    }
}
