//! Standard output: results go through here, and a reader who has seen enough is no error.

use std::{
    fmt::Arguments,
    io::{ErrorKind, Write, stdout},
    sync::OnceLock,
};

/// Why not all could be printed: the first error.
static FAILED: OnceLock<String> = OnceLock::new();

/// Prints a line, as `println!` does within the command line. `barber … | head` closes the pipe: the
/// rest is then printed for nobody, and the run goes on to write its files.
pub(super) fn line(line: Arguments<'_>) {
    bytes(format!("{line}\n").as_bytes());
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
