//! The metric `fluctuation`: W² times the variance of the weight's input (FLAP, arXiv 2312.11983, section
//! 3.2, there "WIFV"). An input that hardly varies can be replaced by its mean, a bias of the output. So of
//! whole channels and heads only the columns count, in the projections whose inputs they are.
//!
//! ```
//! # use barber_fluctuation as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["fluctuation"].needs(), Needs::INPUT_VARIANCE);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by W_ij² times the variance of input j; by 0 where structures are scored that have
/// whole rows of the matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fluctuation {}

impl Metric for Fluctuation {
    fn needs(&self) -> Needs {
        Needs::INPUT_VARIANCE
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let variance = stats.input_variance()?;
        if stats.whole_rows {
            scores.fill(0.0);
            return Ok(());
        }
        let columns = stats.dims.columns.max(1);
        let rows = scores.chunks_mut(columns).zip(stats.weight.chunks(columns));
        for (scores, weights) in rows {
            for ((score, weight), variance) in scores.iter_mut().zip(weights).zip(variance) {
                *score *= weight * weight * variance;
            }
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<Fluctuation>(
        "fluctuation",
        "W² times the variance of the input",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_multiplied_by_squares_and_variances_where_inputs_go() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 2, columns: 2 },
            weight: &[-2.0, 4.0, 3.0, 0.0],
            input_variance: Some(&[0.5, 0.25]),
            ..LayerStats::default()
        };
        let mut scores = [1.0, 1.0, 10.0, 1.0];
        Fluctuation {}.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0, 4.0, 45.0, 0.0]);
        let other = LayerStats { whole_rows: true, ..stats };
        Fluctuation {}.score(&other, &mut scores).expect("scores");
        assert_eq!(scores, [0.0; 4]);
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        testing::metric("fluctuation").with([Columns, Signs, Scale]).check();
    }
}
