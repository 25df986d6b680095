//! The metric `{{name}}`: the size of a weight, times a power of its input's norm.
//!
//! ```
//! # use {{module}} as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["{{name}}"].needs(), Needs::INPUT_SQUARE);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by |W_ij|·‖x_j‖^`power`, ‖x_j‖² being the mean over calibration samples of
/// Σ x_j² over a sample's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct {{type}} {
    /// The power that the input's norm is raised to.
    pub power: Power,
}

impl Metric for {{type}} {
    fn needs(&self) -> Needs {
        Needs::INPUT_SQUARE
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let norms: Vec<f32> =
            stats.input_norms()?.into_iter().map(|norm| self.power.of(norm)).collect();
        // A row is an output, a column an input.
        let columns = stats.dims.columns.max(1);
        for (scores, row) in scores.chunks_mut(columns).zip(stats.weight.chunks(columns)) {
            for ((score, weight), norm) in scores.iter_mut().zip(row).zip(&norms) {
                *score *= weight.abs() * norm;
            }
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<{{type}}>("{{name}}", "the weight's size and its input's norm: |W|·‖x‖")
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_sizes_times_norms() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[1.0, -2.0, 0.0, 3.0],
            mask: &[true; 4],
            input_square: Some(&[4.0, 9.0]),
            ..LayerStats::default()
        };
        let metric = {{type}}::default();
        let mut scores = [1.0, 1.0, 1.0, 10.0];
        metric.score(&stats, &mut scores).expect("scores");
        for (score, expected) in scores.iter().zip([2.0, 6.0, 0.0, 90.0]) {
            assert!((score - expected).abs() <= 1e-5 * expected, "{score}, not {expected}");
        }
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0] {
            let metric = testing::metric("{{name}}").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
