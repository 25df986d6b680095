//! The norm of a weight's input, as in Wanda (arXiv 2306.11695).

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// ‖x_j‖ = √(mean over samples of Σ x_j²), x_j being the input that the weight's column multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActivationNorm {
    /// The exponent of the factor: 0.5 takes its root.
    pub power: f32,
}

impl Default for ActivationNorm {
    fn default() -> Self {
        Self { power: 1.0 }
    }
}

impl Metric for ActivationNorm {
    fn needs(&self) -> Needs {
        Needs::INPUT_SQUARE
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let squares = stats.input_square()?;
        let factors: Vec<f32> = squares.iter().map(|s| s.sqrt().powf(self.power)).collect();
        for row in scores.chunks_exact_mut(stats.dims.columns.max(1)) {
            row.iter_mut().zip(&factors).for_each(|(score, factor)| *score *= factor);
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<ActivationNorm>("activation-norm", "‖x‖: how large the weight's input is") }

#[cfg(test)]
mod tests {
    use super::*;
    use barber_metric::Dims;

    fn scores(metric: ActivationNorm, start: f32) -> Vec<f32> {
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
        assert_eq!(scores(ActivationNorm::default(), 1.0), [4.0, 0.5, 4.0, 0.5]);
        assert_eq!(
            scores(ActivationNorm::default(), 2.0),
            [4.0, 0.5, 4.0, 0.5].map(|score| 2.0 * score)
        );
        assert_eq!(
            scores(ActivationNorm { power: 2.0 }, 1.0),
            [4.0, 0.5, 4.0, 0.5].map(|score| score * score)
        );
    }
}
