//! The finished runs of a study, in a file for a study that is started again.

use std::{
    fmt,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{cli::Error, number::or_nan, run};

/// What tells a run from others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Id {
    /// The method.
    pub(super) method: String,
    /// The case.
    pub(super) case: String,
    /// The calibration's seed.
    pub(super) seed: u64,
    /// The digest of the resolved recipe.
    pub(super) settings: String,
}

impl Id {
    /// Says which run failed.
    pub(super) fn failed(&self, error: impl Into<Error>) -> Error {
        Error::Run { run: self.to_string(), error: Box::new(error.into()) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, seed {}", self.method, self.case, self.seed)
    }
}

/// A run that is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) id: Id,
    /// Text by text.
    pub(super) perplexity: Vec<Score>,
    /// Task by task, the share of right answers.
    pub(super) accuracy: Vec<Score>,
    /// What the masks took, initial and refined.
    pub(super) seconds: f64,
}

impl Record {
    /// The perplexities and the accuracies of the dense model.
    pub(super) fn dense(&self) -> [Vec<f64>; 2] {
        [&self.perplexity, &self.accuracy]
            .map(|scores| scores.iter().map(|score| score.dense).collect())
    }
}

/// What was measured on a text or a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    /// The text or the task.
    pub(super) on: String,
    /// Of the dense model.
    #[serde(deserialize_with = "or_nan")]
    pub(super) dense: f64,
    /// Of the pruned one.
    #[serde(deserialize_with = "or_nan")]
    pub(super) pruned: f64,
}

/// The runs that are done.
#[derive(Default)]
pub(super) struct Log {
    file: Option<(PathBuf, File)>,
    records: Vec<Record>,
}

impl Log {
    /// The runs in a file, which is made if there is none; without a file, none.
    pub(super) fn open(path: Option<&Path>) -> Result<Self, Error> {
        let Some(path) = path else { return Ok(Self::default()) };
        let failed = |source| Error::File { path: path.to_owned(), source };
        let options = File::options().read(true).append(true).create(true).open(path);
        let mut file = options.map_err(failed)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let mut records = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let record = serde_json::from_str(line).map_err(|e| Error::NoRecord {
                path: path.to_owned(),
                line: number,
                problem: e.to_string(),
            })?;
            records.push(record);
        }
        Ok(Self { file: Some((path.to_owned(), file)), records })
    }

    /// A run, if it is done.
    pub(super) fn find(&self, id: &Id) -> Option<&Record> {
        self.records.iter().find(|record| record.id == *id)
    }

    /// Adds a run that is done.
    pub(super) fn add(&mut self, record: Record) -> Result<(), Error> {
        if let Some((path, file)) = &mut self.file {
            let line =
                serde_json::to_string(&record).map_err(|e| run::Error::Report(e.to_string()))?;
            file.write_all(format!("{line}\n").as_bytes())
                .map_err(|source| Error::File { path: path.clone(), source })?;
        }
        self.records.push(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs.jsonl");
        let id =
            |seed| Id { method: "Wanda".into(), case: "2:4".into(), seed, settings: "ab".into() };
        let score = |pruned| Score { on: "text".into(), dense: 2.0, pruned };
        let run = |seed, pruned| Record {
            id: id(seed),
            perplexity: vec![score(pruned)],
            accuracy: Vec::new(),
            seconds: 0.5,
        };
        let mut log = Log::open(Some(&path)).unwrap();
        log.add(run(0, 3.5)).unwrap();
        log.add(run(1, f64::NAN)).unwrap();
        let log = Log::open(Some(&path)).unwrap();
        assert_eq!(log.find(&id(0)), Some(&run(0, 3.5)));
        assert!(log.find(&id(1)).unwrap().perplexity[0].pruned.is_nan());
        assert_eq!(log.find(&id(2)), None);
        assert_eq!(log.find(&Id { settings: "ac".into(), ..id(0) }), None);

        std::fs::write(&path, "{\"method\": \"Wanda\"").unwrap();
        let error = Log::open(Some(&path)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("runs.jsonl, line 1"), "{error}");
    }
}
