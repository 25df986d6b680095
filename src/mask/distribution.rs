//! The distribution of scores of kept, pruned and swapped weights.

use std::iter::zip;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Mask;

/// A histogram of scores in bins of half an octave. All histograms have the same bins, so they can
/// be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Number of scores that are zero, negative or subnormal.
    pub zero: u64,
    /// The first bin that is not empty: bin *i* has the scores from 2^(*i*/2) to 2^((*i* + 1)/2).
    pub first: i32,
    /// Number of scores in each bin, from the first to the last that is not empty.
    pub counts: Vec<u64>,
}

/// The bin of a score; `None` if it is not a normal positive number.
fn bin(score: f32) -> Option<i32> {
    /// The mask of the mantissa's bits, and the mantissa of √2.
    const MANTISSA: u32 = (1 << 23) - 1;
    const HALF: u32 = std::f32::consts::SQRT_2.to_bits() & MANTISSA;
    if score.is_nan() || score < f32::MIN_POSITIVE {
        return None;
    }
    let bits = score.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    Some(2 * exponent + i32::from(bits & MANTISSA >= HALF))
}

/// The bin of the smallest normal number, and the number of places up to infinity.
const LOWEST: i32 = 2 * -126;
const BINS: usize = (2 * 128 - LOWEST + 2) as usize;

/// The index of a score's bin among all bins; index 0 is for scores without a bin.
#[inline]
fn place(score: f32) -> usize {
    bin(score).map_or(0, |bin| (bin - LOWEST + 1) as usize)
}

impl Histogram {
    /// Number of scores.
    pub fn len(&self) -> u64 {
        self.zero + self.counts.iter().sum::<u64>()
    }

    /// Whether there are no scores.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds the scores of another histogram.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        for (bin, &count) in zip(other.first.., &other.counts) {
            self.count(bin, count);
        }
    }

    /// The base-2 logarithm of the score below which a fraction of the scores lies, interpolated
    /// within its bin; `None` if that score is zero, or there are no scores.
    ///
    /// ```
    /// let histogram = llm_barber::mask::Histogram { zero: 0, first: 2, counts: vec![1, 1] };
    /// assert_eq!(histogram.quantile(0.5), Some(1.5));
    /// ```
    pub fn quantile(&self, fraction: f64) -> Option<f64> {
        let mut left = fraction * self.len() as f64 - self.zero as f64;
        if left <= 0.0 {
            return None;
        }
        for (bin, &count) in zip(self.first.., &self.counts) {
            let count = count as f64;
            if count > 0.0 && left <= count {
                return Some((f64::from(bin) + left / count) / 2.0);
            }
            left -= count;
        }
        None
    }

    fn count(&mut self, bin: i32, more: u64) {
        if more == 0 {
            return;
        }
        if self.counts.is_empty() {
            self.first = bin;
        }
        if bin < self.first {
            let missing = (self.first - bin) as usize;
            self.counts.splice(0..0, vec![0; missing]);
            self.first = bin;
        }
        let place = (bin - self.first) as usize;
        if place >= self.counts.len() {
            self.counts.resize(place + 1, 0);
        }
        self.counts[place] += more;
    }

    /// Adds `counts` scores to the bin of each [`place`].
    fn add_places(&mut self, counts: &[u64; BINS]) {
        self.zero += counts[0];
        zip(LOWEST.., &counts[1..]).for_each(|(bin, count)| self.count(bin, *count));
    }
}

/// The scores of weights, by what a stage did to the weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// Name of the scores.
    pub measure: String,
    /// Scores of weights that stayed kept.
    pub kept: Histogram,
    /// Scores of pruned weights that were kept again.
    pub came_back: Histogram,
    /// Scores of kept weights that were pruned.
    pub went: Histogram,
    /// Scores of weights that stayed pruned.
    pub pruned: Histogram,
}

impl Distribution {
    /// An empty distribution of scores named `measure`.
    pub fn new(measure: impl Into<String>) -> Self {
        Self { measure: measure.into(), ..Self::default() }
    }

    /// Adds the scores of a matrix with the masks `before` and `after`; `score` gives the score of
    /// a weight by its row-major index.
    pub fn matrix(&mut self, before: &Mask, after: &Mask, score: impl Fn(usize) -> f32 + Sync) {
        /// Number of weights that a thread takes at a time.
        const RUN: usize = 1 << 16;
        let weights = after.dims().len();
        let run = |mut found: Self, run: usize| {
            // No branch on a weight's fate, as it would be unpredictable. Two alternating counts,
            // as consecutive weights often have the same place, and a sum must not wait for the
            // last.
            let mut counts = [[[0; BINS]; 2]; 4];
            before.each(run * RUN..weights.min((run + 1) * RUN), |i, kept| {
                let of = 2 * usize::from(kept) + usize::from(after.get(i));
                counts[of][i % 2][place(score(i))] += 1;
            });
            let counts = counts.map(|[even, odd]| std::array::from_fn(|i| even[i] + odd[i]));
            let all = [&mut found.pruned, &mut found.came_back, &mut found.went, &mut found.kept];
            zip(all, &counts).for_each(|(histogram, counts)| histogram.add_places(counts));
            found
        };
        let add = |mut one: Self, other: Self| {
            one.add(&other);
            one
        };
        let runs = (0..weights.div_ceil(RUN)).into_par_iter();
        let found = runs.fold(Self::default, run).reduce(Self::default, add);
        self.add(&found);
    }

    /// Adds another distribution.
    pub fn add(&mut self, other: &Self) {
        self.kept.add(&other.kept);
        self.came_back.add(&other.came_back);
        self.went.add(&other.went);
        self.pruned.add(&other.pruned);
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn bins_are_half_octaves() {
        let root = std::f32::consts::SQRT_2;
        for (score, expected) in [
            (1.0, Some(0)),
            (1.41, Some(0)),
            (root, Some(1)),
            (1.99, Some(1)),
            (2.0, Some(2)),
            (0.5, Some(-2)),
            (0.999, Some(-1)),
            (f32::MIN_POSITIVE, Some(-252)),
            (f32::INFINITY, Some(256)),
            (f32::MIN_POSITIVE / 2.0, None),
            (0.0, None),
            (-1.0, None),
            (f32::NAN, None),
        ] {
            assert_eq!(bin(score), expected, "{score}");
        }
    }

    #[test]
    fn quantiles_are_of_all_scores() {
        let histogram = Histogram { zero: 2, first: 4, counts: vec![0, 2] };
        assert_eq!(histogram.quantile(0.25), None);
        assert_eq!(histogram.quantile(0.75), Some(2.75));
        assert_eq!(histogram.quantile(1.0), Some(3.0));
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    proptest! {
        #[test]
        fn every_weight_is_counted_where_it_belongs(
            weights in vec((-1e3..1e3_f32, any::<bool>(), any::<bool>()), 0..200),
            cut in 0..200_usize,
        ) {
            let mask = |kept: fn(&(f32, bool, bool)) -> bool, of: &[(f32, bool, bool)]| {
                Mask::from_fn(Dims { rows: 1, columns: of.len() }, |i| kept(&of[i]))
            };
            let scores = |of: &[(f32, bool, bool)]| {
                let mut found = Distribution::default();
                found.matrix(&mask(|w| w.1, of), &mask(|w| w.2, of), |i| of[i].0);
                found
            };
            let all = scores(&weights);
            // In two parts, the same.
            let (one, other) = weights.split_at(cut.min(weights.len()));
            let mut both = scores(one);
            both.add(&scores(other));
            prop_assert_eq!(&all, &both);
            for (histogram, was, is) in [
                (&all.kept, true, true),
                (&all.came_back, false, true),
                (&all.went, true, false),
                (&all.pruned, false, false),
            ] {
                let of = || weights.iter().filter(|weight| (weight.1, weight.2) == (was, is));
                prop_assert_eq!(histogram.len(), of().count() as u64);
                prop_assert_eq!(histogram.zero, of().filter(|weight| bin(weight.0).is_none()).count() as u64);
                prop_assert_ne!(histogram.counts.first(), Some(&0));
                prop_assert_ne!(histogram.counts.last(), Some(&0));
            }
        }
    }
}
