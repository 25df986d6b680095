//! The metric step `normalise`: scores relative to the mean of their row, column or matrix. It
//! makes scores of different scales comparable when they are pooled, like relative importance for
//! rows and columns (RIA, ICLR 2024).
//!
//! ```
//! # use barber_normalise as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["normalise"].needs(), Needs::NOTHING);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Divides each score by the mean score of its row, column or matrix. Where that mean is zero,
/// scores stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Normalise {
    /// The scores that the mean is taken over: those of a `row`, a `column` or a `layer`.
    pub over: Over,
}

/// The scores that a mean is taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Over {
    /// The scores of one output.
    #[default]
    Row,
    /// The scores of one input.
    Column,
    /// The scores of the matrix.
    Layer,
}

impl Metric for Normalise {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let columns = stats.dims.columns.max(1);
        match self.over {
            Over::Row => scores.chunks_mut(columns).for_each(divide),
            Over::Layer => divide(scores),
            Over::Column => {
                let mut means = vec![0.0; columns];
                for row in scores.chunks(columns) {
                    for (mean, &score) in means.iter_mut().zip(row) {
                        *mean += f64::from(score);
                    }
                }
                let rows = stats.dims.rows as f64;
                for row in scores.chunks_mut(columns) {
                    for (score, sum) in row.iter_mut().zip(&means) {
                        *score = relative(*score, sum / rows);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Divides the scores by their mean.
fn divide(scores: &mut [f32]) {
    // Sums in f64: a matrix has millions of scores.
    let sum: f64 = scores.iter().map(|&score| f64::from(score)).sum();
    let mean = sum / scores.len() as f64;
    scores.iter_mut().for_each(|score| *score = relative(*score, mean));
}

fn relative(score: f32, mean: f64) -> f32 {
    if mean == 0.0 { score } else { (f64::from(score) / mean) as f32 }
}

inventory::submit! {
    MetricPlugin::of::<Normalise>(
        "normalise",
        "the scores so far, relative to the mean of their row, column or layer",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, figment::value::Dict, testing, testing::Symmetry};

    use super::*;

    fn normalised(over: Over, rows: usize, mut scores: Vec<f32>) -> Vec<f32> {
        let dims = Dims { rows, columns: scores.len() / rows };
        let stats = LayerStats {
            name: "w",
            dims,
            weight: &scores.clone(),
            mask: &vec![true; dims.len()],
            ..LayerStats::default()
        };
        Normalise { over }.score(&stats, &mut scores).expect("scores");
        scores
    }

    #[test]
    fn scores_are_relative_to_their_mean() {
        let scores = vec![1.0, 3.0, 6.0, 10.0];
        assert_eq!(normalised(Over::Row, 2, scores.clone()), [0.5, 1.5, 0.75, 1.25]);
        assert_eq!(
            normalised(Over::Column, 2, scores.clone()),
            [1.0 / 3.5, 3.0 / 6.5, 6.0 / 3.5, 10.0 / 6.5]
        );
        assert_eq!(normalised(Over::Layer, 2, scores), [0.2, 0.6, 1.2, 2.0]);
    }

    #[test]
    fn where_the_mean_is_zero_scores_stay() {
        for over in [Over::Row, Over::Column, Over::Layer] {
            assert_eq!(normalised(over, 2, vec![0.0; 4]), [0.0; 4]);
            assert_eq!(normalised(over, 1, vec![]), [0.0; 0]);
        }
        assert_eq!(normalised(Over::Row, 2, vec![0.0, 0.0, 1.0, 3.0]), [0.0, 0.0, 0.5, 1.5]);
    }

    #[test]
    fn what_it_takes_the_mean_over_is_a_closed_set() {
        let plugin = MetricPlugin::of::<Normalise>("normalise", "");
        assert_eq!(plugin.parameters()[0].default, "\"row\"");
        let build = |over: &str| plugin.build(Dict::from([("over".into(), over.into())])).err();
        for over in ["row", "column", "layer"] {
            assert_eq!(build(over), None);
        }
        assert_eq!(build("matrix").expect("unknown").path, ["over"]);
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for over in ["row", "column", "layer"] {
            let metric = testing::metric("normalise").parameter("over", over);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
