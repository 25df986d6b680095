//! The directory beside an output in which it is made, `OUTPUT.partial`: the checkpoint as far as it
//! is written, scratch files, and the state of the run, from which it goes on if it is cut off.

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

/// The directory of a run, which no other run has at the same time.
#[derive(Debug)]
pub(super) struct Partial {
    target: PathBuf,
    dir: PathBuf,
    /// Held as long as the process lives, however it ends.
    _lock: File,
}

/// What runs lock, and where they say who they are.
const LOCK: &str = "lock";
/// The checkpoint in the making.
const CHECKPOINT: &str = "checkpoint";
/// There once the checkpoint is complete.
const FINISHED: &str = "finished";
/// What was under the output's name before.
const REPLACED: &str = "replaced";
/// Bytes of a lock at most: the number of a process.
const LONGEST: u64 = 16;

impl Partial {
    /// The directory beside `target`.
    pub(super) fn beside(target: &Path) -> PathBuf {
        let mut dir = target.as_os_str().to_owned();
        dir.push(".partial");
        dir.into()
    }

    /// Checks that what is beside `target` under the names that a run takes is Barber's, if it is
    /// there.
    pub(super) fn check(target: &Path) -> Result<(), Error> {
        [Self::beside(target), Self::over(target)].iter().try_for_each(|dir| check_own(dir))
    }

    /// Takes the directory beside `target`, and puts right what a run that was cut off while it
    /// replaced the target left.
    pub(super) fn open(target: PathBuf) -> Result<Self, Error> {
        Self::check(&target)?;
        let dir = Self::beside(&target);
        let new = !dir.exists();
        let lock = lock(&dir, &target).inspect_err(|error| {
            // Nothing is in it but perhaps the lock.
            if new && !matches!(error, Error::Busy { .. }) {
                let _ = fs::remove_file(dir.join(LOCK));
                let _ = fs::remove_dir(&dir);
            }
        })?;
        let partial = Self { target, dir, _lock: lock };
        // What the last run did not come to remove.
        remove_own(&Self::over(&partial.target))?;
        let replaced = partial.replaced();
        if replaced.exists() && !partial.target.exists() {
            files::rename(&replaced, &partial.target).map_err(|e| Error::io(&replaced, e))?;
        }
        Ok(partial)
    }

    /// Removes what a run which gave `target` its name did not come to remove.
    pub(super) fn tidy(target: PathBuf) -> Result<(), Error> {
        let left = [Self::beside(&target), Self::over(&target)].iter().any(|dir| dir.exists());
        // What is not Barber's is in nobody's way here.
        if left && Self::check(&target).is_ok() {
            Self::open(target)?;
        }
        Ok(())
    }

    /// What this process's run to `target` leaves if it ends now, without a destructor.
    pub(super) fn left_behind(target: &Path) -> Option<(PathBuf, String)> {
        let dir = Self::beside(target);
        let own = fs::read_to_string(dir.join(LOCK)).is_ok_and(|owner| owner == process());
        if !own {
            return None;
        }
        if let Ok(Some(label)) = Journal::label(&dir) {
            return Some((dir, label));
        }
        // What is written of a checkpoint, without a state beside it, stays for the next run to remove.
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

    /// Whether the checkpoint is complete; it has its name, or is about to get it.
    pub(super) fn is_finished(&self) -> bool {
        self.dir.join(FINISHED).is_file()
    }

    /// Whether a run left something to go on from.
    fn is_left_over(&self) -> Result<bool, Error> {
        if self.is_finished() {
            return Ok(self.checkpoint().is_dir());
        }
        Ok(Journal::has_saves(&self.dir)?)
    }

    /// What a run left to go on from, in words.
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

    /// Removes what a run worked with. That it is over, if it is, stays true.
    fn empty(&self) -> Result<(), Error> {
        remove_entries(&self.dir, |name| name != LOCK && name != FINISHED)
    }

    /// Gives the checkpoint, whose files are on the disk, its name. What was there goes when it has
    /// it.
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
            // Something may have come into it while the run went on.
            Owned::of(target)?.unchanged()?;
            files::rename(target, &replaced).map_err(io)?;
            if let Err(error) = files::rename(&checkpoint, target) {
                // Nothing is lost: the old one gets its name back.
                let _ = files::rename(&replaced, target);
                return Err(io(error));
            }
        } else {
            files::rename(&checkpoint, target).map_err(io)?;
        }
        target.parent().map_or(Ok(()), |parent| files::sync_dir(parent).map_err(io))?;
        self.remove()
    }

    /// Removes the directory. It goes at once: without the word that the run is over, a part of it
    /// would say that the run is to be done again.
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

    /// The name of a directory that is being removed.
    fn over(target: &Path) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(".over");
        target.with_file_name(name)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `finish` it is not there any more. There is nobody to tell that it cannot be tidied.
        let _ = match self.is_left_over() {
            Ok(true) if self.is_finished() => Ok(()),
            Ok(true) => files::remove(&self.checkpoint()).map_err(|e| Error::io(&self.dir, e)),
            Ok(false) => self.remove(),
            Err(error) => Err(error),
        };
    }
}

/// How a process says who it is.
fn process() -> String {
    std::process::id().to_string()
}

/// How many runs may end and remove the directory while this one takes it.
const ATTEMPTS: usize = 100;

/// The lock of a directory, which is made if it is not there.
fn lock(dir: &Path, target: &Path) -> Result<File, Error> {
    let path = dir.join(LOCK);
    let io = |e| Error::io(&path, e);
    let own = process();
    for _ in 0..ATTEMPTS {
        files::create_dir(dir).map_err(|e| Error::io(dir, e))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let mut file = match file {
            Ok(file) => file,
            // The run that had it has just ended.
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
        // It is never empty again, by which others know that it is a run's.
        file.write_all(own.as_bytes()).and_then(|()| file.set_len(own.len() as u64)).map_err(io)?;
        match fs::read_to_string(&path) {
            Ok(found) if found == own => return Ok(file),
            // That file was removed by a run which has just ended.
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
    }
    Err(io(io::Error::other("other processes keep removing it")))
}

/// Whether an entry of a run's directory is a run's.
fn is_own(name: &str, kind: FileType) -> bool {
    match name {
        CHECKPOINT | REPLACED => kind.is_dir(),
        LOCK | FINISHED => kind.is_file(),
        // Scratch files have no name, but on some file systems for an instant.
        _ => kind.is_file() && (Journal::has(name) || name.starts_with(".tmp") && name.len() == 10),
    }
}

/// The entries of a directory with their kinds, the lock last; none, if there is no directory.
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

/// Checks that a directory is a run's, if it is there: it has the lock of one, and nothing but what
/// runs make. An empty one may be where a run was cut off as it began.
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

/// Removes the entries of a run's directory whose names are wanted; of a result that was replaced,
/// only what its run wrote.
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

/// Removes a run's directory, if it is there. The lock goes last, by which it is known until then.
fn remove_own(dir: &Path) -> Result<(), Error> {
    check_own(dir)?;
    remove_entries(dir, |_| true)?;
    match files::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
}
