//! The interface of Barber's metric plugins.
//!
//! A metric turns what is known of one weight matrix, [`LayerStats`], into a score for each of its
//! weights. Metrics form a pipeline: scores start at 1 and each step transforms the scores of the
//! step before. The rebuild brings back pruned weights that score high and drops kept ones that
//! score low.
//!
//! A plugin is a crate that implements [`Metric`] and submits a [`MetricPlugin`]; nothing else has
//! to name it but the binary that links it. With the feature `testing`, the module `testing` checks
//! what is expected of every metric.
//!
//! ```
//! use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
//!
//! /// Parameters of the metric, as a recipe's `[[metric]]` table gives them.
//! #[derive(Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields, default)]
//! struct Constant {
//!     /// What every score is multiplied by.
//!     factor: f32,
//! }
//!
//! impl Metric for Constant {
//!     fn needs(&self) -> Needs {
//!         Needs::NOTHING
//!     }
//!     fn score(&self, _: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
//!         scores.iter_mut().for_each(|score| *score *= self.factor);
//!         Ok(())
//!     }
//! }
//!
//! inventory::submit! { MetricPlugin::of::<Constant>("constant", "a constant factor") }
//!
//! assert!(barber_metric::registered().unwrap().contains_key("constant"));
//! ```

mod power;
pub mod random;
mod registry;
mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use figment;
pub use inventory;
pub use power::Power;
pub use registry::{Duplicate, MetricPlugin, Parameter, registered};
pub use stats::{Dims, Error, LayerStats, Needs};

/// A step of the metric pipeline. It works on slices in host memory: a metric knows no device.
pub trait Metric: Send + Sync {
    /// The statistics that [`Metric::score`] will ask for; what no step needs is not computed.
    fn needs(&self) -> Needs;

    /// Transforms `scores`, one per weight in the row-major order of [`LayerStats::weight`].
    ///
    /// # Errors
    /// [`Error`] if a statistic is missing that [`Metric::needs`] did not declare, or if the
    /// metric cannot score this matrix.
    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error>;
}
