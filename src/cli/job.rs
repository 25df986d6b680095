//! A command that the ranks of a job run together: the first one prints, and an error of one ends all.

use std::time::Duration;

use super::{Error, print, progress::mute};
use crate::ranks::Ranks;

/// What ranks share.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Split {
    /// Each rank takes whole runs.
    Runs,
}

/// Runs a command on the ranks of the launcher's job.
pub(super) fn run(command: impl FnOnce(&Ranks) -> Result<(), Error>) -> Result<(), Error> {
    let ranks = Ranks::of_job()?;
    if !ranks.is_first() {
        mute();
    }
    match command(&ranks) {
        Err(error) if ranks.size() > 1 => end_all(error, &ranks),
        result => result,
    }
}

/// The time after which a rank reports its error itself: the first rank has reported by then what all
/// ranks have found.
const GRACE: Duration = Duration::from_secs(3);

/// Reports an error of one of several ranks, and ends them all.
fn end_all(error: Error, ranks: &Ranks) -> ! {
    let status = error.status();
    let mut report = error.report();
    if !ranks.is_first() {
        std::thread::sleep(GRACE);
        report = report.wrap_err(format!("rank {}", ranks.rank()));
    }
    print::message(&format!("{report:?}\n"));
    ranks.abort(status.into())
}
