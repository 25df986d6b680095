//! The metric `magnitude`: |W|, a variant in LLM-Barber (arXiv 2408.10631, there "W") and the
//! oldest of all pruning metrics.
//!
//! ```
//! # use barber_magnitude as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["magnitude"].needs(), Needs::NOTHING);
//! ```

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, Power, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplies each score by |W_ij|^`power`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Magnitude {
    /// The power that the weight is raised to.
    pub power: Power,
}

impl Metric for Magnitude {
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        for (score, weight) in scores.iter_mut().zip(stats.weight) {
            *score *= self.power.of(weight.abs());
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<Magnitude>("magnitude", "the weight alone: |W|") }

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, figment::value::Dict, testing, testing::Symmetry};

    use super::*;

    #[test]
    fn scores_are_multiplied_by_the_weight() {
        let stats = LayerStats {
            name: "w",
            dims: Dims { rows: 1, columns: 3 },
            weight: &[-2.0, 4.0, 0.0],
            mask: &[true; 3],
            ..LayerStats::default()
        };
        let mut scores = [1.0, 10.0, 1.0];
        Magnitude::default().score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0, 40.0, 0.0]);
        let root = Magnitude { power: Power::try_from(0.5).expect("finite") };
        let mut scores = [1.0; 3];
        root.score(&stats, &mut scores).expect("scores");
        assert_eq!(scores, [2.0_f32.sqrt(), 2.0, 0.0]);
    }

    #[test]
    fn its_power_is_a_finite_number() {
        let plugin = MetricPlugin::of::<Magnitude>("magnitude", "");
        let parameters = plugin.parameters();
        assert_eq!(parameters[0].name, "power");
        assert_eq!(parameters[0].default, "1.0");
        assert_eq!(parameters[0].help, "The power that the weight is raised to.");
        let build = |power: f64| plugin.build(Dict::from([("power".into(), power.into())])).err();
        assert_eq!(build(0.5), None);
        assert_eq!(plugin.build(Dict::from([("power".into(), 2.into())])).err(), None);
        let error = build(f64::INFINITY).expect("infinite");
        assert_eq!(error.path, ["power"]);
        assert!(
            error.to_string().contains("the power must be a finite number, got inf"),
            "{error}"
        );
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for power in [0.5, 1.0, 2.0] {
            let metric = testing::metric("magnitude").parameter("power", power);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
