//! Digests of files and texts, which identify the inputs of a result.

use std::{
    io::{self, Read},
    path::Path,
};

use sha2::{Digest, Sha256};

use super::Error;
use crate::files;

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// If it is not a regular file, or cannot be read.
pub fn digest(path: &Path) -> Result<String, Error> {
    let io = |e| Error::io(path, e);
    let mut hasher = Sha256::new();
    let file = files::open(path).map_err(io)?;
    // Reads no more than the present length, as a process could append for ever.
    let length = file.metadata().map_err(io)?.len();
    io::copy(&mut file.take(length), &mut hasher).map_err(io)?;
    Ok(format!("{:x}", hasher.finalize()))
}

/// The SHA-256 of a text, in hexadecimal.
pub fn digest_text(text: &str) -> String {
    format!("{:x}", Sha256::digest(text))
}
