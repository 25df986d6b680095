//! The files that a run wrote into a directory, according to its report. Only these are removed
//! when a result is replaced.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde::Deserialize;

use super::{Error, digest};
use crate::{files, limits};

/// The name of the resolved recipe in the directory that a run wrote.
pub const RECIPE: &str = "barber-recipe.toml";

/// The name of a report in the directory that a run wrote.
pub const JSON: &str = "barber-report.json";

/// The name of the report's page.
pub const HTML: &str = "barber-report.html";

/// The name of a model card.
pub const CARD: &str = "README.md";

/// The files of a result.
#[derive(Debug)]
pub(super) struct Owned {
    dir: PathBuf,
    /// The names of the files, with their digests if the report lists them.
    files: BTreeMap<OsString, Option<String>>,
}

/// The files that a report lists.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    outputs: BTreeMap<String, String>,
}

/// Maximum number of entries that a message names.
const NAMED: usize = 3;

impl Owned {
    /// The files in a directory; some that the report lists may be missing. The directory may be
    /// empty.
    ///
    /// # Errors
    /// If the directory has no report, or has a file that no run wrote.
    pub(super) fn of(dir: &Path) -> Result<Self, Error> {
        let io = |e| Error::io(dir, e);
        let mut entries = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            entries.insert(entry.file_name(), entry.file_type().map_err(io)?);
        }
        let mut owned = Self { dir: dir.to_owned(), files: BTreeMap::new() };
        if entries.is_empty() {
            return Ok(owned);
        }
        let report = dir.join(JSON);
        if !entries.contains_key(report.file_name().unwrap_or_default()) {
            return Err(Error::NoReport(dir.to_owned()));
        }
        let text = limits::read(&report, limits::REPORT).map_err(|e| Error::io(&report, e))?;
        let Listed { mut outputs } = serde_json::from_slice(&text)
            .map_err(|e| Error::Json { path: report, problem: e.to_string() })?;
        let mut foreign = Vec::new();
        for (name, kind) in entries {
            let digest = name.to_str().and_then(|name| outputs.remove(name));
            // A report lists neither itself nor its page.
            let own = digest.is_some() || name == JSON || name == HTML;
            if own && kind.is_file() {
                owned.files.insert(name, digest);
            } else {
                let end = if kind.is_dir() { "/" } else { "" };
                foreign.push(format!("{}{end}", name.display()));
            }
        }
        match foreign.is_empty() {
            true => Ok(owned),
            false => Err(Error::Unlisted { dir: dir.to_owned(), entries: listed(&foreign) }),
        }
    }

    /// Checks that the files are unchanged since the run wrote them.
    ///
    /// # Errors
    /// If a file has changed, or cannot be read.
    pub(super) fn unchanged(self) -> Result<Self, Error> {
        let changed = self.files.par_iter().filter_map(|(name, written)| {
            let written = written.as_ref()?;
            match digest(&self.dir.join(name)) {
                Ok(found) if found == *written => None,
                Ok(_) => Some(Ok(name.display().to_string())),
                Err(error) => Some(Err(error)),
            }
        });
        let changed = changed.collect::<Result<Vec<_>, Error>>()?;
        match changed.is_empty() {
            true => Ok(self),
            false => Err(Error::Edited { dir: self.dir, entries: listed(&changed) }),
        }
    }

    /// Removes the files and then the directory. The report is removed last, as it lists the rest
    /// if this is interrupted.
    ///
    /// # Errors
    /// If a file cannot be removed, or a file was added to the directory.
    pub(super) fn remove(&self) -> Result<(), Error> {
        let remove = |name: &OsString| {
            let path = self.dir.join(name);
            files::remove(&path).map_err(|e| Error::io(&path, e))
        };
        self.files.keys().filter(|name| *name != JSON).try_for_each(remove)?;
        self.files.keys().filter(|name| *name == JSON).try_for_each(remove)?;
        match files::remove_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                // This error names the added files.
                Self::of(&self.dir)?;
                Err(Error::io(&self.dir, e))
            }
            removed => removed.map_err(|e| Error::io(&self.dir, e)),
        }
    }
}

/// Names in a message: the first few, and the number of the others.
pub(super) fn listed(names: &[String]) -> String {
    let first = names[..names.len().min(NAMED)].join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A directory with a report that lists `listed`.
    fn result(listed: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut outputs = serde_json::Map::new();
        for name in listed {
            fs::write(dir.path().join(name), name).unwrap();
            outputs.insert((*name).into(), super::super::digest_text(name).into());
        }
        let report = serde_json::json!({ "outputs": outputs }).to_string();
        fs::write(dir.path().join(JSON), report).unwrap();
        fs::write(dir.path().join(HTML), "a page").unwrap();
        dir
    }

    #[test]
    fn a_result_is_removed_and_nothing_else() {
        let dir = result(&["config.json", "model.safetensors"]);
        let owned = Owned::of(dir.path()).unwrap().unchanged().unwrap();
        // What comes in meanwhile stays.
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        fs::create_dir(dir.path().join("runs")).unwrap();
        assert!(owned.remove().is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(Owned::of(dir.path()).is_err_and(|e| matches!(e, Error::NoReport(_))));

        let dir = result(&["config.json"]);
        Owned::of(dir.path()).unwrap().remove().unwrap();
        assert!(!dir.path().exists());
    }

    #[test]
    fn what_changed_is_named() {
        let dir = result(&["config.json", "model.safetensors"]);
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        let error = Owned::of(dir.path()).unwrap().unchanged().unwrap_err().to_string();
        assert!(error.contains("config.json changed since the run wrote"), "{error}");
    }

    #[test]
    fn a_directory_without_a_report_is_not_owned() {
        let dir = tempfile::tempdir().unwrap();
        Owned::of(dir.path()).unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(Owned::of(dir.path()).is_err_and(|e| matches!(e, Error::NoReport(_))));
        for report in ["", "[]", "{\"outputs\": 3}", "{\"outputs\": {\"config.json\": 3}}"] {
            fs::write(dir.path().join(JSON), report).unwrap();
            assert!(Owned::of(dir.path()).is_err(), "{report}");
        }
        // A report that lists nothing owns nothing but itself.
        fs::write(dir.path().join(JSON), "{}").unwrap();
        let error = Owned::of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("holds config.json, which no run wrote"), "{error}");
    }

    #[test]
    fn a_few_names_are_shown() {
        let names: Vec<String> = ["a", "b", "c", "d", "e"].map(str::to_owned).into();
        assert_eq!(listed(&names[..3]), "a, b, c");
        assert_eq!(listed(&names), "a, b, c and 2 more");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Whatever else is in a directory, it is named and stays.
        #[test]
        fn nothing_foreign_is_owned(
            name in "[a-z.]{1,8}",
            kind in 0..3u8,
        ) {
            let dir = result(&["config.json"]);
            let path = dir.path().join(&name);
            prop_assume!(!path.exists() && !name.chars().all(|c| c == '.'));
            match kind {
                0 => fs::write(&path, "").unwrap(),
                1 => fs::create_dir(&path).unwrap(),
                _ => {
                    #[cfg(unix)]
                    std::os::unix::fs::symlink("config.json", &path).unwrap();
                    #[cfg(not(unix))]
                    fs::write(&path, "").unwrap();
                }
            }
            let error = Owned::of(dir.path()).unwrap_err().to_string();
            prop_assert!(error.contains(&format!("holds {name}")), "{}", error);
        }
    }
}
