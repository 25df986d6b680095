//! The metric `ria`: relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play:
//! An Efficient Post-training Pruning Method for Large Language Models"). The score is a weight's
//! fraction of its row plus that of its column, so that no whole channel is pruned, times the norm
//! of its input.
//!
//! ```
//! # use barber_ria as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["ria"].needs(), Needs::INPUT_SQUARE);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by (|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|)·‖x_j‖^`power`, ‖x_j‖² being
/// the mean over calibration samples of Σ x_j² over a sample's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ria {
    /// The power that the input's norm is raised to, the paper's a.
    pub power: Power,
}

impl Default for Ria {
    fn default() -> Self {
        Self { power: Power::SQUARE_ROOT }
    }
}

impl Metric for Ria {
    fn needs(&self) -> Needs {
        Needs::INPUT_SQUARE
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let columns = stats.dims.columns.max(1);
        let norms: Vec<f32> =
            stats.input_norms()?.into_iter().map(|norm| self.power.of(norm)).collect();
        // Sums in f64: a matrix has thousands of rows.
        let size = |weight: &f32| f64::from(weight.abs());
        let mut of_columns = vec![0.0; columns];
        for row in stats.weight.chunks(columns) {
            of_columns.iter_mut().zip(row).for_each(|(sum, weight)| *sum += size(weight));
        }
        for (scores, row) in scores.chunks_mut(columns).zip(stats.weight.chunks(columns)) {
            let of_row: f64 = row.iter().map(size).sum();
            for (j, (score, weight)) in scores.iter_mut().zip(row).enumerate() {
                let ratio = ratio(size(weight), of_row) + ratio(size(weight), of_columns[j]);
                *score *= ratio as f32 * norms[j];
            }
        }
        Ok(())
    }
}

/// The fraction `part` of `sum`; 0 if the sum is 0.
fn ratio(part: f64, sum: f64) -> f64 {
    if sum == 0.0 { 0.0 } else { part / sum }
}

inventory::submit! {
    MetricPlugin::of::<Ria>(
        "ria",
        "relative importance and activations: (|W| / Σ row + |W| / Σ column)·√‖x‖",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_shares_of_rows_and_columns_times_norms() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[1.0, -3.0, -2.0, 0.0],
            mask: &[true; 4],
            input_square: Some(&[16.0, 81.0]),
            ..LayerStats::default()
        };
        let mut scores = [1.0, 1.0, 10.0, 1.0];
        Ria::default().score(&stats, &mut scores).expect("scores");
        // Rows: 4 and 2; columns: 3 and 3; roots of norms: 2 and 3.
        let expected =
            [(0.25 + 1.0 / 3.0) * 2.0, (0.75 + 1.0) * 3.0, (1.0 + 2.0 / 3.0) * 20.0, 0.0];
        for (found, expected) in scores.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{scores:?}");
        }
        let mut scores = [1.0; 4];
        Ria { power: Power::default() }.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores[1], 1.75 * 9.0);
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0] {
            let metric = testing::metric("ria").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
