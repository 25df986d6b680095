//! Finds models by their name on the Hugging Face hub, in the hub's usual cache, or fetches them.

#[cfg(feature = "hub")]
mod fetch;

use std::path::{Path, PathBuf};

use crate::progress::Bar;

/// A model's checkpoint on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Directory of the checkpoint.
    pub dir: PathBuf,
    /// Commit of the checkpoint; `None` if it is not from the hub.
    pub commit: Option<String>,
}

/// Why a model is not the caller's to use.
pub type Unsuitable = Box<dyn std::error::Error + Send + Sync>;

/// Why a model could not be located or fetched, and what to do.
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
        "`{name}` at revision `{revision}` is not in the cache {}, and HF_HUB_OFFLINE forbids \
         fetching it",
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
        "`{name}` cannot be fetched from the hub: {problem}. Nothing of it is kept; if HF_ENDPOINT \
         is a mirror, try another one, or give the path of a directory"
    )]
    Refused { name: String, problem: String },
    #[error("`{name}` on the hub is not fetched: {problem}")]
    Unsuitable { name: String, problem: Unsuitable },
    #[error("{name}: {problem}")]
    Setting { name: &'static str, problem: String },
    #[error(
        "there is no directory `{name}` here or beside the recipe, and this barber was built without \
         the hub; build it with its feature `hub`"
    )]
    NotBuilt { name: String },
    #[error(
        "there is no home directory for the cache of the hub's models; set HF_HOME to a directory \
         for it"
    )]
    NoHome,
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

/// The checkpoint at a path or with a name on the hub. A name that is not a directory is looked up
/// in the cache, and missing files are fetched. `bar` makes the progress bar of a file from its
/// name and size in bytes. `suits` judges the directory before weights are fetched into it, by its
/// other files. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as in the hub's
/// own tools.
///
/// # Errors
/// If it does not exist, cannot be fetched, or does not suit.
pub fn locate(
    path: &Path,
    revision: Option<&str>,
    bar: &dyn Fn(&str, u64) -> Box<dyn Bar>,
    suits: &dyn Fn(&Path) -> Result<(), Unsuitable>,
) -> Result<Located, Error> {
    if path.is_dir() || !is_name(path) {
        return match revision {
            Some(_) if path.is_dir() => Err(Error::RevisionOfDirectory(path.to_owned())),
            _ => Ok(Located { dir: path.to_owned(), commit: None }),
        };
    }
    #[cfg(feature = "hub")]
    return fetch::fetch(path, revision, bar, suits);
    #[cfg(not(feature = "hub"))]
    {
        let _ = (bar, suits);
        Err(Error::NotBuilt { name: path.to_string_lossy().into_owned() })
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
        for path in
            ["model", "a/b/c", "./a", "../a/b", "/a/b", "a/", "a/../b", "a b/c", "a/.b", "a--b/c"]
        {
            assert!(!is_name(Path::new(path)), "{path}");
        }
    }
}
