//! The metric `weight-gradient`: |W|·√(mean g²), the default of the rebuild in LLM-Barber (arXiv
//! 2408.10631, there "WD"). It estimates the increase of the block's output error when a weight is
//! removed.
//!
//! ```
//! # use barber_weight_gradient as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["weight-gradient"].needs(), Needs::SQUARED_GRADIENT);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by (|W_ij|·√s_ij)^`power`, s being the mean over calibration samples of
/// the squared gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WeightGradient {
    /// The power that weight times gradient is raised to.
    pub power: Power,
}

impl Metric for WeightGradient {
    fn needs(&self) -> Needs {
        Needs::SQUARED_GRADIENT
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let factors = stats.weight.iter().zip(stats.squared_gradient()?);
        for (score, (weight, square)) in scores.iter_mut().zip(factors) {
            *score *= self.power.of(weight.abs() * square.sqrt());
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<WeightGradient>("weight-gradient", "weight times gradient: |W|·√(mean g²)")
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_multiplied_by_weight_and_gradient() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 1, columns: 3 },
            weight: &[-2.0, 4.0, 3.0],
            mask: &[true; 3],
            squared_gradient: Some(&[4.0, 0.25, 0.0]),
            ..LayerStats::default()
        };
        let mut scores = [1.0, 10.0, 1.0];
        WeightGradient::default().score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [4.0, 20.0, 0.0]);
        let squared = WeightGradient { power: Power::try_from(2.0).expect("finite") };
        let mut scores = [1.0; 3];
        squared.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [16.0, 4.0, 0.0]);
        let stats = LayerStats { squared_gradient: None, ..stats };
        assert_eq!(squared.score(&stats, &mut scores), Err(Error::Undeclared("squared_gradient")));
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0, 2.0] {
            let metric = testing::metric("weight-gradient").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
