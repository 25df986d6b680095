//! Number and lengths of calibration samples.

use serde::{Deserialize, Serialize};

/// Number and lengths of calibration samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Number of samples for statistics.
    pub samples: usize,
    /// Number of held-out samples.
    pub held_out: usize,
    /// Number of tokens of the shortest sample.
    pub shortest: usize,
    /// Number of tokens of the longest sample.
    pub longest: usize,
    /// Number of tokens of all samples together.
    pub tokens: usize,
}

impl Extent {
    /// The extent of samples with these lengths; the last `held_out` are held out.
    pub(super) fn of(
        lengths: impl ExactSizeIterator<Item = usize> + Clone,
        held_out: usize,
    ) -> Self {
        let held_out = held_out.min(lengths.len());
        Self {
            samples: lengths.len() - held_out,
            held_out,
            shortest: lengths.clone().min().unwrap_or(0),
            longest: lengths.clone().max().unwrap_or(0),
            tokens: lengths.sum(),
        }
    }

    /// The extent of samples of the same length, of which so many are held out.
    pub fn of_equal(samples: usize, held_out: usize, length: usize) -> Self {
        Self::of((0..samples + held_out).map(|_| length), held_out)
    }

    /// Numbers of tokens of the samples for statistics and of the held-out ones, for samples of
    /// similar lengths.
    pub fn parts(&self) -> [f64; 2] {
        let all = (self.samples + self.held_out).max(1) as f64;
        [self.samples, self.held_out].map(|count| self.tokens as f64 * count as f64 / all)
    }

    /// The extent of samples; the last `held_out` are held out.
    pub fn of_samples(samples: &[Vec<u32>], held_out: usize) -> Self {
        Self::of(samples.iter().map(Vec::len), held_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_samples_are_counted_apart() {
        let found = Extent::of([3, 9, 5].into_iter(), 1);
        let expected = Extent { samples: 2, held_out: 1, shortest: 3, longest: 9, tokens: 17 };
        assert_eq!(found, expected);
        assert_eq!(Extent::of_samples(&[], 4), Extent::default());
    }
}
