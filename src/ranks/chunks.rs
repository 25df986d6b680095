//! Chunks of consecutive runs of samples: what is summed in one go, and by which rank.

use std::ops::Range;

use super::Ranks;

/// Maximum number of chunks of the calibration samples. More ranks than chunks have nothing to do;
/// each chunk costs an addition of all sums.
pub(crate) const MOST: usize = 16;

/// The chunks of a list of runs, those of calibration samples first. Ranks take them in turn.
#[derive(Clone, Debug)]
pub(crate) struct Chunks {
    calibration: usize,
    runs: usize,
    rank: usize,
    size: usize,
}

/// A turn of all ranks, each of which takes a chunk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turn {
    /// The runs of this rank, none if there is no chunk left for it.
    pub(crate) runs: Range<usize>,
    /// Whether they are of calibration samples, over which statistics are summed.
    pub(crate) sums: bool,
}

impl Chunks {
    /// The chunks of this number of runs, the first of which are of calibration samples.
    pub(crate) fn new(calibration: usize, runs: usize, ranks: &Ranks) -> Self {
        Self { calibration, runs, rank: ranks.rank(), size: ranks.size() }
    }

    /// The chunks of so many runs of calibration samples, as the first of some ranks has them.
    pub(super) fn of_first(runs: usize, size: usize) -> Self {
        Self { calibration: runs, runs, rank: 0, size }
    }

    /// Number of runs in a chunk of so many.
    pub(super) fn each(runs: usize) -> usize {
        runs.div_ceil(MOST).max(1)
    }

    /// The rank that takes a run.
    pub(crate) fn rank_of(&self, run: usize) -> usize {
        let each = Self::each(self.calibration);
        let chunk = match run.checked_sub(self.calibration) {
            None => run / each,
            // The ranks that had no chunk in the last turn are the first.
            Some(held_out) => {
                let each_held_out = Self::each(self.runs - self.calibration);
                self.calibration.div_ceil(each) + held_out / each_held_out
            }
        };
        chunk % self.size
    }

    /// Whether this rank takes a run.
    pub(crate) fn has(&self, run: usize) -> bool {
        self.rank_of(run) == self.rank
    }

    /// The runs of this rank.
    pub(crate) fn own(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.runs).filter(|run| self.has(*run))
    }

    /// The turns in which the ranks go through some runs.
    pub(crate) fn turns(&self, among: Range<usize>) -> Vec<Turn> {
        let within = |runs: Range<usize>| {
            let start = runs.start.max(among.start);
            start..runs.end.min(among.end).max(start)
        };
        let mut turns = Vec::new();
        let (each, end) = (Self::each(self.calibration), self.calibration);
        for first in (0..end).step_by(each * self.size) {
            if within(first..(first + each * self.size).min(end)).is_empty() {
                continue;
            }
            let own = (first + self.rank * each).min(end);
            turns.push(Turn { runs: within(own..(own + each).min(end)), sums: true });
        }
        let held_out = self.calibration.max(among.start)..self.runs.min(among.end);
        let own = held_out.filter(|run| self.has(*run));
        turns.extend(own.map(|run| Turn { runs: run..run + 1, sums: false }));
        turns
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Each run is one rank's, and is summed in the order of the chunks.
        #[test]
        fn each_run_is_taken_once(
            calibration in 0..60_usize,
            held_out in 0..20_usize,
            size in 1..6_usize,
            cut in 0..80_usize,
        ) {
            let runs = calibration + held_out;
            let of = |rank| Chunks { calibration, runs, rank, size };
            for among in [0..runs, cut.min(runs)..runs, 0..cut.min(runs)] {
                let turns: Vec<Vec<Turn>> = (0..size).map(|rank| of(rank).turns(among.clone())).collect();
                let sums = |rank: usize| turns[rank].iter().filter(|turn| turn.sums).count();
                prop_assert!((0..size).all(|rank| sums(rank) == sums(0)));
                let in_turn = (0..sums(0)).flat_map(|turn| turns.iter().map(move |of| &of[turn]));
                let mut found: Vec<usize> = in_turn.flat_map(|turn| turn.runs.clone()).collect();
                let mut others = Vec::new();
                for (rank, turns) in turns.iter().enumerate() {
                    for turn in turns {
                        prop_assert!(turn.runs.clone().all(|run| of(rank).has(run)));
                        others.extend(turn.runs.clone().filter(|_| !turn.sums));
                    }
                }
                others.sort_unstable();
                found.extend(others);
                prop_assert_eq!(found, among.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn chunks_do_not_depend_on_the_number_of_ranks() {
        let of = |size| Chunks { calibration: 40, runs: 40, rank: 0, size };
        let ends = |size: usize| -> Vec<usize> {
            let turns = of(size).turns(0..40).into_iter();
            turns.map(|turn| turn.runs.start).collect()
        };
        assert_eq!(ends(1).len(), 14);
        assert_eq!(ends(2), ends(1).into_iter().step_by(2).collect::<Vec<_>>());
    }
}
