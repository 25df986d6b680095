//! The steps of writing to disk. All that makes checkpoints, and the state of a run beside them, goes
//! through here, so that tests can let any step fail, or end the world between two of them.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Opens a regular file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

/// One step.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "tests look at them"))]
pub(crate) enum Step<'a> {
    CreateDir(&'a Path),
    Create(&'a Path),
    Write(&'a Path, &'a [u8]),
    /// Of a file, or of a directory: of the names in it.
    Sync(&'a Path),
    Rename(&'a Path, &'a Path),
    /// Of a file, or of an empty directory.
    Remove(&'a Path),
}

/// Asks a test, if one wants to know.
#[cfg(not(test))]
#[inline]
fn step(_: Step<'_>) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
use testing::step;

/// A file in the making. Its contents are safe once it is finished, and its name once the directory
/// is synced.
#[derive(Debug)]
pub(crate) struct Writing(BufWriter<Steps>);

#[derive(Debug)]
struct Steps {
    path: PathBuf,
    file: File,
}

impl Write for Steps {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        step(Step::Write(&self.path, bytes))?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Writing {
    /// Sees to it that the contents are on the disk.
    pub(crate) fn finish(self) -> io::Result<()> {
        let Steps { path, file } = self.0.into_inner().map_err(io::IntoInnerError::into_error)?;
        step(Step::Sync(&path))?;
        file.sync_all()
    }
}

/// A new file, in the place of one that was there.
pub(crate) fn create(path: &Path) -> io::Result<Writing> {
    step(Step::Create(path))?;
    let file = File::create(path)?;
    Ok(Writing(BufWriter::with_capacity(1 << 20, Steps { path: path.to_owned(), file })))
}

/// A whole file.
pub(crate) fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = create(path)?;
    file.write_all(contents)?;
    file.finish()
}

/// A copy of a file's contents.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut contents = File::open(from)?;
    let mut file = create(to)?;
    io::copy(&mut contents, &mut file)?;
    file.finish()
}

/// A directory, unless it is there.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    step(Step::CreateDir(path))?;
    fs::create_dir(path)
}

/// Gives a file or a directory another name.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to))?;
    fs::rename(from, to)
}

/// Sees to it that the names in a directory are on the disk.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    step(Step::Sync(path))?;
    File::open(path)?.sync_all()
}

/// Removes a file, or a directory with all that is in it; not what a link in it leads to. What is not
/// there, or goes meanwhile, is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match remove_what_is_there(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn remove_what_is_there(path: &Path) -> io::Result<()> {
    let directory = fs::symlink_metadata(path)?.is_dir();
    if directory {
        for entry in fs::read_dir(path)? {
            remove(&entry?.path())?;
        }
    }
    step(Step::Remove(path))?;
    if directory { fs::remove_dir(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Steps that fail when a test wants them to.

    use std::{cell::RefCell, io};

    use super::Step;

    type Gate = Box<dyn FnMut(Step<'_>) -> io::Result<()>>;

    thread_local! {
        static GATE: RefCell<Option<Gate>> = const { RefCell::new(None) };
    }

    pub(super) fn step(step: Step<'_>) -> io::Result<()> {
        GATE.with_borrow_mut(|gate| gate.as_mut().map_or(Ok(()), |gate| gate(step)))
    }

    /// Runs with each step of this thread asking `gate` first.
    pub(crate) fn gated<T>(
        gate: impl FnMut(Step<'_>) -> io::Result<()> + 'static,
        run: impl FnOnce() -> T,
    ) -> T {
        GATE.set(Some(Box::new(gate)));
        let result = run();
        GATE.set(None);
        result
    }

    /// A step fails as if the disk were full.
    pub(crate) fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }
}
