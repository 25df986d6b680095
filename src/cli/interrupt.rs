//! Handles SIGINT and SIGTERM: the run ends at once, and prints its saved state.
//!
//! The saved state of a run is complete at any time, so the current layer is dropped: finishing it
//! might take too long.

use std::path::PathBuf;

#[cfg(unix)]
use super::{clean::clean, print, show};
#[cfg(unix)]
use crate::checkpoint::left_behind;

/// Installs a handler: a signal prints the saved state beside one of these outputs and ends the
/// process. The exit status is 128 plus the signal's number, as in shells.
///
/// # Errors
/// If the system refuses the handler.
#[cfg(unix)]
pub(super) fn announce(outputs: Vec<PathBuf>) -> std::io::Result<()> {
    use std::{sync::mpsc, thread, time::Duration};

    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
    };

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let (done, said) = mpsc::channel();
            thread::spawn(move || {
                print::message(&clean(&farewell(signal == SIGINT, &outputs)));
                done.send(())
            });
            // A pipe that nobody reads must not block the exit.
            let _ = said.recv_timeout(Duration::from_secs(1));
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The message about the saved state.
#[cfg(unix)]
fn farewell(interrupt: bool, outputs: &[PathBuf]) -> String {
    let name = if interrupt { "SIGINT" } else { "SIGTERM" };
    match outputs.iter().find_map(|output| left_behind(output)) {
        Some((dir, label)) => format!(
            "\n{name}: stopped; {} holds the run as of its last save ({label}): run again with \
             --resume to go on from there\n",
            show(&dir)
        ),
        None => format!("\n{name}: stopped before the first save; nothing is left\n"),
    }
}

/// On other systems, a signal ends the run without a message.
#[cfg(not(unix))]
pub(super) fn announce(_: Vec<PathBuf>) -> std::io::Result<()> {
    Ok(())
}
