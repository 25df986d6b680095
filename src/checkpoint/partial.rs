//! The directory beside an output in which it is made, `OUTPUT.partial`: the checkpoint as far as it
//! is written, scratch files, and the state of the run, from which it goes on if it is cut off.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::Error;
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

impl Partial {
    /// The directory beside `target`.
    pub(super) fn beside(target: &Path) -> PathBuf {
        let mut dir = target.as_os_str().to_owned();
        dir.push(".partial");
        dir.into()
    }

    /// Takes the directory beside `target`, and puts right what a run that was cut off while it
    /// replaced the target left.
    pub(super) fn open(target: PathBuf) -> Result<Self, Error> {
        let dir = Self::beside(&target);
        let lock = lock(&dir, &target)?;
        // What the last run did not come to remove.
        let over = Self::over(&target);
        files::remove(&over).map_err(|e| Error::io(&over, e))?;
        let partial = Self { target, dir, _lock: lock };
        let replaced = partial.replaced();
        if replaced.exists() && !partial.target.exists() {
            files::rename(&replaced, &partial.target).map_err(|e| Error::io(&replaced, e))?;
        }
        Ok(partial)
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
        let io = |e| Error::io(&self.dir, e);
        for entry in fs::read_dir(&self.dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some(LOCK | FINISHED) => {}
                _ => files::remove(&path).map_err(|e| Error::io(&path, e))?,
            }
        }
        Ok(())
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
            files::remove(&replaced).map_err(|e| Error::io(&replaced, e))?;
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
        let io = |e| Error::io(&self.dir, e);
        let over = Self::over(&self.target);
        files::remove(&over).and_then(|()| files::rename(&self.dir, &over)).map_err(io)?;
        files::remove(&over).map_err(io)
    }

    /// The name of a directory that is being removed.
    fn over(target: &Path) -> PathBuf {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        target.with_file_name(format!(".{name}.over"))
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

/// The lock of a directory, which is made if it is not there.
fn lock(dir: &Path, target: &Path) -> Result<File, Error> {
    let path = dir.join(LOCK);
    let io = |e| Error::io(&path, e);
    let own = process();
    loop {
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
        file.set_len(0).and_then(|()| file.write_all(own.as_bytes())).map_err(io)?;
        // Not the file that a run which has just ended removed.
        if fs::read_to_string(&path).is_ok_and(|found| found == own) {
            return Ok(file);
        }
    }
}
