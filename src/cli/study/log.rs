//! The log of a study's finished runs, from which an interrupted study continues.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{cli::Error, executor::or_nan, files, journal::changed, limits, run};

/// The identity of a run in a study.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Id {
    /// Name of the method.
    pub(super) method: String,
    /// Name of the case.
    pub(super) case: String,
    /// The calibration's seed.
    pub(super) seed: u64,
    /// The digest of the resolved recipe.
    pub(super) settings: String,
}

impl Id {
    /// Adds the run to an error.
    pub(super) fn failed(&self, error: impl Into<Error>) -> Error {
        Error::Run { run: self.to_string(), error: Box::new(error.into()) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, seed {}", self.method, self.case, self.seed)
    }
}

/// Files, each with its SHA-256.
pub(super) type Inputs = BTreeMap<PathBuf, String>;

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) id: Id,
    /// SHA-256 of the files that the run read.
    pub(super) inputs: Inputs,
    /// Perplexity on each text.
    pub(super) perplexity: Vec<Score>,
    /// Fraction of right answers on each task.
    pub(super) accuracy: Vec<Score>,
    /// Seconds for the initial masks and their refinement.
    pub(super) seconds: f64,
}

/// The measurements on a text or a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    /// Name of the text or the task.
    pub(super) on: String,
    /// Value of the dense model.
    #[serde(deserialize_with = "or_nan")]
    pub(super) dense: f64,
    /// Standard error of `dense`, if known.
    #[serde(default)]
    pub(super) dense_stderr: Option<f64>,
    /// Value of the pruned model.
    #[serde(deserialize_with = "or_nan")]
    pub(super) pruned: f64,
    /// Standard error of `pruned`, if known.
    #[serde(default)]
    pub(super) pruned_stderr: Option<f64>,
}

/// The perplexities and the accuracies of a model, with their standard errors where these are
/// known.
pub(super) type Figures = [Vec<(f64, Option<f64>)>; 2];

/// The finished runs, and their file.
#[derive(Default)]
pub(super) struct Log {
    file: Option<(PathBuf, File)>,
    records: Vec<Record>,
}

/// The beginning of a run's line.
const BEGINNING: &[u8] = br#"{"method":""#;

impl Log {
    /// Opens the log in a file, creating it if necessary; without a path, the log is empty. Adds what
    /// a job that did not end left in its ranks' logs, and removes these.
    pub(super) fn open(path: Option<&Path>) -> Result<Self, Error> {
        let Some(path) = path else { return Ok(Self::default()) };
        let mut log = Self::read(path)?;
        for part in parts(path)? {
            for record in Self::read(&part)?.records {
                if log.find(&record.id).is_none() {
                    log.add(record)?;
                }
            }
        }
        remove_parts(path)?;
        Ok(log)
    }

    /// The log of a rank of several, in a file of its own beside `path`, into which the first rank
    /// writes. Appending to one file from several machines is not safe on every file system.
    pub(super) fn of_rank(path: Option<&Path>, rank: usize) -> Result<Self, Error> {
        path.map_or_else(|| Ok(Self::default()), |path| Self::read(&part(path, &rank.to_string())))
    }

    /// Opens the log in a file, creating it if necessary. Removes a last line that was cut off.
    fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        // A FIFO would block, and a device may be endless.
        if path.exists() {
            files::open(path).map_err(failed)?;
        }
        let options = File::options().read(true).append(true).create(true).open(path);
        let mut file = options.map_err(failed)?;
        let bytes = limits::LOG.read(&mut file).map_err(failed)?;
        let mut records = Vec::new();
        let lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let mut whole = 0;
        for (line, number) in lines.zip(1..) {
            let read = |line| serde_json::from_slice(line);
            match read(line) {
                Ok(record) => records.push(record),
                // The line was being written when the study was interrupted.
                Err(_) if !line.ends_with(b"\n") && is_torn(line) => {
                    tracing::warn!(
                        "{}: line {number} was cut off; its run is done again",
                        path.display()
                    );
                    break;
                }
                Err(error) => {
                    let (path, problem) = (path.to_owned(), error.to_string());
                    return Err(Error::NoRecord { path, line: number, problem });
                }
            }
            whole += line.len();
        }
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(failed)?;
        } else if bytes.last().is_some_and(|byte| *byte != b'\n') {
            file.write_all(b"\n").map_err(failed)?;
        }
        Ok(Self { file: Some((path.to_owned(), file)), records })
    }

    /// The record of a run, if it is finished.
    pub(super) fn find(&self, id: &Id) -> Option<&Record> {
        self.records.iter().find(|record| record.id == *id)
    }

    /// The finished runs; closes the file.
    pub(super) fn into_records(self) -> Vec<Record> {
        self.records
    }

    /// Adds a finished run, also to the file.
    pub(super) fn add(&mut self, record: Record) -> Result<(), Error> {
        if let Some((path, file)) = &mut self.file {
            let line =
                serde_json::to_string(&record).map_err(|e| run::Error::Report(e.to_string()))?;
            let written = file.write_all(format!("{line}\n").as_bytes());
            written
                .and_then(|()| file.sync_all())
                .map_err(|source| Error::File { path: path.clone(), source })?;
        }
        self.records.push(record);
        Ok(())
    }

    /// Checks that a recorded run had the same inputs.
    ///
    /// # Errors
    /// [`Error::OtherInputs`] with the inputs that have changed.
    pub(super) fn check(&self, id: &Id, inputs: &Inputs) -> Result<(), Error> {
        let Some(((path, _), record)) = self.file.as_ref().zip(self.find(id)) else {
            return Ok(());
        };
        let differences = changed(&record.inputs, inputs);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherInputs { path: path.clone(), run: id.to_string(), differences })
    }
}

/// Name of a rank's log.
fn part(path: &Path, rank: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".rank-");
    name.push(rank);
    path.with_file_name(name)
}

/// The ranks' logs beside a log.
fn parts(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let failed = |source| Error::File { path: dir.to_owned(), source };
    let mut found = Vec::new();
    let beginning = part(path, "");
    for entry in dir.read_dir().map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let rank = name.to_str().zip(beginning.file_name().and_then(OsStr::to_str));
        let rank = rank.and_then(|(name, beginning)| name.strip_prefix(beginning));
        if let Some(rank) = rank.filter(|rank| rank.parse::<usize>().is_ok()) {
            found.push(part(path, rank));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes the ranks' logs, whose runs are in the log.
pub(super) fn remove_parts(path: &Path) -> Result<(), Error> {
    for part in parts(path)? {
        fs::remove_file(&part).map_err(|source| Error::File { path: part, source })?;
    }
    Ok(())
}

/// Whether an incomplete line is the beginning of a run's line.
fn is_torn(line: &[u8]) -> bool {
    line.starts_with(BEGINNING) || BEGINNING.starts_with(line)
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
        let score = |pruned| Score {
            on: "text".into(),
            dense: 2.0,
            dense_stderr: Some(0.5),
            pruned,
            pruned_stderr: None,
        };
        let run = |seed, pruned| Record {
            id: id(seed),
            inputs: Inputs::from([("/model".into(), "12".into())]),
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
        assert_eq!(std::fs::read(&path).unwrap().len(), 18);
    }

    #[cfg(unix)]
    #[test]
    fn a_log_is_a_file_within_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs.jsonl");
        let problem = |path: &Path| Log::open(Some(path)).map(|_| ()).unwrap_err().to_string();
        File::create(&path).unwrap().set_len(3 << 30).unwrap();
        assert!(problem(&path).contains("the limit for the log of a study"));
        let socket = dir.path().join("socket");
        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [Path::new("/dev/zero"), &socket, dir.path()] {
            assert!(problem(path).contains("not a regular file"), "{}", path.display());
        }
    }

    #[test]
    fn a_line_that_was_cut_off_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs.jsonl");
        let id = |seed| Id { method: "a".into(), case: "β".into(), seed, settings: "ab".into() };
        // A number whose last digit is easily lost.
        let score = Score {
            on: "t".into(),
            dense: 1.865_302_563_137_105_7,
            dense_stderr: Some(0.1 + 0.7),
            pruned: 0.1 + 0.2,
            pruned_stderr: None,
        };
        let record = |seed| Record {
            id: id(seed),
            inputs: Inputs::default(),
            perplexity: vec![score.clone()],
            accuracy: Vec::new(),
            seconds: 1.0,
        };
        let mut log = Log::open(Some(&path)).unwrap();
        log.add(record(0)).unwrap();
        log.add(record(1)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        for end in first..=whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            let mut log = Log::open(Some(&path)).unwrap();
            assert_eq!(log.find(&id(0)), Some(&record(0)));
            if log.find(&id(1)).is_none() {
                assert!(end < whole.len() - 1, "{end}");
                log.add(record(1)).unwrap();
            }
            drop(log);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "{end}");
        }
    }

    #[test]
    fn the_logs_of_ranks_are_added_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs.jsonl");
        let record = |seed| Record {
            id: Id { method: "a".into(), case: "b".into(), seed, settings: "ab".into() },
            inputs: Inputs::default(),
            perplexity: Vec::new(),
            accuracy: Vec::new(),
            seconds: 1.0,
        };
        Log::open(Some(&path)).unwrap().add(record(0)).unwrap();
        for (rank, seeds) in [(1, 0..2), (12, 2..4)] {
            let mut log = Log::of_rank(Some(&path), rank).unwrap();
            seeds.for_each(|seed| log.add(record(seed)).unwrap());
        }
        let other = dir.path().join("runs.jsonl.rank-old");
        fs::write(&other, "mine").unwrap();
        // The last run was being written.
        let torn = dir.path().join("runs.jsonl.rank-12");
        let bytes = fs::read(&torn).unwrap();
        fs::write(&torn, &bytes[..bytes.len() - 5]).unwrap();
        for _ in 0..2 {
            let records = Log::open(Some(&path)).unwrap().into_records();
            assert_eq!(records, [record(0), record(1), record(2)]);
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn inputs_that_changed_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs.jsonl");
        let id = Id { method: "a".into(), case: "b".into(), seed: 3, settings: "ab".into() };
        let inputs = |digest: &str| Inputs::from([("/m/x".into(), digest.into())]);
        let mut log = Log::open(Some(&path)).unwrap();
        let (perplexity, accuracy) = (Vec::new(), Vec::new());
        log.add(Record { id: id.clone(), inputs: inputs("1"), perplexity, accuracy, seconds: 1.0 })
            .unwrap();
        log.check(&id, &inputs("1")).unwrap();
        let error = log.check(&id, &inputs("2")).unwrap_err().to_string();
        assert!(error.contains("a, b, seed 3") && error.contains("/m/x has changed"), "{error}");
        log.check(&Id { seed: 4, ..id }, &inputs("2")).unwrap();
    }
}
