//! How the scores of weights are distributed, by what became of the weights.

use std::iter::zip;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Mask;

/// Distribution by their sizes, in bins of half an octave. Histograms of several matrices can be added:
/// all have the same bins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many scores are zero, or less, or too small to be normal numbers.
    pub zero: u64,
    /// The first bin that holds any: bin *i* has the scores from 2^(*i*/2) to 2^((*i* + 1)/2).
    pub first: i32,
    /// How many scores are in each bin from the first on, to the last that holds any.
    pub counts: Vec<u64>,
}

/// The bin of a score; none if it is no normal positive number.
fn bin(score: f32) -> Option<i32> {
    /// The bits of a mantissa, and those of √2.
    const MANTISSA: u32 = (1 << 23) - 1;
    const HALF: u32 = std::f32::consts::SQRT_2.to_bits() & MANTISSA;
    if score.is_nan() || score < f32::MIN_POSITIVE {
        return None;
    }
    let bits = score.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    Some(2 * exponent + i32::from(bits & MANTISSA >= HALF))
}

/// The bin of the smallest normal number, and how many places there are up to that of infinity.
const LOWEST: i32 = 2 * -126;
const BINS: usize = (2 * 128 - LOWEST + 2) as usize;

/// The place of a score's bin among all; the first is of those that have none.
#[inline]
fn place(score: f32) -> usize {
    bin(score).map_or(0, |bin| (bin - LOWEST + 1) as usize)
}

impl Histogram {
    /// How many scores there are.
    pub fn len(&self) -> u64 {
        self.zero + self.counts.iter().sum::<u64>()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds the scores of another.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        for (bin, &count) in zip(other.first.., &other.counts) {
            self.count(bin, count);
        }
    }

    /// The base-2 logarithm of the score below which a fraction of the scores lies, as if those of a
    /// bin were spread over it evenly; none where that score is zero, or there are no scores.
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

    /// Adds so many scores of each [`place`].
    fn add_places(&mut self, counts: &[u64; BINS]) {
        self.zero += counts[0];
        zip(LOWEST.., &counts[1..]).for_each(|(bin, count)| self.count(bin, *count));
    }
}

/// The scores of weights, by what a stage made of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// What the scores are.
    pub measure: String,
    /// Of the weights that were kept and are.
    pub kept: Histogram,
    /// Of those that were pruned and came back.
    pub came_back: Histogram,
    /// Of those that were kept and went.
    pub went: Histogram,
    /// Of those that were pruned and are.
    pub pruned: Histogram,
}

impl Distribution {
    /// No scores, of what `measure` calls them.
    pub fn new(measure: impl Into<String>) -> Self {
        Self { measure: measure.into(), ..Self::default() }
    }

    /// Adds those of a matrix, whose masks are `before` and `after`; `score` says the score of a
    /// weight by its number, row-major.
    pub fn matrix(&mut self, before: &Mask, after: &Mask, score: impl Fn(usize) -> f32 + Sync) {
        /// Weights that a thread takes at a time.
        const RUN: usize = 1 << 16;
        let weights = after.dims().len();
        let run = |mut found: Self, run: usize| {
            // Without a branch on what became of a weight: nobody could foresee it. In two counts by
            // turns, as a weight's place is often that of the one before, whose sum is still to come.
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

    /// Adds others.
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
