//! Digests of files and texts, which say what a result was made from.

use std::{fs::File, io, path::Path};

use sha2::{Digest, Sha256};

use super::Error;

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// If the file cannot be read.
pub fn digest(path: &Path) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    io::copy(&mut file, &mut hasher).map_err(|e| Error::io(path, e))?;
    Ok(hexadecimal(&hasher.finalize()))
}

/// The SHA-256 of a text, in hexadecimal.
pub fn digest_text(text: &str) -> String {
    hexadecimal(&Sha256::digest(text))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
