//! Prints results to standard output and messages to standard error. A closed pipe is not an error
//! of a run.

use std::{
    fmt::Arguments,
    io::{ErrorKind, Write, stderr, stdout},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use super::clean::clean;

/// The first error of printing.
static FAILED: OnceLock<String> = OnceLock::new();

/// Whether another process prints the results.
static MUTE: AtomicBool = AtomicBool::new(false);

/// Drops all results from now on: another process prints them.
pub(super) fn mute() {
    MUTE.store(true, Ordering::Relaxed);
}

/// Whether results are dropped.
pub(super) fn is_mute() -> bool {
    MUTE.load(Ordering::Relaxed)
}

/// Prints a line, for the command line's `println!`. If the pipe is closed, as by `barber … |
/// head`, the rest is dropped, and the run continues to write its files.
pub(super) fn line(line: Arguments<'_>) {
    bytes(clean(&format!("{line}\n")).as_bytes());
}

/// Prints bytes as they are.
pub(super) fn bytes(bytes: &[u8]) {
    if is_mute() {
        return;
    }
    let mut out = stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = FAILED.set(error.to_string());
        }
        _ => {}
    }
}

/// The first error of printing, if there was one.
pub(super) fn failed() -> Option<&'static str> {
    FAILED.get().map(String::as_str)
}

/// Prints a message that is cleaned already, with its colours. If standard error is closed or full,
/// only the exit status tells.
pub(super) fn message(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}
