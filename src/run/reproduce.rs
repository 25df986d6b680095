//! Runs the recipe of a result again, and compares.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use super::{
    Error, Settings, Watch, prune,
    verify::{digest_if_there, recipe},
};
use crate::{
    checkpoint::{self, RECIPE},
    report::{self, Report},
    version::Version,
};

/// The result of [`reproduce`].
#[derive(Clone, Debug)]
pub struct Reproduced {
    /// Number of files that were compared.
    pub files: usize,
    /// The version that made the result; `None` if it is this one.
    pub version: Option<Version>,
    /// All differences.
    pub differences: Vec<Difference>,
}

/// A difference between a result and its rerun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Difference {
    #[error("{}, which the run read, no longer exists", .0.display())]
    InputGone(PathBuf),
    #[error("{}, which the run read, has changed since", .0.display())]
    InputChanged(PathBuf),
    #[error("{file} differs from byte {at} on")]
    Bytes { file: String, at: u64 },
    #[error("only one of the two results has {file}")]
    File { file: String },
    #[error("the report's {0} differ")]
    Report(&'static str),
}

/// Runs the recipe of the result in `dir` again, in a temporary directory beside it, and compares
/// byte for byte. If an input has changed, nothing is run.
///
/// # Errors
/// If the directory is not the result of a run, or the run fails. Differences are not errors.
pub fn reproduce(dir: &Path, watch: &dyn Watch) -> Result<Reproduced, Error> {
    let before = report::read(dir).map_err(Error::NoReport)?;
    let now = Version::current();
    let mut found = Reproduced {
        files: 0,
        version: (before.version != now).then(|| before.version.clone()),
        differences: Vec::new(),
    };
    for (path, digest) in &before.inputs {
        match digest_if_there(path)? {
            None => found.differences.push(Difference::InputGone(path.clone())),
            Some(now) if now != *digest => {
                found.differences.push(Difference::InputChanged(path.clone()));
            }
            Some(_) => {}
        }
    }
    if !found.differences.is_empty() {
        return Ok(found);
    }
    let io = checkpoint::Error::at;
    let dir = std::fs::canonicalize(dir).map_err(io(dir))?;
    let parent = dir.parent().unwrap_or(&dir);
    let beside = tempfile::Builder::new().prefix(".reproduce-").tempdir_in(parent);
    let beside = beside.map_err(io(parent))?;
    let again = beside.path().join("again");
    let mut loaded = recipe(&dir)?;
    loaded.recipe.output.path = Some(again.clone());
    let settings = Settings { watch, save_every: None, ..Settings::default() };
    let after = prune(&loaded, &settings)?;
    found.files = after.outputs.len();
    let names = before.outputs.keys().chain(after.outputs.keys());
    for file in names.cloned().collect::<BTreeSet<_>>() {
        let [old, new] = [&dir, &again].map(|dir| dir.join(&file));
        if !old.is_file() || !new.is_file() {
            found.differences.push(Difference::File { file });
        } else if file == RECIPE {
            let [mut old, new] = [recipe(&dir)?.recipe, recipe(&again)?.recipe];
            old.output.path.clone_from(&new.output.path);
            if old != new {
                found.differences.push(Difference::Bytes { file, at: 0 });
            }
        } else if let Some(at) = first_difference(&old, &new)? {
            found.differences.push(Difference::Bytes { file, at });
        }
    }
    found.differences.extend(differing(&before, &after).into_iter().map(Difference::Report));
    Ok(found)
}

/// The parts of a report, read from a file, that should be the same in a new one but differ.
fn differing(one: &Report, other: &Report) -> Vec<&'static str> {
    // A number read from JSON may differ in its last bit, so both reports go through JSON.
    let text = serde_json::to_vec::<dyn erased_serde::Serialize>(other).unwrap_or_default();
    let other: Report = serde_json::from_slice(&text).unwrap_or_default();
    // Texts are not compared by name: a name may be a path, which can be written in several ways.
    let perplexities = |report: &Report| {
        report.perplexity.iter().map(|text| text.found.clone()).collect::<Vec<_>>()
    };
    let counts = |report: &Report| {
        [
            report.model_weights,
            report.prunable_weights,
            report.pruned_weights,
            report.changed_weights,
            report.changed_biases,
            report.output_weights,
        ]
    };
    let same = [
        ("counts of weights", counts(one) == counts(&other)),
        ("structures", one.structures == other.structures),
        ("permuted", one.permuted == other.permuted),
        ("experts", one.experts == other.experts),
        ("calibration samples", one.calibration == other.calibration),
        ("sizes", one.sizes == other.sizes),
        ("allocation", one.allocation == other.allocation),
        ("matrices", one.matrices == other.matrices),
        ("groups", one.groups == other.groups),
        ("perplexities", perplexities(one) == perplexities(&other)),
        ("accuracies", one.tasks == other.tasks),
    ];
    same.iter().filter(|(_, same)| !same).map(|(name, _)| *name).collect()
}

/// The offset of the first byte in which two files differ.
fn first_difference(one: &Path, other: &Path) -> Result<Option<u64>, checkpoint::Error> {
    let at = checkpoint::Error::at;
    let open = |path| File::open(path).map(BufReader::new).map_err(at(path));
    let [mut file, mut again] = [open(one)?, open(other)?];
    let mut same = 0;
    loop {
        let a = file.fill_buf().map_err(at(one))?;
        let b = again.fill_buf().map_err(at(other))?;
        let both = a.len().min(b.len());
        if let Some(i) = a.iter().zip(b).position(|(a, b)| a != b) {
            return Ok(Some(same + i as u64));
        }
        if both == 0 {
            return Ok((a.len() != b.len()).then_some(same));
        }
        file.consume(both);
        again.consume(both);
        same += both as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let long = vec![7; 1 << 17];
        let one = file("one", &long);
        let found = |bytes: &[u8]| first_difference(&one, &file("other", bytes)).unwrap();
        assert_eq!(found(&long), None);
        assert_eq!(found(&long[1..]), Some((1 << 17) - 1));
        assert_eq!(found(&[&long[..], &[7]].concat()), Some(1 << 17));
        assert_eq!(found(&[&long[..70_000], &[6], &long[70_001..]].concat()), Some(70_000));
    }
}
