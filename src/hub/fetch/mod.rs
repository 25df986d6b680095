//! Fetches a model's files into the hub's cache.

mod answer;
mod cache;
mod client;
mod download;

use std::{
    fmt, io,
    path::{Component, Path},
    time::Duration,
};

use self::{
    answer::FileName,
    cache::{Cache, variable},
    client::Client,
    download::Download,
};
use super::{Error, Located, Unsuitable};
use crate::progress::Bar;

/// Why a request failed.
#[derive(Debug)]
enum Problem {
    /// The server answered with this status.
    Status(u16),
    /// The connection failed or ended.
    Connection(String),
    /// Almost nothing arrived for this time.
    Stalled(Duration),
    /// The answer is invalid.
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
    /// Whether a cached commit can be used instead.
    fn is_absence(&self) -> bool {
        match self {
            Self::Status(status) => *status == 429 || *status >= 500,
            Self::Connection(_) | Self::Stalled(_) => true,
            Self::Answer(_) | Self::Disk(_) => false,
        }
    }

    /// The error of a model, or of one of its files.
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

/// The checkpoint of the model with this name, from the cache or fetched into it.
///
/// # Errors
/// If it cannot be fetched, or does not suit.
pub(super) fn fetch(
    path: &Path,
    revision: Option<&str>,
    bar: &dyn Fn(&str, u64) -> Box<dyn Bar>,
    suits: &dyn Fn(&Path) -> Result<(), Unsuitable>,
) -> Result<Located, Error> {
    let name = path.to_string_lossy().into_owned();
    let revision = revision.unwrap_or("main");
    // The revision becomes the name of a file in the cache.
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
    let (weights, others): (Vec<_>, Vec<_>) =
        listing.files.iter().partition(|file| file.as_str().ends_with(".safetensors"));
    if weights.is_empty() {
        return Err(match listing.pickle {
            Some(file) => Error::Pickle { name, file },
            None => Error::NoWeights { name },
        });
    }
    // Files are fetched by commit, as the revision may move meanwhile.
    let commit = &listing.commit;
    let download = Download { client: &client, repo: &repo, model: &name, commit, bar };
    let missing = |file: &&FileName| !repo.has(commit, file);
    let fetch = |file: &FileName| {
        download.file(file).map_err(|problem| problem.of(&name, Some(file.as_str())))
    };
    others.into_iter().filter(missing).try_for_each(fetch)?;
    if weights.iter().any(|file| !repo.has(commit, file)) {
        let judged = suits(&repo.snapshot(commit));
        judged.map_err(|problem| Error::Unsuitable { name: name.clone(), problem })?;
    }
    weights.into_iter().filter(missing).try_for_each(fetch)?;
    repo.note(revision, commit).map_err(|error| Problem::Disk(error).of(&name, None))?;
    Ok(Located { dir: repo.snapshot(commit), commit: Some(commit.as_str().into()) })
}

fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        ["1", "on", "true", "yes"].contains(&&*value.to_string_lossy().to_lowercase())
    })
}
