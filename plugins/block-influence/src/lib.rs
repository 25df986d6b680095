//! The metric `block-influence`: scores decoder layers by how much they change the hidden states, one
//! minus the cosine between those before and after the layer (ShortGPT, arXiv 2403.03853).
//!
//! ```
//! # use barber_block_influence as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["block-influence"].needs(), Needs::INFLUENCE);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, StructureStats, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies the score of each layer by one minus the mean cosine between the hidden states before and
/// after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BlockInfluence {}

impl Metric for BlockInfluence {
    fn needs(&self) -> Needs {
        Needs::INFLUENCE
    }

    fn score(&self, _: &LayerStats<'_>, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn structures(&self) -> &'static [&'static str] {
        &["layers"]
    }

    fn score_structures(
        &self,
        stats: &StructureStats<'_>,
        scores: &mut [f64],
    ) -> Result<(), Error> {
        for (score, influence) in scores.iter_mut().zip(stats.influence()?) {
            *score *= f64::from(*influence);
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<BlockInfluence>(
        "block-influence",
        "layers: how much each changes the hidden states",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::testing;

    use super::*;

    #[test]
    fn scores_are_multiplied_by_the_influence() {
        let stats = StructureStats { influence: Some(&[0.25, 0.5]), ..StructureStats::default() };
        let mut scores = [1.0, 3.0];
        BlockInfluence {}.score_structures(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [0.25, 1.5]);
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        testing::metric("block-influence").check();
    }
}
