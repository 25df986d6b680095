//! Reports on disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::Report;

/// The name of a report in the directory that a run wrote.
pub const JSON: &str = "barber-report.json";

/// The name of its page.
pub const HTML: &str = "barber-report.html";

/// Why a report could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("{}: {source}; give a directory that `barber prune` wrote, a directory of such, or a {JSON}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no report.
    #[error("{}: no report of a run: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: serde_json::Error,
    },
}

/// Reads the report of a run: a JSON file, or the one in the directory that the run wrote.
///
/// # Errors
/// If there is none, or it is none.
pub fn read(path: &Path) -> Result<Report, Error> {
    let path = if path.is_dir() { path.join(JSON) } else { path.to_owned() };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(Error::Read { path, source }),
    };
    serde_json::from_slice(&text).map_err(|problem| Error::Format { path, problem })
}
