//! Fetches a file into the cache. A file gets its name only when it is complete and checked. Parts
//! of files with a known digest are kept, so that a download can continue.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::StatusCode;

use super::{
    Problem,
    answer::{Commit, Described, Etag, FileName, content_range, text},
    cache::Repo,
    client::Client,
};
use crate::progress::Bar;

/// Maximum number of consecutive retries of a transfer.
const RETRIES: u32 = 2;
/// Number of new bytes after which a broken transfer counts as progress, and retries start anew.
const ALIVE: u64 = 1 << 20;

/// The source and the target of a commit's files.
pub(super) struct Download<'a> {
    pub(super) client: &'a Client,
    pub(super) repo: &'a Repo,
    pub(super) model: &'a str,
    pub(super) commit: &'a Commit,
    /// Makes the progress bar of a file, from its name and size in bytes.
    pub(super) bar: &'a dyn Fn(&str, u64) -> Box<dyn Bar>,
}

impl Download<'_> {
    /// Fetches a file unless its contents are in the cache.
    pub(super) fn file(&self, file: &FileName) -> Result<(), Problem> {
        let described = self.client.describe(self.model, self.commit, file)?;
        let etag = &described.etag;
        let _lock = self.repo.lock(file, etag).map_err(Problem::Disk)?;
        let blob = self.repo.blob(etag);
        if !fs::metadata(&blob).is_ok_and(|blob| blob.len() == described.size) {
            self.contents(file, &described, &blob)?;
        }
        self.repo.link(self.commit, file, etag).map_err(Problem::Disk)
    }

    fn contents(&self, file: &FileName, known: &Described, blob: &Path) -> Result<(), Problem> {
        let bar = (self.bar)(file.as_str(), known.size);
        let mut partial = Partial::open(blob, known).map_err(Problem::Disk)?;
        let mut resumed = partial.length > 0;
        loop {
            self.rest(file, &mut partial, &*bar)?;
            if partial.is_sound() {
                break;
            }
            partial.clear().map_err(Problem::Disk)?;
            // A kept part may be damaged, so the whole file is fetched once more.
            if !std::mem::take(&mut resumed) {
                partial.remove().map_err(Problem::Disk)?;
                return Err(Problem::Answer("its bytes do not match the hub's digest".into()));
            }
            tracing::warn!(
                "{}: the partial download is damaged; fetching the whole file again",
                file.as_str()
            );
        }
        drop(bar);
        partial.finish(blob).map_err(Problem::Disk)
    }

    /// Fetches the missing bytes.
    fn rest(&self, file: &FileName, partial: &mut Partial, bar: &dyn Bar) -> Result<(), Problem> {
        let mut retries = 0;
        while partial.length < partial.size || partial.size == 0 {
            let before = partial.length;
            match self.attempt(file, partial, bar) {
                Ok(()) => break,
                Err(problem) => {
                    let alive = partial.length.saturating_sub(before) >= ALIVE;
                    retries = if alive { 0 } else { retries + 1 };
                    let again = match problem {
                        Problem::Connection(_) => retries <= RETRIES,
                        Problem::Stalled(_) => alive,
                        _ => false,
                    };
                    if !again {
                        return Err(problem);
                    }
                    tracing::info!("{}: {problem}; trying again", file.as_str());
                    thread::sleep(Duration::from_millis(300));
                    if !partial.can_resume() {
                        partial.clear().map_err(Problem::Disk)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn attempt(
        &self,
        file: &FileName,
        partial: &mut Partial,
        bar: &dyn Bar,
    ) -> Result<(), Problem> {
        let from = partial.length;
        let (status, headers, mut body) = self.client.bytes(self.model, self.commit, file, from)?;
        if status == StatusCode::RANGE_NOT_SATISFIABLE {
            let empty = partial.size == 0;
            return if empty { Ok(()) } else { Err(Problem::Status(status.as_u16())) };
        }
        let (start, size) = match content_range(&headers) {
            Some(range) if status == StatusCode::PARTIAL_CONTENT => range,
            // The server sends the whole file.
            _ => (0, partial.size),
        };
        if start != from {
            if start != 0 {
                return Err(Problem::Answer(format!(
                    "asked for byte {from}, the hub gave {start}"
                )));
            }
            partial.clear().map_err(Problem::Disk)?;
        }
        let length = text(&headers, "content-length").and_then(|length| length.parse().ok());
        let other = (size != partial.size).then_some(size);
        let other = other.or(length.map(|length: u64| start.saturating_add(length)));
        if let Some(other) = other.filter(|other| *other != partial.size) {
            let size = partial.size;
            return Err(Problem::Answer(format!(
                "the hub announces {size} bytes, and then {other}"
            )));
        }
        bar.reach(partial.length);
        let cut = |partial: &Partial, why: &str| {
            let (length, size) = (partial.length, partial.size);
            Problem::Connection(format!("cut off at {length} of {size} bytes{why}"))
        };
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                // The file is complete, however the connection ended.
                Err(_) if partial.length == partial.size => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(match Problem::of_reading(&error, self.client.fetching()) {
                        Problem::Connection(why) => cut(partial, &format!(" ({why})")),
                        problem => problem,
                    });
                }
            };
            if read as u64 > partial.size - partial.length {
                partial.clear().map_err(Problem::Disk)?;
                let size = partial.size;
                return Err(Problem::Answer(format!("the hub sends more than {size} bytes")));
            }
            partial.push(&buffer[..read]).map_err(Problem::Disk)?;
            bar.advance(read as u64);
        }
        if partial.length < partial.size { Err(cut(partial, "")) } else { Ok(()) }
    }
}

/// The arrived part of a file's contents.
struct Partial {
    path: PathBuf,
    file: File,
    etag: Etag,
    /// Size of the complete contents, in bytes.
    size: u64,
    /// Number of bytes that have arrived.
    length: u64,
    hasher: Hasher,
}

impl Partial {
    /// Opens the part that an earlier run left, if the digest of the contents is known; otherwise
    /// an empty part.
    fn open(blob: &Path, known: &Described) -> io::Result<Self> {
        let path = blob.with_extension("part");
        // A link or another special file of this name is removed.
        if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()) {
            fs::remove_file(&path)?;
        }
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path)?;
        let (etag, size) = (known.etag.clone(), known.size);
        let mut partial =
            Self { path, file, hasher: Hasher::new(&etag, size), etag, size, length: 0 };
        let found = partial.file.metadata()?.len();
        if found > size || !partial.can_resume() {
            partial.clear()?;
            return Ok(partial);
        }
        let mut buffer = vec![0; 1 << 16];
        loop {
            match partial.file.read(&mut buffer)? {
                0 => return Ok(partial),
                read => {
                    partial.hasher.update(&buffer[..read]);
                    partial.length += read as u64;
                }
            }
        }
    }

    fn can_resume(&self) -> bool {
        !matches!(self.etag, Etag::Opaque(_))
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Drops all bytes.
    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.length = 0;
        self.hasher = Hasher::new(&self.etag, self.size);
        Ok(())
    }

    /// Whether the bytes match the digest, if the ETag is one.
    fn is_sound(&self) -> bool {
        match (&self.etag, self.hasher.clone()) {
            (Etag::Sha256(digest), Hasher::Sha256(hasher)) => {
                format!("{:x}", hasher.finalize()) == *digest
            }
            // Git's digest of a blob; some mirrors use the digest of the bytes alone.
            (Etag::Git(digest), Hasher::Sha1(hashers)) => {
                hashers.into_iter().any(|hasher| format!("{:x}", hasher.finalize()) == *digest)
            }
            _ => true,
        }
    }

    fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }

    /// Renames the contents to their final name.
    fn finish(self, blob: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, blob)
    }
}

/// The digest of the arrived bytes.
#[derive(Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha1([Sha1; 2]),
    None,
}

impl Hasher {
    fn new(etag: &Etag, size: u64) -> Self {
        match etag {
            Etag::Sha256(_) => Self::Sha256(Sha256::new()),
            Etag::Git(_) => {
                let blob = Sha1::new_with_prefix(format!("blob {size}\0"));
                Self::Sha1([blob, Sha1::new()])
            }
            Etag::Opaque(_) => Self::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha1(hashers) => hashers.iter_mut().for_each(|hasher| hasher.update(bytes)),
            Self::None => {}
        }
    }
}
