//! A transform stage: scores relative to the mean of their row, column or matrix, so that they can
//! be compared across rows, columns or matrices of different scales.

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a score is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Over {
    /// The mean of its row.
    #[default]
    Row,
    /// The mean of its column.
    Column,
    /// The mean of its matrix.
    Layer,
}

/// Each score divided by the mean of its row, column or matrix. Where that mean is zero, all scores
/// are, and stay so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Normalise {
    /// "row", "column" or "layer".
    pub over: Over,
}

impl Metric for Normalise {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let columns = stats.dims.columns.max(1);
        match self.over {
            Over::Layer => divide(scores),
            Over::Row => scores.chunks_exact_mut(columns).for_each(divide),
            Over::Column => {
                let mut sums = vec![0.0; columns];
                for row in scores.chunks_exact(columns) {
                    sums.iter_mut().zip(row).for_each(|(sum, s)| *sum += f64::from(*s));
                }
                let factors: Vec<f32> =
                    sums.iter().map(|sum| factor(*sum, stats.dims.rows)).collect();
                for row in scores.chunks_exact_mut(columns) {
                    row.iter_mut().zip(&factors).for_each(|(score, f)| *score *= f);
                }
            }
        }
        Ok(())
    }
}

fn divide(scores: &mut [f32]) {
    let sum = scores.iter().map(|score| f64::from(*score)).sum();
    let factor = factor(sum, scores.len());
    scores.iter_mut().for_each(|score| *score *= factor);
}

fn factor(sum: f64, count: usize) -> f32 {
    if sum == 0.0 { 1.0 } else { (count as f64 / sum) as f32 }
}

inventory::submit! {
    MetricPlugin::of::<Normalise>(
        "normalise",
        "transform: the scores so far, relative to the mean of their row, column or matrix",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use barber_metric::Dims;

    #[test]
    fn the_mean_becomes_one() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[0.0; 4],
            mask: &[true; 4],
            squared_gradient: None,
            input_square: None,
        };
        let normalised = |over, scores: [f32; 4]| {
            let mut scores = scores.to_vec();
            Normalise { over }.score(&stats, &mut scores).unwrap();
            scores
        };
        assert_eq!(normalised(Over::Row, [1.0, 3.0, 0.0, 0.0]), [0.5, 1.5, 0.0, 0.0]);
        assert_eq!(normalised(Over::Column, [1.0, 3.0, 3.0, 1.0]), [0.5, 1.5, 1.5, 0.5]);
        assert_eq!(normalised(Over::Layer, [1.0, 3.0, 0.0, 4.0]), [0.5, 1.5, 0.0, 2.0]);
    }
}
