//! The metric `row-magnitude`: |W_ij|, relative to the mean |W| of its row.

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by |W_ij| / (mean |W_i| + `floor`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RowMagnitude {
    /// What is added to the mean, so that rows of tiny weights do not win.
    pub floor: f32,
}

impl Default for RowMagnitude {
    fn default() -> Self {
        Self { floor: 1e-6 }
    }
}

impl Metric for RowMagnitude {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let columns = stats.dims.columns.max(1);
        for (scores, row) in scores.chunks_mut(columns).zip(stats.weight.chunks(columns)) {
            let mean = row.iter().map(|weight| weight.abs()).sum::<f32>() / row.len() as f32;
            for (score, weight) in scores.iter_mut().zip(row) {
                *score *= weight.abs() / (mean + self.floor);
            }
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<RowMagnitude>("row-magnitude", "|W| relative to the mean of its row")
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;

    use super::*;

    #[test]
    fn scores_are_relative_to_their_row() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[1.0, -3.0, 0.0, 0.0],
            mask: &[true; 4],
            ..LayerStats::default()
        };
        let mut scores = [1.0; 4];
        RowMagnitude { floor: 0.0 }.score(&stats, &mut scores[..2]).unwrap();
        assert_eq!(scores[..2], [0.5, 1.5]);
        let mut scores = [1.0; 4];
        RowMagnitude { floor: 2.0 }.score(&stats, &mut scores).unwrap();
        assert_eq!(scores, [0.25, 0.75, 0.0, 0.0]);
    }
}
