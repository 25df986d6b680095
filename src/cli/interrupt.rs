//! SIGINT and SIGTERM: the run ends at once, and says what is left of it.
//!
//! The state of a run is whole at any instant, so the layer that is being worked on is dropped: it
//! may take longer than whoever asked will wait.

use std::path::PathBuf;

#[cfg(unix)]
use super::{clean::clean, print, show};
#[cfg(unix)]
use crate::checkpoint::left_behind;

/// From now on, a signal that ends the run says what it leaves beside its output, one of these, to go
/// on from. The exit status is 128 and the signal's number, as shells have it.
///
/// # Errors
/// If the system does not hand the signals over.
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
            // A pipe that nobody reads does not hold up the end.
            let _ = said.recv_timeout(Duration::from_secs(1));
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// What a signal leaves.
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

/// Elsewhere a signal ends the run without words.
#[cfg(not(unix))]
pub(super) fn announce(_: Vec<PathBuf>) -> std::io::Result<()> {
    Ok(())
}
