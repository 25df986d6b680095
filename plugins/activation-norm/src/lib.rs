//! The metric `activation-norm`: √(mean Σ x²), the norm of a weight's input, Wanda's factor beside
//! the weight (arXiv 2306.11695). After `magnitude` the two make Wanda's metric.
//!
//! ```
//! # use barber_activation_norm as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["activation-norm"].needs(), Needs::INPUT_SQUARE);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score of column j by (√s_j)^`power`, s_j being the mean over calibration
/// samples of Σ x_j² over a sample's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActivationNorm {
    /// The power that the input's norm is raised to.
    pub power: Power,
}

impl Metric for ActivationNorm {
    fn needs(&self) -> Needs {
        Needs::INPUT_SQUARE
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let factors: Vec<f32> =
            stats.input_norms()?.into_iter().map(|norm| self.power.of(norm)).collect();
        for row in scores.chunks_mut(stats.dims.columns.max(1)) {
            for (score, factor) in row.iter_mut().zip(&factors) {
                *score *= factor;
            }
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<ActivationNorm>("activation-norm", "the norm of a weight's input: √(mean Σ x²)")
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_multiplied_by_the_norms_of_their_columns() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 3 },
            weight: &[1.0; 6],
            mask: &[true; 6],
            input_square: Some(&[4.0, 16.0, 0.0]),
            ..LayerStats::default()
        };
        let mut scores = [1.0, 1.0, 1.0, 10.0, 10.0, 10.0];
        ActivationNorm::default().score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0, 4.0, 0.0, 20.0, 40.0, 0.0]);
        let root = ActivationNorm { power: Power::try_from(0.5).expect("finite") };
        let mut scores = [1.0; 6];
        root.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0_f32.sqrt(), 2.0, 0.0, 2.0_f32.sqrt(), 2.0, 0.0]);
        let stats = LayerStats { input_square: None, ..stats };
        assert_eq!(root.score(&stats, &mut scores), Err(Error::Undeclared("input_square")));
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0, 2.0] {
            let metric = testing::metric("activation-norm").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
