//! Who watches a run.

use indicatif::ProgressBar;

use crate::{family::Decoder, plan::Plan, recipe::Recipe};

/// Who watches a run. What a watcher does not say, nobody hears.
pub trait Watch {
    /// The run is ready to go: which matrices of a decoder it will prune, and how.
    fn begin(&self, _recipe: &Recipe, _decoder: &Decoder, _plan: &Plan) {}

    /// The run goes on from where one was cut off, if one was.
    fn resumes(&self, _from: Option<&str>) {}

    /// A phase of so many steps begins; they are counted on the bar that is returned.
    fn bar(&self, _phase: &str, _steps: u64) -> ProgressBar {
        ProgressBar::hidden()
    }
}

/// Nobody watches.
impl Watch for () {}
