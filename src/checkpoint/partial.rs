//! The working directory of a run, `OUTPUT.partial` beside the output: the checkpoint that is being
//! written, scratch files, and the saved state of the run.

use std::{
    ffi::OsString,
    fs::{self, File, FileType, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use super::{
    Error,
    owned::{Owned, listed},
};
use crate::{files, journal::Journal};

/// The working directory of a run, locked against other runs.
#[derive(Debug)]
pub(super) struct Partial {
    target: PathBuf,
    dir: PathBuf,
    /// The lock, which the system releases when the process ends; `None` in a process that only reads
    /// the directory of another one.
    lock: Option<File>,
}

/// The name of the file that runs lock, with the process id.
const LOCK: &str = "lock";
/// The name of the directory of the checkpoint that is being written.
const CHECKPOINT: &str = "checkpoint";
/// The name of the file that exists once the checkpoint is complete.
const FINISHED: &str = "finished";
/// The name of the directory with the output that is being replaced.
const REPLACED: &str = "replaced";
/// Maximum bytes of a lock, which has a process id.
const LONGEST: u64 = 16;

impl Partial {
    /// The path of the directory beside `target`.
    pub(super) fn beside(target: &Path) -> PathBuf {
        let mut dir = target.as_os_str().to_owned();
        dir.push(".partial");
        dir.into()
    }

    /// Checks that existing directories beside `target` with the names of working directories are
    /// Barber's.
    pub(super) fn check(target: &Path) -> Result<(), Error> {
        [Self::beside(target), Self::over(target)].iter().try_for_each(|dir| check_own(dir))
    }

    /// Opens and locks the directory beside `target`, and repairs what a run left that was
    /// interrupted while it replaced `target`.
    pub(super) fn open(target: PathBuf) -> Result<Self, Error> {
        Self::check(&target)?;
        let dir = Self::beside(&target);
        let new = !dir.exists();
        let lock = lock(&dir, &target).inspect_err(|error| {
            // The directory has at most the lock.
            if new && !matches!(error, Error::Busy { .. }) {
                let _ = fs::remove_file(dir.join(LOCK));
                let _ = fs::remove_dir(&dir);
            }
        })?;
        let partial = Self { target, dir, lock: Some(lock) };
        // The last run may have been interrupted while it removed its directory.
        remove_own(&Self::over(&partial.target))?;
        let replaced = partial.replaced();
        if replaced.exists() && !partial.target.exists() {
            files::rename(&replaced, &partial.target).map_err(|e| Error::io(&replaced, e))?;
        }
        Ok(partial)
    }

    /// The directory beside `target` that another process of this run has opened; `None` if it cannot be
    /// seen from here.
    pub(super) fn of_other(target: PathBuf) -> Option<Self> {
        let dir = Self::beside(&target);
        dir.join(LOCK).is_file().then_some(Self { target, dir, lock: None })
    }

    /// Removes files that a finished run to `target` left when it was interrupted.
    pub(super) fn tidy(target: PathBuf) -> Result<(), Error> {
        let left = [Self::beside(&target), Self::over(&target)].iter().any(|dir| dir.exists());
        // Files that are not Barber's may stay here.
        if left && Self::check(&target).is_ok() {
            Self::open(target)?;
        }
        Ok(())
    }

    /// The saved state that this process's run to `target` leaves if it ends now without
    /// destructors.
    pub(super) fn left_behind(target: &Path) -> Option<(PathBuf, String)> {
        let dir = Self::beside(target);
        let own = fs::read_to_string(dir.join(LOCK)).is_ok_and(|owner| owner == process());
        if !own {
            return None;
        }
        if let Ok(Some(label)) = Journal::label(&dir) {
            return Some((dir, label));
        }
        // An incomplete checkpoint without a saved state stays; the next run removes it.
        if !dir.join(FINISHED).is_file() && fs::remove_dir(dir.join(CHECKPOINT)).is_ok() {
            let _ = fs::remove_file(dir.join(LOCK)).and_then(|()| fs::remove_dir(&dir));
        }
        None
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    pub(super) fn checkpoint(&self) -> PathBuf {
        self.dir.join(CHECKPOINT)
    }

    fn replaced(&self) -> PathBuf {
        self.dir.join(REPLACED)
    }

    /// Whether the checkpoint is complete, before or after it is renamed.
    pub(super) fn is_finished(&self) -> bool {
        self.dir.join(FINISHED).is_file()
    }

    /// Whether a run left a saved state.
    fn is_left_over(&self) -> Result<bool, Error> {
        if self.is_finished() {
            return Ok(self.checkpoint().is_dir());
        }
        Ok(Journal::has_saves(&self.dir)?)
    }

    /// Description of the saved state of a run; `None` without one.
    pub(super) fn left_over(&self) -> Result<Option<String>, Error> {
        Ok(match self.is_left_over()? {
            true if self.is_finished() => Some("all is written".into()),
            true => Journal::label(&self.dir)?,
            false => None,
        })
    }

    /// Empties the directory, for a run that begins.
    pub(super) fn clear(&self) -> Result<(), Error> {
        self.empty()?;
        let finished = self.dir.join(FINISHED);
        files::remove(&finished).map_err(|e| Error::io(&finished, e))
    }

    /// Removes the files of a run, except the mark that it is finished.
    fn empty(&self) -> Result<(), Error> {
        remove_entries(&self.dir, |name| name != LOCK && name != FINISHED)
    }

    /// Renames the checkpoint, whose files are synced, to its final name; then removes the replaced
    /// one.
    pub(super) fn finish(&self) -> Result<(), Error> {
        let (checkpoint, target) = (self.checkpoint(), &self.target);
        let io = |e| Error::io(target, e);
        if self.is_finished() && !checkpoint.is_dir() {
            return self.remove();
        }
        if !self.is_finished() {
            files::sync_dir(&checkpoint).map_err(io)?;
            let finished = self.dir.join(FINISHED);
            let written = files::write(&finished, b"").and_then(|()| files::sync_dir(&self.dir));
            written.map_err(|e| Error::io(&finished, e))?;
        }
        if target.exists() {
            let replaced = self.replaced();
            remove_entries(&self.dir, |name| name == REPLACED)?;
            // Files may have been added during the run.
            Owned::of(target)?.unchanged()?;
            files::rename(target, &replaced).map_err(io)?;
            if let Err(error) = files::rename(&checkpoint, target) {
                // Renames the old one back.
                let _ = files::rename(&replaced, target);
                return Err(io(error));
            }
        } else {
            files::rename(&checkpoint, target).map_err(io)?;
        }
        target.parent().map_or(Ok(()), |parent| files::sync_dir(parent).map_err(io))?;
        self.remove()
    }

    /// Removes the directory. It is renamed first: if half of it were left without the finished
    /// mark, the run would seem unfinished.
    fn remove(&self) -> Result<(), Error> {
        if self.replaced().exists() && !self.target.exists() {
            return Ok(());
        }
        self.empty()?;
        check_own(&self.dir)?;
        let over = Self::over(&self.target);
        remove_own(&over)?;
        files::rename(&self.dir, &over).map_err(|e| Error::io(&self.dir, e))?;
        remove_own(&over)
    }

    /// The path of a directory that is being removed.
    fn over(target: &Path) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(".over");
        target.with_file_name(name)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.lock.is_none() {
            return;
        }
        // After `finish` the directory is gone. Errors of tidying cannot be reported here.
        let _ = match self.is_left_over() {
            Ok(true) if self.is_finished() => Ok(()),
            Ok(true) => files::remove(&self.checkpoint()).map_err(|e| Error::io(&self.dir, e)),
            Ok(false) => self.remove(),
            Err(error) => Err(error),
        };
    }
}

/// The process id as text.
fn process() -> String {
    std::process::id().to_string()
}

/// Maximum number of attempts, as runs that end may remove the directory meanwhile.
const ATTEMPTS: usize = 100;

/// Locks a directory, creating it if it does not exist.
fn lock(dir: &Path, target: &Path) -> Result<File, Error> {
    let path = dir.join(LOCK);
    let io = |e| Error::io(&path, e);
    let own = process();
    for _ in 0..ATTEMPTS {
        files::create_dir(dir).map_err(|e| Error::io(dir, e))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let mut file = match file {
            Ok(file) => file,
            // The run that held the lock has just ended.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(io(e)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let process = fs::read_to_string(&path).unwrap_or_default();
                return Err(Error::Busy { target: target.to_owned(), process });
            }
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        // The file is never empty again, so that others know that it is a run's.
        file.write_all(own.as_bytes()).and_then(|()| file.set_len(own.len() as u64)).map_err(io)?;
        match fs::read_to_string(&path) {
            Ok(found) if found == own => return Ok(file),
            // A run that has just ended removed the locked file.
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
    }
    Err(io(io::Error::other("other processes keep removing it")))
}

/// Whether an entry of a working directory is a run's.
fn is_own(name: &str, kind: FileType) -> bool {
    match name {
        CHECKPOINT | REPLACED => kind.is_dir(),
        LOCK | FINISHED => kind.is_file(),
        // Scratch files have a name only for an instant, on some file systems.
        _ => kind.is_file() && (Journal::has(name) || name.starts_with(".tmp") && name.len() == 10),
    }
}

/// The entries of a directory with their kinds, the lock last; empty if it does not exist.
fn entries(dir: &Path) -> io::Result<Vec<(OsString, FileType)>> {
    let found = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found?,
    };
    let mut entries = Vec::new();
    for entry in found {
        let entry = entry?;
        entries.push((entry.file_name(), entry.file_type()?));
    }
    entries.sort_by_key(|(name, _)| (name == LOCK, name.clone()));
    Ok(entries)
}

/// Checks that an existing directory is a run's: it has a lock, and only files that runs write. It
/// may be empty, if a run was interrupted as it began.
fn check_own(dir: &Path) -> Result<(), Error> {
    let io = |e| Error::io(dir, e);
    let not_own = |problem| Err(Error::NotPartial { dir: dir.to_owned(), problem });
    match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(e)),
        Ok(found) if !found.is_dir() => {
            return not_own(format!("is {}", files::describe(&found.file_type())));
        }
        Ok(_) => {}
    }
    let entries = entries(dir).map_err(io)?;
    let own = |(name, kind): &(OsString, FileType)| name.to_str().is_some_and(|n| is_own(n, *kind));
    let foreign = entries.iter().filter(|entry| !own(entry));
    let foreign: Vec<String> = foreign.map(|(name, _)| name.display().to_string()).collect();
    if !foreign.is_empty() {
        return not_own(format!("holds {}", listed(&foreign)));
    }
    match entries.last() {
        None => Ok(()),
        Some((name, _)) if name == LOCK => {
            let path = dir.join(LOCK);
            let mut process = String::new();
            let read =
                files::open(&path).and_then(|file| file.take(LONGEST).read_to_string(&mut process));
            match read {
                Ok(0) if entries.len() == 1 => Ok(()),
                Ok(_) if process.parse::<u32>().is_ok() => Ok(()),
                // A run has just ended.
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(e) if e.kind() != io::ErrorKind::InvalidData => Err(Error::io(&path, e)),
                _ => not_own(format!("has a {LOCK} without a process id")),
            }
        }
        Some(_) => not_own(format!("has no {LOCK}")),
    }
}

/// Removes the entries of a working directory for whose names `wanted` is true; of a replaced
/// result, only the files that its run wrote.
fn remove_entries(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
    for (name, kind) in entries(dir).map_err(|e| Error::io(dir, e))? {
        let path = dir.join(&name);
        match name.to_str() {
            Some(REPLACED) if wanted(REPLACED) => Owned::of(&path)?.remove()?,
            Some(name) if wanted(name) && is_own(name, kind) => {
                files::remove(&path).map_err(|e| Error::io(&path, e))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes an existing working directory. The lock is removed last, as it identifies the directory.
fn remove_own(dir: &Path) -> Result<(), Error> {
    check_own(dir)?;
    remove_entries(dir, |_| true)?;
    match files::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
}
