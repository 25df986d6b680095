//! The losses on a text's segments: the standard errors of their mean, and of two models'
//! difference.

use serde::{Deserialize, Serialize};

use crate::executor::or_nan;

/// Maximum number of runs of consecutive segments whose losses are kept separately.
pub(super) const MOST: usize = 256;

/// Number of standard errors above which a difference counts: about 95% of random differences are
/// smaller.
pub(super) const CERTAIN: f64 = 2.0;

/// The loss on some consecutive segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Sum of the cross-entropies, in nats.
    #[serde(deserialize_with = "or_nan")]
    pub nats: f64,
    /// Number of predicted tokens.
    pub predictions: usize,
}

/// The mean loss of a prediction, and its standard error, which is estimated from the differences
/// between segments, as tokens of a segment are not independent. `None` for a single segment.
pub(super) fn mean(losses: &[Loss]) -> Option<[f64; 2]> {
    let count = losses.len() as f64;
    let predictions = losses.iter().map(|of| of.predictions as f64).sum::<f64>();
    let mean = losses.iter().map(|of| of.nats).sum::<f64>() / predictions;
    // The delta method, for a quotient of two sums over segments.
    let residual = |of: &Loss| of.nats - mean * of.predictions as f64;
    let squares: f64 = losses.iter().map(|of| residual(of).powi(2)).sum();
    let error = (squares * count / (count - 1.0)).sqrt() / predictions;
    (losses.len() > 1).then_some([mean, error])
}

/// The mean difference of two models' losses on the same tokens, and its standard error. The
/// difficulty of a segment affects both models and mostly cancels. `None` if the segments differ,
/// or there is only one.
pub(super) fn difference(one: &[Loss], other: &[Loss]) -> Option<[f64; 2]> {
    let alike = |(one, other): (&Loss, &Loss)| one.predictions == other.predictions;
    if one.len() != other.len() || !one.iter().zip(other).all(alike) {
        return None;
    }
    let pairs = one.iter().zip(other);
    let losses = pairs.map(|(one, other)| Loss { nats: one.nats - other.nats, ..*one });
    mean(&losses.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::SplitMix64;

    fn losses(nats: &[f64], predictions: usize) -> Vec<Loss> {
        nats.iter().map(|&nats| Loss { nats, predictions }).collect()
    }

    #[test]
    fn errors_are_those_of_a_mean_where_segments_are_equally_long() {
        // Means of 1, 2 and 6: their mean is 3, their variance 7.
        let [mean, error] = mean(&losses(&[2.0, 4.0, 12.0], 2)).unwrap();
        assert_eq!(mean, 3.0);
        assert!((error - (7.0_f64 / 3.0).sqrt()).abs() < 1e-12, "{error}");
        assert_eq!(super::mean(&losses(&[2.0], 2)), None);
        assert_eq!(super::mean(&[]), None);
    }

    #[test]
    fn pairs_are_compared_on_the_same_segments_alone() {
        let (one, other) = (losses(&[20.0, 40.0, 90.0], 10), losses(&[19.0, 38.0, 89.0], 10));
        let [found, error] = difference(&one, &other).unwrap();
        assert!((found - 4.0 / 30.0).abs() < 1e-12, "{found}");
        assert!(error < mean(&one).unwrap()[1] / 10.0, "{error}");
        assert_eq!(difference(&one, &one), Some([0.0, 0.0]));
        assert_eq!(difference(&one, &losses(&[19.0, 38.0, 89.0], 9)), None);
        assert_eq!(difference(&one, &other[..2]), None);
        assert_eq!(difference(&[], &[]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// A mean is as far from the truth as its standard error says, whatever the lengths.
        #[test]
        fn the_error_is_the_deviation_of_the_mean(seed: u64) {
            let mut random = SplitMix64::new(seed);
            let (mut squares, mut variances) = (0.0, 0.0);
            let runs = 2000;
            for _ in 0..runs {
                let losses: Vec<_> = (0..30).map(|_| {
                    let predictions = 50 + random.below(100);
                    // A loss of 2 nats a token, whose part of a segment is uniform within ± 1.
                    let of_segment = random.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0;
                    Loss { nats: (2.0 + of_segment) * predictions as f64, predictions }
                }).collect();
                let [mean, error] = mean(&losses).unwrap();
                squares += (mean - 2.0).powi(2);
                variances += error.powi(2);
            }
            let ratio = (variances / squares).sqrt();
            prop_assert!((ratio - 1.0).abs() < 0.1, "{}", ratio);
        }
    }
}
