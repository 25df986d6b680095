//! Watchers of a run.

use std::time::Duration;

use super::{Error, ScheduledPhase};
use crate::{
    checkpoint::Reader,
    family::Decoder,
    plan::Plan,
    progress::{Bar, Steps},
    recipe::Recipe,
};

/// Watches a run, for example to print its progress.
pub trait Watch {
    /// The run is about to begin; the plan has the matrices of the dense checkpoint that it will
    /// prune.
    fn begin(&self, _recipe: &Recipe, _dense: &Reader, _decoder: &Decoder, _plan: &Plan) {}

    /// The run begins anew; `time` estimates its duration, which takes up to a second.
    fn takes(&self, _time: &dyn Fn() -> Result<Duration, Error>) {}

    /// The run resumes from a saved place; `None` if nothing was saved.
    fn resumes(&self, _from: Option<&str>) {}

    /// The phases of the run. Some may be done already, or turn out not to be needed.
    fn expect(&self, _phases: &[ScheduledPhase]) {}

    /// A phase begins. The returned bar counts its steps, and is dropped when the phase ends.
    fn bar(&self, _phase: &str, _steps: Steps) -> Box<dyn Bar> {
        Box::new(())
    }
}

/// Watches nothing.
impl Watch for () {}
