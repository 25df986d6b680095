//! Each property fails for a metric that lacks it, and for no other.

use std::sync::atomic::{AtomicU32, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Failure, Property, Symmetry, metric, property};
use crate::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};

/// |W|·‖x‖, with a fault.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Faulty {
    /// What is wrong.
    fault: Fault,
    #[serde(skip)]
    calls: AtomicU32,
}

#[derive(Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Fault {
    #[default]
    Nothing,
    Refuses,
    Panics,
    Divides,
    Overflows,
    Counts,
    Peeks,
    Asks,
    ByRow,
    ByColumn,
    Signed,
    Folded,
}

impl Metric for Faulty {
    fn needs(&self) -> Needs {
        match self.fault {
            Fault::Asks => Needs::INPUT_SQUARE.or(Needs::SQUARED_GRADIENT),
            _ => Needs::INPUT_SQUARE,
        }
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::Refuses => drop(stats.gram()?),
            Fault::Panics => {
                std::hint::black_box(stats.weight[0]);
            }
            _ => {}
        }
        let columns = stats.dims.columns.max(1);
        let squares = stats.input_square()?;
        for (i, (score, weight)) in scores.iter_mut().zip(stats.weight).enumerate() {
            let size = weight.abs() * squares[i % columns].sqrt();
            *score *= match self.fault {
                Fault::Divides => size / weight.abs(),
                Fault::Overflows => size * size * size * size,
                Fault::Counts => size + call as f32,
                Fault::Peeks => size + stats.gram.map_or(0.0, |gram| gram[0]),
                Fault::ByRow => size * (1 + i / columns) as f32,
                Fault::ByColumn => size * (1 + i % columns) as f32,
                Fault::Signed => weight.max(0.0),
                Fault::Folded if size > 1.0 => 1.0 / size,
                _ => size,
            };
        }
        Ok(())
    }
}

inventory::submit! { MetricPlugin::of::<Faulty>("faulty", "|W|·‖x‖, with a fault") }

fn failures(fault: &str) -> Vec<Failure> {
    let symmetries = [Symmetry::Columns, Symmetry::Signs, Symmetry::Scale];
    metric("faulty").parameter("fault", fault).with(symmetries).failures()
}

#[test]
fn a_metric_that_has_all_properties_passes() {
    assert!(failures("nothing").is_empty(), "{:?}", failures("nothing"));
    metric("faulty").check();
}

#[test]
fn each_property_fails_where_it_lacks() {
    use Property::{Determinism, Finiteness, Needs, Shape};
    let symmetry = Property::Symmetry;
    for (fault, property, reason) in [
        ("refuses", Shape, "it reads `gram`, but does not declare it"),
        ("panics", Shape, "index out of bounds"),
        ("divides", Finiteness, "is NaN"),
        ("overflows", Finiteness, "is NaN"),
        ("counts", Determinism, "again"),
        ("peeks", Needs, "it reads `gram`, but does not declare it"),
        ("asks", Needs, "it declares `squared_gradient`, which has no influence on its scores"),
        ("by-row", symmetry(Symmetry::Rows), "with the rows [1, 0]"),
        ("by-column", symmetry(Symmetry::Columns), "with the columns [1, 0]"),
        ("signed", symmetry(Symmetry::Signs), "with the weights ["),
        ("folded", symmetry(Symmetry::Scale), " times the weights"),
    ] {
        let failures = failures(fault);
        let failure = failures.iter().find(|failure| failure.property == property);
        let failure = failure.unwrap_or_else(|| panic!("{fault}: {failures:?}"));
        assert!(failure.reason.contains(reason), "{fault}: {failure}");
        assert!(failure.to_string().starts_with("metric `faulty` (fault = "), "{failure}");
        // Nothing else is wrong, but where a fault breaks everything.
        let all = ["refuses", "counts", "signed"].contains(&fault);
        assert!(all || failures.len() == 1, "{fault}: {failures:?}");
    }
}

#[test]
fn counterexamples_are_small() {
    let failure = &failures("divides")[0];
    let case = failure.case.as_ref().expect("a case");
    assert_eq!((case.dims.rows, case.dims.columns), (1, 1));
    assert_eq!(case.weight, [0.0]);
    let shown = failure.to_string();
    assert!(shown.contains("the score at row 0, column 0 is NaN"), "{shown}");
    assert!(shown.contains("\n    weight            [0.0]\n"), "{shown}");
}

#[test]
#[should_panic(expected = "metric `faulty` (fault = \"divides\"), finiteness: the score at row 0")]
fn a_check_fails_by_panicking() {
    metric("faulty").parameter("fault", "divides").check();
}

#[test]
fn a_metric_may_care_about_the_order_of_rows() {
    let rows = metric("faulty").parameter("fault", "by-row");
    assert_eq!(rows.failures().len(), 1);
    rows.without(Symmetry::Rows).check();
}

#[test]
fn what_is_not_registered_as_it_should_be_is_said() {
    let reason = |name: &str| metric(name).failures()[0].reason.clone();
    assert_eq!(reason("nobody"), "no metric of this name is submitted");
    let built = metric("faulty").parameter("fault", "none").failures();
    assert_eq!(built[0].property, Property::Registration);

    /// Takes any parameter.
    #[derive(Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default)]
    struct Deaf {}
    /// Says nothing of its parameter.
    #[derive(Default, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Silent {
        power: f32,
    }
    macro_rules! nothing {
        ($($metric:ident)*) => {$(
            impl Metric for $metric {
                fn needs(&self) -> Needs {
                    Needs::NOTHING
                }
                fn score(&self, _: &LayerStats<'_>, _: &mut [f32]) -> Result<(), Error> {
                    Ok(())
                }
            }
        )*};
    }
    nothing!(Deaf Silent);
    let unregistered = |plugin: MetricPlugin| property::unregistered(&plugin).unwrap_or_default();
    assert!(unregistered(MetricPlugin::of::<Deaf>("deaf", "deaf")).contains("no errors"));
    assert!(unregistered(MetricPlugin::of::<Silent>("silent", "silent")).contains("`power`"));
    assert!(unregistered(MetricPlugin::of::<Faulty>("faulty", "")).contains("one line"));
    assert_eq!(unregistered(MetricPlugin::of::<Faulty>("faulty", "a line")), "");
}
