//! SIGINT and SIGTERM: the run ends at once, and says what is left of it.
//!
//! The state of a run is whole at any instant, so the layer that is being worked on is dropped: it
//! may take longer than whoever asked will wait.

use std::path::PathBuf;

/// From now on, a signal that ends the run says what it leaves beside its output, one of these, to go
/// on from. The exit status is 128 and the signal's number, as shells have it.
///
/// # Errors
/// If the system does not hand the signals over.
#[cfg(unix)]
pub(super) fn announce(outputs: Vec<PathBuf>) -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
    };

    use crate::checkpoint::left_behind;

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let name = if signal == SIGINT { "SIGINT" } else { "SIGTERM" };
            match outputs.iter().find_map(|output| left_behind(output)) {
                Some((dir, label)) => eprintln!(
                    "\n{name}: stopped; {} holds the run as of its last save ({label}): run again \
                     with --resume to go on from there",
                    super::show(&dir)
                ),
                None => eprintln!("\n{name}: stopped before the first save; nothing is left"),
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Elsewhere a signal ends the run without words.
#[cfg(not(unix))]
pub(super) fn announce(_: Vec<PathBuf>) -> std::io::Result<()> {
    Ok(())
}
