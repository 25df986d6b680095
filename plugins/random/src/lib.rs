//! The metric `random`: the baseline that a metric has to beat. The score of a weight is a random
//! number that depends only on the seed, the matrix's name and the weight's place, not on the order
//! of matrices or on threads.
//!
//! ```
//! # use barber_random as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["random"].needs(), Needs::NOTHING);
//! ```

use barber_metric::{
    Error, LayerStats, Metric, MetricPlugin, Needs, inventory, random::SplitMix64,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by a random number above 0 and up to 1, uniformly distributed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Random {
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Metric for Random {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        // Each byte of the name changes the sequence.
        let seed = stats
            .name
            .bytes()
            .fold(self.seed, |seed, byte| SplitMix64::new(seed ^ u64::from(byte)).bits());
        let mut random = SplitMix64::new(seed);
        for score in scores {
            // As many bits as f32 has for its digits.
            *score *= ((random.bits() >> 40) + 1) as f32 / (1_u64 << 24) as f32;
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<Random>("random", "random numbers, a baseline") }

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    fn scores(seed: u64, name: &str, rows: usize) -> Vec<f32> {
        let dims = Dims { rows, columns: 64 };
        let (weight, mask) = (vec![0.0; dims.len()], vec![true; dims.len()]);
        let stats =
            LayerStats { name, dims, weight: &weight, mask: &mask, ..LayerStats::default() };
        let mut scores = vec![1.0; dims.len()];
        Random { seed }.score(&stats, &mut scores).expect("scores");
        scores
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let scores = scores(0, "w", 1000);
        assert!(scores.iter().all(|score| *score > 0.0 && *score <= 1.0));
        for tenth in 0..10 {
            let (from, to) = (tenth as f32 / 10.0, (tenth + 1) as f32 / 10.0);
            let count = scores.iter().filter(|score| **score > from && **score <= to).count();
            assert!((6_100..6_700).contains(&count), "{tenth}: {count}");
        }
    }

    #[test]
    fn seeds_and_names_make_other_numbers() {
        let first = scores(0, "layers.0.w", 2);
        assert_eq!(first, scores(0, "layers.0.w", 2));
        for other in [scores(1, "layers.0.w", 2), scores(0, "layers.1.w", 2)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 3, "{same} numbers are the same");
        }
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Rows, Scale, Signs};
        testing::metric("random").without(Rows).with([Scale, Signs]).check();
        testing::metric("random").parameter("seed", 3).without(Rows).check();
    }
}
