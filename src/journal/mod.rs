//! The state of a run on disk, from which it goes on when it was cut off.
//!
//! A journal is a directory of files that are written once. Save `n` is `n.kept`, what it adds to
//! the saves before, and `n.state`, what takes the place of theirs; a save counts once its state has
//! its name. Each file is complete and on the disk before it gets it, and what a save needs is named
//! before the save is: wherever a run ends, or the power with it, the last save is whole.

mod identity;
mod record;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub(crate) use self::{
    identity::Identity,
    record::{Entries, Record},
};
use crate::files;

/// Why the state of a run cannot be kept, or used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{}: damaged: {problem}; the run cannot go on from there. Start it anew with --force",
        path.display()
    )]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "{} is the state of another run, and cannot be resumed by this one: {}. Undo that, or start \
         anew with --force",
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
    /// The last save.
    last: Option<u64>,
}

const KEPT: &str = "kept";
const STATE: &str = "state";

impl Journal {
    /// The journal in `dir`, which must be there. What is left of a save that was cut off goes.
    ///
    /// # Errors
    /// If the directory cannot be read or tidied.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let last = Self::saves(dir, STATE)?.into_iter().max();
        let journal = Self { dir: dir.to_owned(), last };
        journal.tidy()?;
        Ok(journal)
    }

    /// Whether there is a save in `dir`.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub(crate) fn has_saves(dir: &Path) -> Result<bool, Error> {
        Ok(!Self::saves(dir, STATE)?.is_empty())
    }

    /// The numbers of the files of a kind.
    fn saves(dir: &Path, kind: &str) -> Result<Vec<u64>, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
            let name = entry.map_err(|e| Error::io(dir, e))?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('.'));
            if let Some((number, _)) = parts.filter(|(_, found)| *found == kind) {
                found.extend(number.parse::<u64>().ok());
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn file(&self, save: u64, kind: &str) -> PathBuf {
        self.dir.join(format!("{save:06}.{kind}"))
    }

    /// Where a file is until it is complete.
    fn draft(&self) -> PathBuf {
        self.dir.join("draft")
    }

    /// Removes what is no part of the last save.
    fn tidy(&self) -> Result<(), Error> {
        let states = Self::saves(&self.dir, STATE)?.into_iter();
        let states = states.filter(|save| Some(*save) != self.last).map(|save| (save, STATE));
        let kept = Self::saves(&self.dir, KEPT)?.into_iter();
        let kept = kept.filter(|save| Some(*save) > self.last).map(|save| (save, KEPT));
        let files = states.chain(kept).map(|(save, kind)| self.file(save, kind));
        for path in files.chain([self.draft()]) {
            files::remove(&path).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }

    /// What the last save in `dir` is called, if there is one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn label(dir: &Path) -> Result<Option<String>, Error> {
        let last = Self::saves(dir, STATE)?.into_iter().max();
        let Some(last) = last else { return Ok(None) };
        let mut state = Entries::open(dir.join(format!("{last:06}.{STATE}")))?;
        Ok(Some(String::from_utf8_lossy(&state.next()?).into_owned()))
    }

    /// Saves: `kept` stays as long as the journal, `state` until the next save. `label` says to the
    /// user where the run is.
    ///
    /// # Errors
    /// If a file cannot be written. The save before then is the last one still.
    pub(crate) fn save<E: From<Error>>(
        &mut self,
        label: &str,
        kept: impl FnOnce(&mut Record) -> Result<(), E>,
        state: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let save = self.last.map_or(0, |last| last + 1);
        self.write(&self.file(save, KEPT), kept)?;
        self.write(&self.file(save, STATE), |record| {
            record.add(label.as_bytes())?;
            state(record)
        })?;
        self.last = Some(save);
        Ok(self.tidy()?)
    }

    fn write<E: From<Error>>(
        &self,
        path: &Path,
        contents: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut record = Record::create(self.draft())?;
        contents(&mut record)?;
        record.finish()?;
        let named = files::rename(&self.draft(), path).and_then(|()| files::sync_dir(&self.dir));
        Ok(named.map_err(|e| Error::io(path, e))?)
    }

    /// What the saves so far keep, in order.
    ///
    /// # Errors
    /// If a file cannot be opened.
    pub(crate) fn kept(&self) -> Result<impl Iterator<Item = Result<Entries, Error>>, Error> {
        let saves = Self::saves(&self.dir, KEPT)?.into_iter();
        let saves = saves.filter(|save| Some(*save) <= self.last);
        Ok(saves.map(|save| Entries::open(self.file(save, KEPT))))
    }

    /// The state of the last save, if there is one.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(crate) fn state(&self) -> Result<Option<Entries>, Error> {
        let Some(save) = self.last else { return Ok(None) };
        let mut entries = Entries::open(self.file(save, STATE))?;
        // The label is for the user alone.
        entries.next()?;
        Ok(Some(entries))
    }
}
