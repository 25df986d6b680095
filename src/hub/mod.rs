//! A model by its name on the Hugging Face hub: fetched into the hub's usual cache, or found there.

mod answer;
mod cache;
mod client;
mod download;

use std::{
    fmt, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use indicatif::ProgressBar;

use self::{
    cache::{Cache, variable},
    client::Client,
    download::Download,
};

/// A model's checkpoint on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its directory.
    pub dir: PathBuf,
    /// The commit that it is of, if it is from the hub.
    pub commit: Option<String>,
}

/// Why a model could not be had, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: a directory has no revisions; leave `model.revision` out", .0.display())]
    RevisionOfDirectory(PathBuf),
    #[error(
        "there is no directory `{name}` here, and no model of this name at revision `{revision}` \
         on the hub; correct model.path or model.revision"
    )]
    NotFound { name: String, revision: String },
    #[error(
        "the hub does not give `{name}` (status {status}): it does not exist, is private or gated. \
         Accept its licence on its page, and set HF_TOKEN to a token of yours that may read it"
    )]
    Denied { name: String, status: u16 },
    #[error(
        "`{name}` at revision `{revision}` is not in the cache {}, and HF_HUB_OFFLINE forbids to \
         fetch it",
        cache.display()
    )]
    Offline { name: String, revision: String, cache: PathBuf },
    #[error(
        "`{name}` on the hub holds its weights as pickle ({file}), which can run code when it is \
         loaded; look for a revision or a copy of it with safetensors, or convert it"
    )]
    Pickle { name: String, file: String },
    #[error("`{name}` on the hub has no safetensors")]
    NoWeights { name: String },
    #[error(
        "there is no directory `{name}` here or beside the recipe, and the model of this name on the \
         hub could not be fetched: {problem}. Check the connection (and HF_ENDPOINT), and run again: what has \
         arrived is kept; or give the path of a directory"
    )]
    Failed { name: String, problem: String },
    #[error(
        "`{name}` cannot be taken from the hub: {problem}. Nothing of that is kept; if HF_ENDPOINT \
         is a mirror, try another one, or give the path of a directory"
    )]
    Refused { name: String, problem: String },
    #[error("{name}: {problem}")]
    Setting { name: &'static str, problem: String },
    #[error(
        "there is no home directory for the cache of the hub's models; set HF_HOME to a directory \
         for it"
    )]
    NoHome,
}

/// Why a request failed.
#[derive(Debug)]
enum Problem {
    /// The server answers with this status.
    Status(u16),
    /// There is no connection, or it ended.
    Connection(String),
    /// Nothing, or next to nothing, came for so long.
    Stalled(Duration),
    /// What came cannot be used.
    Answer(String),
    /// The cache cannot be written.
    Disk(io::Error),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status {status}"),
            Self::Connection(problem) | Self::Answer(problem) => f.write_str(problem),
            Self::Stalled(within) => write!(
                f,
                "stalled: next to nothing came within {} s (HF_HUB_ETAG_TIMEOUT and \
                 HF_HUB_DOWNLOAD_TIMEOUT are the seconds to wait)",
                within.as_secs_f64()
            ),
            Self::Disk(problem) => write!(f, "the cache cannot be written: {problem}"),
        }
    }
}

impl Problem {
    /// Whether what was fetched before will do instead.
    fn is_absence(&self) -> bool {
        match self {
            Self::Status(status) => *status == 429 || *status >= 500,
            Self::Connection(_) | Self::Stalled(_) => true,
            Self::Answer(_) | Self::Disk(_) => false,
        }
    }

    /// As the error of a model, or of one of its files.
    fn of(self, name: &str, file: Option<&str>) -> Error {
        let name = name.to_owned();
        match self {
            Self::Status(status @ (401 | 403)) => Error::Denied { name, status },
            problem => {
                let file = file.map_or_else(String::new, |file| format!("{file}: "));
                let text = format!("{file}{problem}");
                match problem {
                    Self::Answer(_) => Error::Refused { name, problem: text },
                    _ => Error::Failed { name, problem: text },
                }
            }
        }
    }
}

/// Whether a path could be a model's name on the hub: `owner/model`.
pub fn is_name(path: &Path) -> bool {
    let allowed = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let ambiguous = part.contains("--") || part.contains("..");
        !part.is_empty() && part.chars().all(inner) && !part.starts_with(['.', '-']) && !ambiguous
    };
    path.to_str()
        .and_then(|path| path.split_once('/'))
        .is_some_and(|(owner, model)| allowed(owner) && allowed(model))
}

/// The checkpoint at a path, or of a name: a directory is itself; what looks like a hub's name and
/// is no directory is fetched, as far as it is not in the cache. `bar` makes the progress bar of a
/// file of so many bytes. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to
/// the hub's own tools.
///
/// # Errors
/// If it cannot be had.
pub fn locate(
    path: &Path,
    revision: Option<&str>,
    bar: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<Located, Error> {
    if path.is_dir() || !is_name(path) {
        return match revision {
            Some(_) if path.is_dir() => Err(Error::RevisionOfDirectory(path.to_owned())),
            _ => Ok(Located { dir: path.to_owned(), commit: None }),
        };
    }
    let name = path.to_string_lossy().into_owned();
    let revision = revision.unwrap_or("main");
    // It becomes the name of a file in the cache.
    let plain = !revision.contains(|c: char| c.is_control() || c == '\\');
    if !plain || !Path::new(revision).components().all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(Error::NotFound { name, revision: revision.into() });
    }
    let cache = Cache::from_env()?;
    let repo = cache.repo(&name);
    let cached = || {
        let commit = repo.commit(revision)?;
        Some(Located { dir: repo.snapshot(&commit), commit: Some(commit.as_str().into()) })
    };
    if is_set("HF_HUB_OFFLINE") {
        let (revision, cache) = (revision.into(), cache.root().to_owned());
        return cached().ok_or(Error::Offline { name, revision, cache });
    }
    let client = Client::from_env(cache.token())?;
    let listing = match client.listing(&name, revision) {
        Ok(listing) => listing,
        Err(Problem::Status(404)) => {
            return Err(Error::NotFound { name, revision: revision.into() });
        }
        Err(problem) => {
            return match cached().filter(|_| problem.is_absence()) {
                Some(found) => {
                    tracing::warn!(
                        "the hub cannot be reached ({problem}): using the cached {name}"
                    );
                    Ok(found)
                }
                None => Err(problem.of(&name, None)),
            };
        }
    };
    if !listing.files.iter().any(|file| file.as_str().ends_with(".safetensors")) {
        return Err(match listing.pickle {
            Some(file) => Error::Pickle { name, file },
            None => Error::NoWeights { name },
        });
    }
    // By its commit: the revision may move on while its files are fetched.
    let commit = &listing.commit;
    let download = Download { client: &client, repo: &repo, model: &name, commit, bar };
    for file in listing.files.iter().filter(|file| !repo.has(commit, file)) {
        download.file(file).map_err(|problem| problem.of(&name, Some(file.as_str())))?;
    }
    repo.note(revision, commit).map_err(|error| Problem::Disk(error).of(&name, None))?;
    Ok(Located { dir: repo.snapshot(commit), commit: Some(commit.as_str().into()) })
}

fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        ["1", "on", "true", "yes"].contains(&&*value.to_string_lossy().to_lowercase())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for name in ["HuggingFaceTB/SmolLM2-135M", "a/b.c_d-1"] {
            assert!(is_name(Path::new(name)), "{name}");
        }
        for path in
            ["model", "a/b/c", "./a", "../a/b", "/a/b", "a/", "a/../b", "a b/c", "a/.b", "a--b/c"]
        {
            assert!(!is_name(Path::new(path)), "{path}");
        }
    }
}
