//! A file of the journal: entries of bytes, each preceded by its length, and a digest at the end.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    path::PathBuf,
};

use sha2::{Digest, Sha256};

use super::Error;
use crate::files;

/// Bytes of the digest at the end.
const DIGEST: u64 = 32;

/// A file that is being written.
pub(crate) struct Record {
    path: PathBuf,
    file: files::Writing,
    hasher: Sha256,
}

impl Record {
    pub(super) fn create(path: PathBuf) -> Result<Self, Error> {
        let file = files::create(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file, hasher: Sha256::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }

    /// Adds an entry.
    pub(crate) fn add(&mut self, entry: &[u8]) -> Result<(), Error> {
        self.write(&(entry.len() as u64).to_le_bytes())?;
        self.write(entry)
    }

    /// Adds an entry of TOML, which describes the entries after it.
    pub(crate) fn add_toml(&mut self, entry: &dyn erased_serde::Serialize) -> Result<(), Error> {
        let text = toml::to_string(entry).map_err(|e| Error::Text(e.to_string()))?;
        self.add(text.as_bytes())
    }

    /// Syncs the file to the disk; returns its digest.
    pub(super) fn finish(mut self) -> Result<String, Error> {
        let digest = self.hasher.finalize_reset();
        let written = self.file.write_all(&digest).and_then(|()| self.file.finish());
        written.map_err(|e| Error::io(&self.path, e))?;
        Ok(format!("{digest:x}"))
    }
}

/// The assumed writer of a file whose entries have other types.
const BY: &str = "another version of barber";

/// The entries of a file, in order.
pub(crate) struct Entries {
    path: PathBuf,
    file: BufReader<File>,
    hasher: Sha256,
    /// Number of unread bytes before the digest.
    left: u64,
    /// The expected digest of the file, if known.
    expected: Option<String>,
}

impl Entries {
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let size = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        let mut entries = Self {
            path,
            file: BufReader::with_capacity(1 << 20, file),
            hasher: Sha256::new(),
            left: 0,
            expected: None,
        };
        entries.left = size.checked_sub(DIGEST).ok_or_else(|| entries.damaged("cut short"))?;
        Ok(entries)
    }

    /// The entries, with an expected digest of the file.
    pub(super) fn expecting(self, digest: &str) -> Self {
        Self { expected: Some(digest.into()), ..self }
    }

    /// The error of a damaged file.
    pub(crate) fn damaged(&self, problem: impl ToString) -> Error {
        Error::Damaged { path: self.path.clone(), problem: problem.to_string() }
    }

    fn read(&mut self, length: u64) -> Result<Vec<u8>, Error> {
        // A damaged length may be larger than the file.
        let left = self.left.checked_sub(length).ok_or_else(|| self.damaged("cut short"))?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes).map_err(|e| Error::io(&self.path, e))?;
        self.left = left;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    /// The next entry.
    pub(crate) fn next(&mut self) -> Result<Vec<u8>, Error> {
        let length = self.read(8)?;
        let length = length.try_into().map_or(u64::MAX, u64::from_le_bytes);
        self.read(length)
    }

    /// The next entry, as TOML.
    pub(crate) fn next_toml<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, Error> {
        let bytes = self.next()?;
        let text = std::str::from_utf8(&bytes).map_err(|e| self.damaged(e))?;
        // Compiles each type's code once, not once for each of TOML's deserialisers.
        let parsed = toml::Deserializer::parse(text).map_err(|e| self.foreign(BY, e))?;
        erased_serde::deserialize(&mut <dyn erased_serde::Deserializer>::erase(parsed))
            .map_err(|e| self.foreign(BY, e))
    }

    /// The error of a file that cannot be parsed: another program wrote it, or it is damaged.
    pub(super) fn foreign(&self, by: impl ToString, problem: impl ToString) -> Error {
        match Self::open(self.path.clone()).and_then(Self::whole) {
            Ok(true) => {
                let dir = self.path.parent().unwrap_or(&self.path).to_owned();
                Error::OtherVersion { dir, by: by.to_string() }
            }
            Ok(false) => self.damaged(problem),
            Err(error) => error,
        }
    }

    /// Checks that nothing follows, and that the digest matches.
    pub(crate) fn end(&mut self) -> Result<(), Error> {
        let digest = self.hasher.finalize_reset();
        if self.left > 0 || self.written_digest()? != digest[..] {
            return Err(self.damaged("its contents do not match its digest"));
        }
        match &self.expected {
            Some(expected) if *expected != format!("{digest:x}") => {
                Err(self.damaged("this run saved something else there"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the digest matches the contents, of which nothing has been read yet.
    fn whole(mut self) -> Result<bool, Error> {
        io::copy(&mut self.file.by_ref().take(self.left), &mut self.hasher)
            .map_err(|e| Error::io(&self.path, e))?;
        let digest = self.hasher.finalize_reset();
        Ok(self.written_digest()? == digest[..])
    }

    /// The digest at the end.
    fn written_digest(&mut self) -> Result<[u8; DIGEST as usize], Error> {
        let mut digest = [0; DIGEST as usize];
        self.file.read_exact(&mut digest).map_err(|e| Error::io(&self.path, e))?;
        Ok(digest)
    }
}
