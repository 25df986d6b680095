//! The metric `gradient`: √(mean g²), a variant in LLM-Barber (arXiv 2408.10631, there "D"). It is
//! the slope of the block's output error with respect to a weight, whatever the weight's size.
//!
//! ```
//! # use barber_gradient as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["gradient"].needs(), Needs::SQUARED_GRADIENT);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by (√s_ij)^`power`, s being the mean over calibration samples of the
/// squared gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gradient {
    /// The power that the gradient is raised to.
    pub power: Power,
}

impl Metric for Gradient {
    fn needs(&self) -> Needs {
        Needs::SQUARED_GRADIENT
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        for (score, square) in scores.iter_mut().zip(stats.squared_gradient()?) {
            *score *= self.power.of(square.sqrt());
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<Gradient>("gradient", "the gradient alone: √(mean g²)") }

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_multiplied_by_the_gradient() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 1, columns: 3 },
            weight: &[-2.0, 4.0, 3.0],
            mask: &[true; 3],
            squared_gradient: Some(&[4.0, 0.25, 0.0]),
            ..LayerStats::default()
        };
        let mut scores = [1.0, 10.0, 1.0];
        Gradient::default().score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0, 5.0, 0.0]);
        let squared = Gradient { power: Power::try_from(2.0).expect("finite") };
        let mut scores = [1.0; 3];
        squared.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [4.0, 0.25, 0.0]);
        let stats = LayerStats { squared_gradient: None, ..stats };
        assert_eq!(squared.score(&stats, &mut scores), Err(Error::Undeclared("squared_gradient")));
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0, 2.0] {
            let metric = testing::metric("gradient").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
