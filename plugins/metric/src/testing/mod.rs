//! A kit that checks any metric. One call in a plugin's tests tries all [properties](Property) on
//! generated matrices, and says which one fails, of which metric, on the smallest matrix found.
//!
//! ```
//! use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory, testing};
//! use testing::Symmetry;
//!
//! /// The weight's size.
//! #[derive(Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields, default)]
//! struct Size {}
//!
//! impl Metric for Size {
//!     fn needs(&self) -> Needs {
//!         Needs::NOTHING
//!     }
//!     fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
//!         scores.iter_mut().zip(stats.weight).for_each(|(score, weight)| *score *= weight.abs());
//!         Ok(())
//!     }
//! }
//!
//! inventory::submit! { MetricPlugin::of::<Size>("size", "the weight's size") }
//!
//! testing::metric("size").with([Symmetry::Columns, Symmetry::Signs]).check();
//! ```
//!
//! The matrices are the same in every run. `PROPTEST_CASES` sets how many there are of each kind
//! (256), `PROPTEST_RNG_SEED` makes others.

mod case;
mod property;
mod structures;

use std::{collections::BTreeSet, fmt};

use figment::value::{Dict, Value};
use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner},
};

pub use self::{
    case::Case,
    property::{Property, Symmetry},
};
use crate::{Metric, MetricPlugin, registered};

/// Checks for the metric registered as `name`, with its default parameters. Permuting rows is
/// expected to permute the scores of every metric; [`Checks::without`] drops this.
pub fn metric(name: &str) -> Checks {
    Checks {
        name: name.into(),
        parameters: Dict::new(),
        symmetries: BTreeSet::from([Symmetry::Rows]),
    }
}

/// The checks of one metric.
#[derive(Clone, Debug)]
pub struct Checks {
    name: String,
    parameters: Dict,
    symmetries: BTreeSet<Symmetry>,
}

impl Checks {
    /// Sets a parameter.
    #[must_use]
    pub fn parameter(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.parameters.insert(name.into(), value.into());
        self
    }

    /// Also expects these symmetries.
    #[must_use]
    pub fn with(mut self, symmetries: impl IntoIterator<Item = Symmetry>) -> Self {
        self.symmetries.extend(symmetries);
        self
    }

    /// Does not expect this symmetry.
    #[must_use]
    pub fn without(mut self, symmetry: Symmetry) -> Self {
        self.symmetries.remove(&symmetry);
        self
    }

    /// Checks all properties.
    ///
    /// # Panics
    /// If the metric lacks one of them: that fails the test that calls it.
    #[track_caller]
    pub fn check(&self) {
        let failures: Vec<String> = self.failures().iter().map(Failure::to_string).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    }

    /// The properties that fail.
    pub fn failures(&self) -> Vec<Failure> {
        let fail = |reason| vec![self.failed(Property::Registration, (reason, None))];
        let plugin = match registered() {
            Err(duplicate) => return fail(duplicate.to_string()),
            Ok(plugins) => match plugins.get(self.name.as_str()) {
                None => return fail("no metric of this name is submitted".into()),
                Some(plugin) => *plugin,
            },
        };
        if let Some(reason) = property::unregistered(plugin) {
            return fail(reason);
        }
        match plugin.build(self.parameters.clone()) {
            Err(error) => fail(format!("it is not built: {error}")),
            Ok(metric) => self.lacking(plugin, metric.as_ref()),
        }
    }

    fn lacking(&self, plugin: &MetricPlugin, metric: &dyn Metric) -> Vec<Failure> {
        if !metric.structures().is_empty() {
            let found = structures::lacking(metric).into_iter();
            return found.map(|(of, reason)| self.failed(of, (reason, None))).collect();
        }
        let build = || plugin.build(self.parameters.clone()).ok();
        let symmetric = |symmetry| {
            let test = |case: &Case| property::symmetry(metric, case, symmetry);
            (Property::Symmetry(symmetry), smallest(&case::ordinary(), test))
        };
        let found = [
            (Property::Shape, smallest(&case::any_shape(), |case| property::shape(metric, case))),
            (
                Property::Finiteness,
                smallest(&case::extreme(), |case| property::finiteness(metric, case)),
            ),
            (
                Property::Determinism,
                smallest(&case::ordinary(), |case| property::determinism(metric, &build, case)),
            ),
            (
                Property::Needs,
                smallest(&case::ordinary(), |case| property::reads_no_other(metric, case))
                    .or_else(|| property::reads_none_of(metric, &examples())),
            ),
        ];
        let found = found.into_iter().chain(self.symmetries.iter().copied().map(symmetric));
        found.filter_map(|(property, found)| Some(self.failed(property, found?))).collect()
    }

    fn failed(&self, property: Property, (reason, case): (String, Option<Case>)) -> Failure {
        let parameters = self.parameters.iter();
        let parameters: Vec<String> = parameters
            .map(|(name, value)| format!("{name} = {}", crate::registry::display(value)))
            .collect();
        let metric = match parameters.is_empty() {
            true => format!("`{}`", self.name),
            false => format!("`{}` ({})", self.name, parameters.join(", ")),
        };
        Failure { metric, property, reason, case }
    }
}

/// A property that fails for a metric.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Name of the metric, with the parameters that differ from their defaults.
    pub metric: String,
    /// The property that fails.
    pub property: Property,
    /// How it fails.
    pub reason: String,
    /// Smallest matrix found for which it fails.
    pub case: Option<Case>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "metric {}, {}: {}", self.metric, self.property, self.reason)?;
        match &self.case {
            Some(case) => write!(f, "\nthe smallest case found:\n{case}"),
            None => Ok(()),
        }
    }
}

/// What is wrong, and the case where it is.
type Found = Option<(String, Option<Case>)>;

/// The same cases in every run, unless the environment asks for others.
fn runner() -> TestRunner {
    let config =
        Config { failure_persistence: None, max_shrink_iters: 1 << 16, ..Config::default() };
    let rng_seed = match config.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0),
        seed => seed,
    };
    TestRunner::new(Config { rng_seed, ..config })
}

/// The smallest case found that fails a test.
fn smallest(
    cases: &impl Strategy<Value = Case>,
    test: impl Fn(&Case) -> Result<(), String>,
) -> Found {
    match runner().run(cases, |case| test(&case).map_err(TestCaseError::fail)) {
        Ok(()) => None,
        Err(TestError::Fail(reason, case)) => {
            let mut found = (reason.message().to_owned(), case);
            loop {
                let mut parts = found.1.parts();
                let smaller = parts.find_map(|part| Some((test(&part).err()?, part)));
                drop(parts);
                match smaller {
                    Some(smaller) => found = smaller,
                    None => break,
                }
            }
            Some((found.0, Some(found.1)))
        }
        Err(TestError::Abort(reason)) => Some((reason.message().to_owned(), None)),
    }
}

/// Some ordinary cases.
fn examples() -> Vec<Case> {
    let (mut runner, cases) = (runner(), case::ordinary());
    let examples = (0..64).filter_map(|_| Some(cases.new_tree(&mut runner).ok()?.current()));
    examples.collect()
}

#[cfg(test)]
mod tests;
