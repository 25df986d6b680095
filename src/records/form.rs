//! The form of a file's contents, by its first and last bytes, or else by its name.

use std::{
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use crate::files;

/// The form of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Plain text.
    Text,
    /// Records in JSON: one per line, or a list.
    Json,
    /// Records in Parquet.
    Parquet,
}

/// The first and last bytes of a Parquet file.
const PARQUET: [u8; 4] = *b"PAR1";

impl Form {
    /// The form of a file; for a file that cannot be read, by its name.
    pub fn of(path: &Path) -> Self {
        if is_parquet(path).unwrap_or(false) {
            return Self::Parquet;
        }
        match extension(path).as_str() {
            "jsonl" | "ndjson" | "jsonlines" | "json" => Self::Json,
            "parquet" | "parq" | "pq" => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// Whether a file begins and ends like Parquet.
fn is_parquet(path: &Path) -> std::io::Result<bool> {
    let mut file = files::open(path)?;
    let (mut first, mut last) = ([0; 4], [0; 4]);
    file.read_exact(&mut first)?;
    if first != PARQUET {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-4))?;
    file.read_exact(&mut last)?;
    Ok(last == PARQUET)
}

/// The extension of a file's name in lower case, without an extension of a compression.
pub(crate) fn extension(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let compressed = [".gz", ".gzip", ".zst", ".zstd"];
    let name = compressed.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    name.rsplit_once('.').map(|(_, extension)| extension.to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bytes_say_what_a_file_holds() {
        let named = |name: &str| Form::of(Path::new(name));
        for name in ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "A.JSONL", "a.b.Json"] {
            for ending in ["", ".gz", ".gzip", ".zst", ".zstd", ".GZ", ".Zst"] {
                assert_eq!(named(&format!("dir/{name}{ending}")), Form::Json, "{name}{ending}");
            }
        }
        for name in ["a.parquet", "a.PARQUET", "a.parq", "a.pq"] {
            assert_eq!(named(name), Form::Parquet, "{name}");
        }
        for name in ["a.txt", "a", "jsonl", "a.jsonl.txt", "a.gz", "parquet.gz", ""] {
            assert_eq!(named(name), Form::Text, "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "a.txt", "a.jsonl"] {
            let path = dir.path().join(name);
            std::fs::copy("tests/fixtures/records.parquet", &path).unwrap();
            assert_eq!(Form::of(&path), Form::Parquet, "{name}");
        }
        let path = dir.path().join("b.txt");
        std::fs::write(&path, "PAR1 is how they begin").unwrap();
        assert_eq!(Form::of(&path), Form::Text);
        std::fs::write(&path, "PAR").unwrap();
        assert_eq!(Form::of(&path), Form::Text);
    }
}
