//! Reads reports from disk.

use std::{
    collections::BTreeMap,
    io,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::Error as _};

use super::{Report, bounds};
use crate::{checkpoint::JSON, limits};

/// Why a report cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: {source}; give a directory that `barber prune` wrote, a directory of such, or a {JSON}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file is not a report.
    #[error("{}: not the report of a run: {problem}", path.display())]
    Format {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
}

/// Reads the report of a run from a JSON file, or from the output directory of a run.
///
/// # Errors
/// If the file cannot be read, or is not a report.
pub fn read(path: &Path) -> Result<Report, Error> {
    let path = if path.is_dir() { path.join(JSON) } else { path.to_owned() };
    let text = match limits::read(&path, limits::REPORT) {
        Ok(text) => text,
        Err(source) => return Err(Error::Read { path, source }),
    };
    let report = serde_json::from_slice(&text).map_err(|e| e.to_string());
    let report = report.and_then(|report: Report| bounds::check(&report).map(|()| report));
    report.map_err(|problem| Error::Format { path, problem })
}

/// Reads digests of the files beside a report. Rejects names with a directory part.
pub(super) fn of_files<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let digests = BTreeMap::<String, String>::deserialize(deserializer)?;
    match digests.keys().find(|name| !is_plain(name)) {
        Some(name) => {
            Err(D::Error::custom(format!("{name:?} is not the name of a file beside it")))
        }
        None => Ok(digests),
    }
}

fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Matrix;

    fn written(json: &str) -> Result<Report, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(JSON), json).unwrap();
        read(dir.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn outputs_are_beside_the_report() {
        let report = |name: &str| {
            let outputs = BTreeMap::from([(name.to_owned(), "00".to_owned())]);
            let report = Report { outputs, ..Report::default() };
            written(&serde_json::to_string(&report).unwrap())
        };
        assert_eq!(report("model.safetensors").unwrap().outputs.len(), 1);
        for name in ["../a", "/dev/zero", "a/b", "", ".", "..", "a/"] {
            let error = report(name).unwrap_err();
            assert!(error.contains("is not the name of a file beside it"), "{name}: {error}");
        }
    }

    #[test]
    fn what_no_run_writes_is_refused() {
        let matrix = Matrix { shape: [2, 2], kept: 3, initial: 2, ..Matrix::default() };
        let fine = Report { matrices: vec![matrix], prunable_weights: 4, ..Report::default() };
        let read = |report: &Report| written(&serde_json::to_string(report).unwrap());
        assert_eq!(read(&fine).unwrap().matrices, fine.matrices);
        for (change, expected) in [
            (Matrix { layer: 1024, ..fine.matrices[0].clone() }, "the number of a layer"),
            (Matrix { shape: [usize::MAX; 2], ..fine.matrices[0].clone() }, "weights of a matrix"),
            (Matrix { kept: 5, ..fine.matrices[0].clone() }, "kept weights of a matrix"),
            (Matrix { group: "g".repeat(2000), ..fine.matrices[0].clone() }, "bytes of a name"),
        ] {
            let error = read(&Report { matrices: vec![change], ..fine.clone() }).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let groups = (0..200).map(|i| Matrix { group: i.to_string(), ..fine.matrices[0].clone() });
        let error = read(&Report { matrices: groups.collect(), ..fine.clone() }).unwrap_err();
        assert!(error.contains("200 names of groups; a report has at most 128"), "{error}");
    }

    #[test]
    fn reports_have_their_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JSON);
        std::fs::File::create(&path).unwrap().set_len(3 << 30).unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("the limit for a report"), "{error}");
        let deep = written(&"[".repeat(1 << 20)).unwrap_err();
        assert!(deep.contains("not the report of a run"), "{deep}");
    }
}
