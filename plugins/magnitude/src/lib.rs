//! The weight alone (LLM-Barber, arXiv 2408.10631, variant "W").

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// |W|.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Magnitude {
    /// The exponent of the factor: 0.5 takes its root.
    pub power: f32,
}

impl Default for Magnitude {
    fn default() -> Self {
        Self { power: 1.0 }
    }
}

impl Metric for Magnitude {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        for (score, weight) in scores.iter_mut().zip(stats.weight) {
            *score *= weight.abs().powf(self.power);
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<Magnitude>("magnitude", "|W|: how large the weight is") }

#[cfg(test)]
mod tests {
    use super::*;
    use barber_metric::Dims;

    fn scores(metric: Magnitude, start: f32) -> Vec<f32> {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[1.0, -2.0, 3.0, 0.0],
            mask: &[true, false, true, false],
            squared_gradient: metric.needs().squared_gradient.then_some(&[4.0, 9.0, 0.0, 1.0]),
            input_square: metric.needs().input_square.then_some(&[16.0, 0.25]),
        };
        let mut scores = vec![start; 4];
        metric.score(&stats, &mut scores).unwrap();
        scores
    }

    #[test]
    fn it_multiplies_the_scores_of_the_stage_before() {
        assert_eq!(scores(Magnitude::default(), 1.0), [1.0, 2.0, 3.0, 0.0]);
        assert_eq!(
            scores(Magnitude::default(), 2.0),
            [1.0, 2.0, 3.0, 0.0].map(|score| 2.0 * score)
        );
        assert_eq!(
            scores(Magnitude { power: 2.0 }, 1.0),
            [1.0, 2.0, 3.0, 0.0].map(|score| score * score)
        );
    }
}
