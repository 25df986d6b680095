//! The saved state of a run on disk, from which an interrupted run continues.
//!
//! A journal is a directory of files that are written once. Save `n` consists of `n.kept`, which
//! adds to the saves before, and `n.state`, which replaces theirs; a save exists once `n.state`
//! does. Each file is complete and synced before it is renamed to its name, and `n.kept` comes
//! before `n.state`, so the last save is complete even after a power failure. A state has the
//! version that wrote it and the digests of all saves up to its own, so missing, exchanged or
//! foreign files are detected.

mod identity;
mod record;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub(crate) use self::{
    identity::{Identity, changed},
    record::{Entries, Record},
};
use crate::{files, version::Version};

/// Why the state of a run cannot be saved or used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{}: damaged: {problem}; the run cannot continue from it. Start anew with --force",
        path.display()
    )]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "{} is missing from the state of the run, which cannot continue without it. Put it back, \
         or start anew with --force",
        .0.display()
    )]
    Missing(PathBuf),
    #[error(
        "{} is the state of a run of {by}, which {} cannot resume. Resume it with the former, or \
         start anew with --force",
        dir.display(), Version::current()
    )]
    OtherVersion { dir: PathBuf, by: String },
    #[error(
        "{} is the state of a different run: {}. Undo the change to resume it, or start anew with \
         --force",
        dir.display(), differences.join("; ")
    )]
    OtherRun { dir: PathBuf, differences: Vec<String> },
    #[error("the state of the run cannot be written as text: {0}")]
    Text(String),
}

impl Error {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// The journal in a directory.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    /// The digests of the `kept` files so far, in order.
    kept: Vec<String>,
}

/// The first entry of a state.
#[derive(Serialize, Deserialize)]
struct Title {
    /// The place of the run, in words.
    label: String,
    /// The version of the program that wrote the state.
    version: Version,
    /// The digests of the `kept` files up to this save, in order.
    kept: Vec<String>,
}

const KEPT: &str = "kept";
const STATE: &str = "state";
/// Name of a file until it is complete.
const DRAFT: &str = "draft";

fn file(dir: &Path, save: u64, kind: &str) -> PathBuf {
    dir.join(format!("{save:06}.{kind}"))
}

impl Journal {
    /// Opens the journal in the existing directory `dir`, and removes the remains of an incomplete
    /// save.
    ///
    /// # Errors
    /// If the directory cannot be read or tidied, a file is missing, or another version wrote it.
    /// On an error nothing is removed.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let journal = Self::read(dir)?;
        journal.tidy()?;
        Ok(journal)
    }

    /// Opens the journal in the existing directory `dir` without changing it.
    ///
    /// # Errors
    /// If the directory cannot be read, a file is missing, or another version wrote it.
    pub(crate) fn read(dir: &Path) -> Result<Self, Error> {
        let kept = match Self::last(dir)? {
            Some(last) => Self::title(dir, last)?.0.kept,
            None => Vec::new(),
        };
        let there = Self::saves(dir, KEPT)?;
        if let Some(save) = (0..kept.len() as u64).find(|save| !there.contains(save)) {
            return Err(Error::Missing(file(dir, save, KEPT)));
        }
        Ok(Self { dir: dir.to_owned(), kept })
    }

    /// Whether `dir` has a save.
    ///
    /// # Errors
    /// If the directory cannot be read, or a state is missing.
    pub(crate) fn has_saves(dir: &Path) -> Result<bool, Error> {
        Ok(Self::last(dir)?.is_some())
    }

    /// The number of the last save in `dir`.
    fn last(dir: &Path) -> Result<Option<u64>, Error> {
        let last = Self::saves(dir, STATE)?.pop();
        // The next save may be incomplete: kept without a state.
        match Self::saves(dir, KEPT)?.pop() {
            Some(kept) if kept > last.map_or(0, |last| last + 1) => {
                Err(Error::Missing(file(dir, kept, STATE)))
            }
            _ => Ok(last),
        }
    }

    /// The numbers of the files of a kind, in order.
    fn saves(dir: &Path, kind: &str) -> Result<Vec<u64>, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
            let path = entry.map_err(|e| Error::io(dir, e))?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
            found.extend(number.filter(|save| path == file(dir, *save, kind)));
        }
        found.sort_unstable();
        Ok(found)
    }

    fn draft(&self) -> PathBuf {
        self.dir.join(DRAFT)
    }

    /// Whether a file of this name is a journal's.
    pub(crate) fn has(name: &str) -> bool {
        let save = |(number, kind): (&str, &str)| {
            [KEPT, STATE].contains(&kind) && number.bytes().all(|byte| byte.is_ascii_digit())
        };
        name == DRAFT || name.split_once('.').is_some_and(save)
    }

    /// Removes files that are not part of the last save.
    fn tidy(&self) -> Result<(), Error> {
        let next = self.kept.len() as u64;
        let states = Self::saves(&self.dir, STATE)?.into_iter();
        let states = states.filter(|save| save + 1 != next).map(|save| (save, STATE));
        let kept = Self::saves(&self.dir, KEPT)?.into_iter();
        let kept = kept.filter(|save| *save >= next).map(|save| (save, KEPT));
        let files = states.chain(kept).map(|(save, kind)| file(&self.dir, save, kind));
        for path in files.chain([self.draft()]) {
            files::remove(&path).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }

    /// The label of the last save in `dir`, if there is one.
    ///
    /// # Errors
    /// If the save cannot be read.
    pub(crate) fn label(dir: &Path) -> Result<Option<String>, Error> {
        let last = Self::last(dir)?;
        last.map(|last| Ok(Self::title(dir, last)?.0.label)).transpose()
    }

    /// The title of a save's state in `dir`, and the entries after it.
    fn title(dir: &Path, save: u64) -> Result<(Title, Entries), Error> {
        let mut entries = Entries::open(file(dir, save, STATE))?;
        let title: Title = entries.next_toml()?;
        if title.version != Version::current() {
            return Err(entries.foreign(&title.version, "its format has another version"));
        }
        if title.kept.len() as u64 != save + 1 {
            return Err(entries.damaged("it belongs to another save"));
        }
        Ok((title, entries))
    }

    /// Adds a save: `kept` stays as long as the journal, `state` until the next save. `label` is
    /// the place of the run, for the user.
    ///
    /// # Errors
    /// If a file cannot be written. The last save is then still the one before.
    pub(crate) fn save<E: From<Error>>(
        &mut self,
        label: &str,
        kept: impl FnOnce(&mut Record) -> Result<(), E>,
        state: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let save = self.kept.len() as u64;
        let digest = self.write(&file(&self.dir, save, KEPT), kept)?;
        let kept = [&self.kept[..], &[digest]].concat();
        let title = Title { label: label.into(), version: Version::current(), kept };
        self.write(&file(&self.dir, save, STATE), |record| {
            record.add_toml(&title)?;
            state(record)
        })?;
        self.kept = title.kept;
        Ok(self.tidy()?)
    }

    /// Writes a file; returns its digest.
    fn write<E: From<Error>>(
        &self,
        path: &Path,
        contents: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<String, E> {
        let mut record = Record::create(self.draft())?;
        contents(&mut record)?;
        let digest = record.finish()?;
        let named = files::rename(&self.draft(), path).and_then(|()| files::sync_dir(&self.dir));
        named.map_err(|e| Error::io(path, e))?;
        Ok(digest)
    }

    /// The entries of the `kept` files so far, in order.
    pub(crate) fn kept(&self) -> impl Iterator<Item = Result<Entries, Error>> {
        let open = |(save, digest): (u64, &String)| {
            Ok(Entries::open(file(&self.dir, save, KEPT))?.expecting(digest))
        };
        (0..).zip(&self.kept).map(open)
    }

    /// The entries of the last save's state, if there is a save.
    ///
    /// # Errors
    /// If the state cannot be read.
    pub(crate) fn state(&self) -> Result<Option<Entries>, Error> {
        let Some(last) = (self.kept.len() as u64).checked_sub(1) else { return Ok(None) };
        Ok(Some(Self::title(&self.dir, last)?.1))
    }
}
