//! What the program says: results on standard output, messages on standard error. A reader who has
//! seen enough, or is gone, is no error of a run.

use std::{
    fmt::Arguments,
    io::{ErrorKind, Write, stderr, stdout},
    sync::OnceLock,
};

use super::clean::clean;

/// Why not all could be printed: the first error.
static FAILED: OnceLock<String> = OnceLock::new();

/// Prints a line, as `println!` does within the command line. `barber … | head` closes the pipe: the
/// rest is then printed for nobody, and the run goes on to write its files.
pub(super) fn line(line: Arguments<'_>) {
    bytes(clean(&format!("{line}\n")).as_bytes());
}

/// Prints bytes as they are.
pub(super) fn bytes(bytes: &[u8]) {
    let mut out = stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = FAILED.set(error.to_string());
        }
        _ => {}
    }
}

/// Why not all could be printed, if so.
pub(super) fn failed() -> Option<&'static str> {
    FAILED.get().map(String::as_str)
}

/// Prints a message that is clean, with its colours. Where standard error is closed or full, nobody
/// reads it, and the exit status has to say it.
pub(super) fn message(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}
