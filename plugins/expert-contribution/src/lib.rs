//! The metric `expert-contribution`: scores experts by the mean over the tokens that they see of their
//! weight times the norm of their output (REAP, arXiv 2510.13999).
//!
//! ```
//! # use barber_expert_contribution as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["expert-contribution"].needs(), Needs::CONTRIBUTION);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, StructureStats, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies the score of each expert by the mean over its tokens of its weight, which the router
/// gives, times the norm of its output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertContribution {}

impl Metric for ExpertContribution {
    fn needs(&self) -> Needs {
        Needs::CONTRIBUTION
    }

    fn score(&self, _: &LayerStats<'_>, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn structures(&self) -> &'static [&'static str] {
        &["experts"]
    }

    fn score_structures(
        &self,
        stats: &StructureStats<'_>,
        scores: &mut [f64],
    ) -> Result<(), Error> {
        for (score, contribution) in scores.iter_mut().zip(stats.contribution()?) {
            *score *= f64::from(*contribution);
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<ExpertContribution>(
        "expert-contribution",
        "experts: their outputs' norms, times the router's weights",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::testing;

    use super::*;

    #[test]
    fn scores_are_multiplied_by_the_contribution() {
        let contribution = Some(&[0.5, 0.0][..]);
        let stats = StructureStats { contribution, ..StructureStats::default() };
        let mut scores = [3.0, 1.0];
        ExpertContribution {}.score_structures(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [1.5, 0.0]);
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        testing::metric("expert-contribution").check();
    }
}
