//! Files on disk. Only regular files are opened for reading, as a FIFO would block and a device may
//! be endless. Checkpoints and saved states are written by the steps here, so that tests can make
//! any step fail, or interrupt the run between two steps.

use std::{
    fs::{self, File, FileType, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Opens a regular file, or a link to one. Anything else is an immediate error that says what it
/// is; a FIFO does not block.
///
/// # Errors
/// If there is no such file, it cannot be read, or it is not a regular file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    open_kind(path, FileType::is_file)
}

/// [`open`], or a pipe that the process was started with: `/dev/stdin`, or `/dev/fd/63` as a
/// shell's `<(command)` has it. It can be read once.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_or_pipe(path: &Path) -> io::Result<File> {
    let own = ["/dev/stdin", "/dev/fd", "/proc/self/fd"].iter().any(|own| path.starts_with(own));
    open_kind(path, |kind| kind.is_file() || own && is_fifo(kind))
}

fn open_kind(path: &Path, allowed: impl Fn(&FileType) -> bool) -> io::Result<File> {
    let check = |kind: FileType| match allowed(&kind) {
        true => Ok(()),
        false => Err(not_regular(&kind)),
    };
    // Opening a device can have effects, so the kind is checked first.
    let kind = fs::metadata(path)?.file_type();
    check(kind)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    if kind.is_file() {
        use std::os::unix::fs::OpenOptionsExt;
        // If a FIFO replaces the file just now, opening it does not block.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    }
    let file = options.open(path)?;
    check(file.metadata()?.file_type())?;
    Ok(file)
}

/// The error of a file that is not regular, with its kind.
pub(crate) fn not_regular(kind: &FileType) -> io::Error {
    let error =
        if kind.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
    io::Error::new(error, format!("{}, not a regular file", describe(kind)))
}

/// The kind of a file in words, with its article.
pub(crate) fn describe(kind: &FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    match () {
        () if is_fifo(kind) => "a FIFO",
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a link",
        () if kind.is_file() => "a file",
        () => "a special file",
    }
}

#[cfg(unix)]
fn is_fifo(kind: &FileType) -> bool {
    std::os::unix::fs::FileTypeExt::is_fifo(kind)
}

#[cfg(not(unix))]
fn is_fifo(_: &FileType) -> bool {
    false
}

/// A step of writing.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "tests look at them"))]
pub(crate) enum Step<'a> {
    CreateDir(&'a Path),
    Create(&'a Path),
    Write(&'a Path, &'a [u8]),
    /// Syncs a file, or the names in a directory.
    Sync(&'a Path),
    Rename(&'a Path, &'a Path),
    /// Removes a file, or an empty directory.
    Remove(&'a Path),
}

/// Called before each step; tests may make it fail.
#[cfg(not(test))]
#[inline]
fn step(_: Step<'_>) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
use testing::step;

/// A file that is being written. Its contents are safe once it is finished, and its name once the
/// directory is synced.
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
    /// Syncs the contents to the disk.
    pub(crate) fn finish(self) -> io::Result<()> {
        let Steps { path, file } = self.0.into_inner().map_err(io::IntoInnerError::into_error)?;
        step(Step::Sync(&path))?;
        file.sync_all()
    }
}

/// Creates a file, replacing an existing one.
pub(crate) fn create(path: &Path) -> io::Result<Writing> {
    step(Step::Create(path))?;
    let file = File::create(path)?;
    Ok(Writing(BufWriter::with_capacity(1 << 20, Steps { path: path.to_owned(), file })))
}

/// Writes a whole file.
pub(crate) fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = create(path)?;
    file.write_all(contents)?;
    file.finish()
}

/// Copies a file's contents.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut contents = open(from)?;
    let mut file = create(to)?;
    io::copy(&mut contents, &mut file)?;
    file.finish()
}

/// Creates a directory unless it exists.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    step(Step::CreateDir(path))?;
    fs::create_dir(path)
}

/// Renames a file or a directory.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to))?;
    fs::rename(from, to)
}

/// Syncs the names in a directory to the disk.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    step(Step::Sync(path))?;
    File::open(path)?.sync_all()
}

/// Removes an empty directory.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    step(Step::Remove(path))?;
    fs::remove_dir(path)
}

/// Removes a file, or a directory with its contents, without following links. Missing files are not
/// an error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match remove_what_is_there(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn remove_what_is_there(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            remove(&entry?.path())?;
        }
        return remove_dir(path);
    }
    step(Step::Remove(path))?;
    fs::remove_file(path)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        std::os::unix::fs::symlink("fifo", path("link to fifo")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), mode).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for fine in ["file", "link"] {
            assert_eq!(io::read_to_string(open(&path(fine)).unwrap()).unwrap(), "text");
        }
        for (other, what) in [
            ("fifo", "a FIFO, not a regular file"),
            ("link to fifo", "a FIFO, not a regular file"),
            ("socket", "a socket, not a regular file"),
            (".", "a directory, not a regular file"),
            ("/dev/zero", "a device, not a regular file"),
        ] {
            for open in [open, open_or_pipe] {
                assert_eq!(open(&path(other)).unwrap_err().to_string(), what, "{other}");
            }
        }
        assert_eq!(open(&path("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_pipe_of_the_process_is_opened_where_it_may_be() {
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(b"text").unwrap();
        drop(write);
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&read));
        assert!(open(path.as_ref()).is_err());
        let pipe = open_or_pipe(path.as_ref()).unwrap();
        drop(read);
        assert_eq!(io::read_to_string(pipe).unwrap(), "text");
    }
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
