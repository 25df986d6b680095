//! Who watches a run.

use std::time::Duration;

use super::{Error, ScheduledPhase};
use crate::{
    family::Decoder,
    plan::Plan,
    progress::{Bar, Steps},
    recipe::Recipe,
};

/// Who watches a run. What a watcher does not say, nobody hears.
pub trait Watch {
    /// The run is ready to go: which matrices of a decoder it will prune, and how.
    fn begin(&self, _recipe: &Recipe, _decoder: &Decoder, _plan: &Plan) {}

    /// A run that begins anew can say about how long it will take; to find that out takes up to a
    /// second.
    fn takes(&self, _time: &dyn Fn() -> Result<Duration, Error>) {}

    /// The run goes on from where one was cut off, if one was.
    fn resumes(&self, _from: Option<&str>) {}

    /// What the run will do, phase by phase. Some of it may be done already, or not be needed.
    fn expect(&self, _phases: &[ScheduledPhase]) {}

    /// A phase begins; the bar that is returned counts its steps, and is dropped at the phase's end.
    fn bar(&self, _phase: &str, _steps: Steps) -> Box<dyn Bar> {
        Box::new(())
    }
}

/// Nobody watches.
impl Watch for () {}
