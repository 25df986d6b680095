//! The interface of Barber's metric plugins.
//!
//! A metric computes a score for each weight of a matrix from the matrix's statistics,
//! [`LayerStats`]. Metrics form a pipeline: scores start at 1 and each step transforms the scores
//! of the step before. The rebuild brings back pruned weights with high scores and prunes kept
//! weights with low scores.
//!
//! A plugin is a crate that implements [`Metric`] and submits a [`MetricPlugin`]; only the binary
//! that links it has to name it. With the feature `testing`, the module `testing` checks the
//! properties that every metric must have.
//!
//! ```
//! use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
//!
//! /// Parameters of the metric, as a recipe's `[[metric]]` table gives them.
//! #[derive(Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields, default)]
//! struct Constant {
//!     /// Factor of every score.
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
mod structures;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use figment;
pub use inventory;
pub use power::Power;
pub use registry::{Duplicate, MetricPlugin, Parameter, registered};
pub use stats::{Dims, Error, LayerStats, Needs};
pub use structures::StructureStats;

/// A step of the metric pipeline. It works on slices in host memory: a metric knows no device.
pub trait Metric: Send + Sync {
    /// The statistics that [`Metric::score`] uses. Statistics that no step needs are not computed.
    fn needs(&self) -> Needs;

    /// Transforms `scores`, one per weight in the row-major order of [`LayerStats::weight`].
    ///
    /// # Errors
    /// [`Error`] if a statistic is missing that [`Metric::needs`] did not declare, or if the
    /// metric cannot score this matrix.
    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error>;

    /// The kinds of structures that the metric scores directly, by their names in a recipe's
    /// `sparsity.structure`. A metric that scores some scores no single weights.
    fn structures(&self) -> &'static [&'static str] {
        &[]
    }

    /// Transforms the `scores` of structures. Before the first step they are the sums of their weights'
    /// scores, or 1 if no step scores weights.
    ///
    /// # Errors
    /// [`Error`] if a statistic is missing that [`Metric::needs`] did not declare, or if the metric
    /// cannot score these structures.
    fn score_structures(
        &self,
        stats: &StructureStats<'_>,
        scores: &mut [f64],
    ) -> Result<(), Error> {
        let _ = (stats, scores);
        Ok(())
    }
}
