//! A model by its name on the Hugging Face hub: fetched into the hub's usual cache, or found there.

use std::{
    cell::Cell,
    env, fs,
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{ApiBuilder, ApiError, ApiRepo},
    },
};
use indicatif::ProgressBar;

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
        "`{name}`: {file} was cut off at {found} of {expected} bytes; run again to go on from there"
    )]
    Truncated { name: String, file: String, found: u64, expected: u64 },
    #[error(
        "there is no directory `{name}` here or beside the recipe, and the model of this name on the \
         hub could not be fetched: {problem}. Check the connection (and HF_ENDPOINT), and run again: what has \
         arrived is kept; or give the path of a directory"
    )]
    Failed { name: String, problem: String },
}

/// Whether a text could be a commit, which is a folder's name in the cache.
fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a path could be a model's name on the hub: `owner/model`.
pub fn is_name(path: &Path) -> bool {
    let allowed = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(inner) && !part.starts_with(['.', '-'])
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
    if !Path::new(revision).components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::NotFound { name, revision: revision.into() });
    }
    let cache = Cache::from_env();
    if is_set("HF_HUB_OFFLINE") {
        let offline = || Error::Offline {
            name: name.clone(),
            revision: revision.into(),
            cache: cache.path().clone(),
        };
        return cached(&cache, &name, revision).ok_or_else(offline);
    }
    let token = env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty());
    let token = token.or_else(|| cache.token());
    let api = ApiBuilder::from_env().with_token(token).with_progress(false).with_retries(2);
    let failed = |error: ApiError| fault(&name, revision, error);
    let api = api.build().map_err(failed)?;
    let repo =
        |revision: &str| Repo::with_revision(name.clone(), RepoType::Model, revision.to_owned());
    let info = match api.repo(repo(revision)).info() {
        Ok(info) => info,
        Err(error) => {
            let error = fault(&name, revision, error);
            // Without a connection, what was fetched before will do.
            let cached = cached(&cache, &name, revision);
            return match (error, cached) {
                (Error::Failed { problem, .. }, Some(found)) => {
                    tracing::warn!(
                        "the hub cannot be reached ({problem}): using the cached {name}"
                    );
                    Ok(found)
                }
                (error, _) => Err(error),
            };
        }
    };
    let files: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    if !files.iter().any(|file| is_wanted(file) && file.ends_with(".safetensors")) {
        let pickle = files.iter().find(|file| {
            [".bin", ".pt", ".pth", ".ckpt"].iter().any(|extension| file.ends_with(extension))
        });
        return Err(match pickle {
            Some(file) => Error::Pickle { name, file: (*file).into() },
            None => Error::NoWeights { name },
        });
    }
    // By its commit: the revision may move on while its files are fetched.
    let commit = info.sha.clone();
    if !is_commit(&commit) {
        return Err(Error::Failed {
            name,
            problem: format!("the hub calls its commit {commit:?}"),
        });
    }
    let pinned = api.repo(repo(&commit));
    let known = cache.repo(repo(&commit));
    for file in files.into_iter().filter(|file| is_wanted(file)) {
        if known.get(file).is_none() {
            download(&pinned, &name, revision, file, bar)?;
        }
    }
    let failed = |problem: std::io::Error| Error::Failed {
        name: name.clone(),
        problem: problem.to_string(),
    };
    cache.repo(repo(revision)).create_ref(&commit).map_err(failed)?;
    Ok(Located { dir: known.pointer_path(&commit), commit: Some(commit) })
}

/// Fetches one file, and checks that all of it has come.
fn download(
    repo: &ApiRepo,
    name: &str,
    revision: &str,
    file: &str,
    bar: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<(), Error> {
    let expected = Rc::new(Cell::new(0));
    let watch = Watch { bar: None, new: bar, expected: expected.clone() };
    let path =
        repo.download_with_progress(file, watch).map_err(|error| fault(name, revision, error))?;
    let failed =
        |problem: std::io::Error| Error::Failed { name: name.into(), problem: problem.to_string() };
    let found = fs::metadata(&path).map_err(failed)?.len();
    if found != expected.get() {
        // Nothing of it can be told to be right.
        let blob = fs::canonicalize(&path).map_err(failed)?;
        fs::remove_file(&path).and_then(|()| fs::remove_file(blob)).map_err(failed)?;
        let (name, file) = (name.into(), file.into());
        return Err(Error::Truncated { name, file, found, expected: expected.get() });
    }
    Ok(())
}

/// A file's download on its progress bar.
struct Watch<'a> {
    bar: Option<ProgressBar>,
    new: &'a dyn Fn(&str, u64) -> ProgressBar,
    expected: Rc<Cell<u64>>,
}

impl Progress for Watch<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.expected.set(size as u64);
        // A download that goes on says so again.
        self.bar.get_or_insert_with(|| (self.new)(filename, size as u64)).set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.bar.iter().for_each(|bar| bar.inc(size as u64));
    }

    fn finish(&mut self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
    }
}

/// What a checkpoint needs of a repository: configuration, tokenizer, licence, safetensors; nothing
/// in folders, and no other form of the weights.
fn is_wanted(file: &str) -> bool {
    let of_other_weights = file.starts_with("pytorch_model") || file.starts_with("consolidated");
    let extension = file.rsplit_once('.').map_or("", |(_, extension)| extension);
    let known = ["json", "jinja", "md", "model", "safetensors", "txt"].contains(&extension);
    let named = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|name| file.starts_with(name));
    !file.contains('/') && !file.starts_with('.') && !of_other_weights && (known || named)
}

/// The snapshot in the cache, if its revision was fetched.
fn cached(cache: &Cache, name: &str, revision: &str) -> Option<Located> {
    let repo = |revision: &str| Repo::with_revision(name.into(), RepoType::Model, revision.into());
    let config = cache.repo(repo(revision)).get("config.json")?;
    let dir = config.parent()?.to_owned();
    let commit = dir.file_name()?.to_string_lossy().into_owned();
    Some(Located { dir, commit: Some(commit) })
}

fn is_set(variable: &str) -> bool {
    env::var(variable)
        .is_ok_and(|value| ["1", "on", "true", "yes"].contains(&value.to_lowercase().as_str()))
}

fn fault(name: &str, revision: &str, error: ApiError) -> Error {
    match error {
        ApiError::TooManyRetries(error) => fault(name, revision, *error),
        ApiError::RequestError(error) => match *error {
            ureq::Error::StatusCode(404) => {
                Error::NotFound { name: name.into(), revision: revision.into() }
            }
            ureq::Error::StatusCode(status @ (401 | 403)) => {
                Error::Denied { name: name.into(), status }
            }
            error => Error::Failed { name: name.into(), problem: error.to_string() },
        },
        error => Error::Failed { name: name.into(), problem: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for name in ["HuggingFaceTB/SmolLM2-135M", "a/b.c_d-1"] {
            assert!(is_name(Path::new(name)), "{name}");
        }
        for path in ["model", "a/b/c", "./a", "../a/b", "/a/b", "a/", "a/../b", "a b/c", "a/.b"] {
            assert!(!is_name(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn commits_are_no_paths() {
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567"));
        for text in ["", "main", "../../../etc", "0123456/", &"0".repeat(65)] {
            assert!(!is_commit(text), "{text}");
        }
    }

    #[test]
    fn only_what_a_checkpoint_needs_is_wanted() {
        let wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"];
        let wanted = wanted.into_iter().chain(["model.safetensors.index.json", "LICENSE"]);
        wanted.for_each(|file| assert!(is_wanted(file), "{file}"));
        for file in [
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "onnx/model.onnx",
            "consolidated.safetensors",
            "model.gguf",
            ".gitattributes",
            "original/params.json",
        ] {
            assert!(!is_wanted(file), "{file}");
        }
    }
}
