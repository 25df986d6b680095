//! The hub's cache on this machine, shared with the hub's own tools and in their layout:
//!
//! ```text
//! models--OWNER--NAME/refs/REVISION        the last commit of a branch or a tag
//! models--OWNER--NAME/blobs/ETAG           the contents of a file
//! models--OWNER--NAME/snapshots/COMMIT/…   links to the contents, by file name
//! .locks/models--OWNER--NAME/ETAG.lock     locked by the process that fetches the contents
//! ```

use std::{
    env,
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{
    Error,
    answer::{Commit, Etag, FileName},
};

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    token: PathBuf,
}

impl Cache {
    /// The cache at the place that the environment sets.
    pub(super) fn from_env() -> Result<Self, Error> {
        let home = match (variable("HF_HOME"), variable("XDG_CACHE_HOME")) {
            (Some(home), _) => expanded(home)?,
            (None, Some(cache)) => expanded(cache)?.join("huggingface"),
            (None, None) => home()?.join(".cache/huggingface"),
        };
        let root = variable("HF_HUB_CACHE").map_or_else(|| Ok(home.join("hub")), expanded)?;
        Ok(Self { root, token: home.join("token") })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The token that `hf auth login` saved.
    pub(super) fn token(&self) -> Option<String> {
        fs::read_to_string(&self.token).ok()
    }

    /// The cache of one model.
    pub(super) fn repo(&self, name: &str) -> Repo {
        let folder = format!("models--{}", name.replace('/', "--"));
        Repo { dir: self.root.join(&folder), locks: self.root.join(".locks").join(folder) }
    }
}

/// A variable of the environment, unless it is empty.
pub(super) fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

fn home() -> Result<PathBuf, Error> {
    env::home_dir().filter(|home| home.is_absolute()).ok_or(Error::NoHome)
}

/// A directory from the environment, with `~` expanded, as in the hub's own tools.
fn expanded(dir: OsString) -> Result<PathBuf, Error> {
    let dir = PathBuf::from(dir);
    dir.strip_prefix("~").map_or_else(|_| Ok(dir.clone()), |rest| Ok(home()?.join(rest)))
}

/// The part of the cache that holds one model.
#[derive(Debug)]
pub(super) struct Repo {
    dir: PathBuf,
    locks: PathBuf,
}

impl Repo {
    /// The directory of a commit's checkpoint.
    pub(super) fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.dir.join("snapshots").join(commit.as_str())
    }

    /// The path of contents.
    pub(super) fn blob(&self, etag: &Etag) -> PathBuf {
        self.dir.join("blobs").join(etag.blob())
    }

    /// The cached commit of a revision, if there is one.
    pub(super) fn commit(&self, revision: &str) -> Option<Commit> {
        let named = || Commit::parse(fs::read_to_string(self.reference(revision)).ok()?.trim());
        let commit = Commit::parse(revision).or_else(named)?;
        self.snapshot(&commit).join("config.json").exists().then_some(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.dir.join("refs").join(revision)
    }

    /// Records the commit of a branch or a tag.
    pub(super) fn note(&self, revision: &str, commit: &Commit) -> io::Result<()> {
        let path = self.reference(revision);
        let known = fs::read_to_string(&path).is_ok_and(|known| known == commit.as_str());
        if known || revision == commit.as_str() {
            return Ok(());
        }
        let dir = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(dir)?;
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(commit.as_str().as_bytes())?;
        file.persist(&path)?;
        Ok(())
    }

    /// Whether a commit's file is in the cache.
    pub(super) fn has(&self, commit: &Commit, file: &FileName) -> bool {
        self.snapshot(commit).join(file.as_str()).exists()
    }

    /// Links a commit's file to its contents.
    pub(super) fn link(&self, commit: &Commit, file: &FileName, etag: &Etag) -> io::Result<()> {
        // An existing file is left in place, as another process may be reading it.
        if self.has(commit, file) {
            return Ok(());
        }
        let dir = self.snapshot(commit);
        fs::create_dir_all(&dir)?;
        let path = dir.join(file.as_str());
        // The path may be a link to nothing.
        if fs::symlink_metadata(&path).is_ok() {
            fs::remove_file(&path)?;
        }
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(etag.blob()), &path);
        #[cfg(not(unix))]
        let linked = fs::copy(self.blob(etag), &path).map(drop);
        match linked {
            // Another process made the link.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    }

    /// Waits until no other process fetches the contents, and locks them until the file is dropped.
    pub(super) fn lock(&self, file: &FileName, etag: &Etag) -> io::Result<File> {
        fs::create_dir_all(&self.locks)?;
        fs::create_dir_all(self.dir.join("blobs"))?;
        let path = self.locks.join(format!("{}.lock", etag.blob()));
        let lock = File::options().write(true).create(true).truncate(false).open(&path)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                tracing::warn!(
                    "{}: another process is fetching it; waiting until that is done ({})",
                    file.as_str(),
                    path.display()
                );
                lock.lock()?;
            }
            Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => {
                return Err(error);
            }
            // Without locks, two processes may damage each other's part, which the digest shows.
            _ => {}
        }
        Ok(lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn a_revision_is_a_reference_or_a_commit() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().into(), token: dir.path().join("token") };
        let repo = cache.repo("org/tiny");
        let commit = Commit::parse(COMMIT).unwrap();
        assert_eq!((repo.commit("main"), repo.commit(COMMIT)), (None, None));
        fs::create_dir_all(repo.snapshot(&commit)).unwrap();
        fs::write(repo.snapshot(&commit).join("config.json"), "{}").unwrap();
        assert_eq!((repo.commit("main"), repo.commit(COMMIT)), (None, Some(commit.clone())));
        for revision in ["main", "refs/pr/1"] {
            repo.note(revision, &commit).unwrap();
            assert_eq!(repo.commit(revision), Some(commit.clone()));
        }
        // A commit needs no reference to itself, and a reference is no path.
        repo.note(COMMIT, &commit).unwrap();
        assert!(!dir.path().join("models--org--tiny/refs").join(COMMIT).exists());
        fs::write(dir.path().join("models--org--tiny/refs/main"), "../../../etc").unwrap();
        assert_eq!(repo.commit("main"), None);
    }

    #[test]
    #[cfg(unix)]
    fn a_link_that_leads_nowhere_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().into(), token: dir.path().join("token") };
        let (repo, commit) = (cache.repo("org/tiny"), Commit::parse(COMMIT).unwrap());
        let etag = Etag::Git(COMMIT.into());
        let listing =
            format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "config.json"}}]}}"#);
        let file =
            super::super::answer::Listing::parse(listing.as_bytes()).unwrap().files.remove(0);
        let _lock = repo.lock(&file, &etag).unwrap();
        repo.link(&commit, &file, &etag).unwrap();
        assert!(!repo.has(&commit, &file));
        fs::write(repo.blob(&etag), "{}").unwrap();
        repo.link(&commit, &file, &etag).unwrap();
        assert!(repo.has(&commit, &file));
    }
}
