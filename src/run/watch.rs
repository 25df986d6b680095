//! Who watches a run.

use std::time::Duration;

use indicatif::ProgressBar;

use super::{Error, ToCome};
use crate::{family::Decoder, plan::Plan, recipe::Recipe};

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
    fn expect(&self, _phases: &[ToCome]) {}

    /// A phase begins; its steps are counted on the bar that is returned.
    fn bar(&self, _phase: &str, _steps: Steps) -> ProgressBar {
        ProgressBar::hidden()
    }
}

/// What the steps of a phase are, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Decoder layers.
    Layers(usize),
    /// Bytes of a file or of several.
    Bytes(u64),
    /// Equal parts of its work.
    Parts(u64),
}

impl Steps {
    /// How many there are.
    pub const fn count(self) -> u64 {
        match self {
            Self::Layers(layers) => layers as u64,
            Self::Bytes(count) | Self::Parts(count) => count,
        }
    }
}

/// Nobody watches.
impl Watch for () {}
