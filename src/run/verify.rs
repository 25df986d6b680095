//! Whether a result is what its report says, and nothing but the dense model with zeros in it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{Error, RECIPE, Steps, Watch};
use crate::{
    checkpoint::{Reader, digest, unravel},
    hub::locate,
    mask::Pattern,
    recipe::{Loaded, load_text},
    report::{self, Matrix, Report},
};

/// What is wrong with a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Finding {
    #[error("{file} is not there")]
    Missing { file: String },
    #[error("{file} is not as it was written")]
    FileChanged { file: String },
    #[error("{}, which the run read, has changed since", path.display())]
    InputChanged { path: PathBuf },
    #[error("there is no tensor `{tensor}`")]
    NoTensor { tensor: String },
    #[error("tensor `{tensor}` has {found} zeros, and should have at least {expected}")]
    Zeros { tensor: String, found: usize, expected: usize },
    #[error("tensor `{tensor}`: the report has no pattern, but {pattern:?}")]
    NoPattern { tensor: String, pattern: String },
    #[error("tensor `{tensor}`: the tile at {index:?} keeps more than {pattern} allows")]
    Pattern { tensor: String, pattern: Pattern, index: Vec<usize> },
    #[error("tensor `{tensor}` is in one of the two models only, or of another shape")]
    Other { tensor: String },
    #[error(
        "tensor `{tensor}`: {count} kept weights are not the dense model's; the first at {index:?}"
    )]
    NotDense { tensor: String, count: usize, index: Vec<usize> },
    #[error(
        "tensor `{tensor}`: {found} weights were pruned, and should have been at most {expected}"
    )]
    Pruned { tensor: String, found: usize, expected: usize },
    #[error("{found} kept weights are not the dense model's, and the report knows of {expected}")]
    Changed { found: usize, expected: usize },
}

/// What became of the comparison with the dense model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dense {
    /// It was compared.
    Compared {
        /// The model.
        model: PathBuf,
        /// How many kept weights the run changed, as its recipe wanted.
        changed: usize,
    },
    /// It is not on this machine.
    NotThere(PathBuf),
}

/// What [`verify`] looked at, and what it found.
#[derive(Clone, Debug)]
pub struct Verified {
    /// How many files were compared with their digests.
    pub files: usize,
    /// How many inputs of the run were.
    pub inputs: usize,
    /// Inputs that are not there any more.
    pub gone: Vec<PathBuf>,
    /// How many matrices were pruned.
    pub matrices: usize,
    /// How many weights they have.
    pub weights: usize,
    /// How many of them are zero.
    pub zeros: usize,
    /// Whether it was compared with the dense model.
    pub dense: Dense,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Checks the result of a run in `dir` against its report: its files, what the run read, the zeros of
/// each matrix, and bit for bit the weights of the dense model, which is `dense` or else what the
/// recipe names, if that is a directory.
///
/// # Errors
/// If the directory is no result of a run, or something cannot be read. What is wrong with the
/// result is no error but a [`Finding`].
pub fn verify(dir: &Path, dense: Option<&Path>, watch: &dyn Watch) -> Result<Verified, Error> {
    let written = report::read(dir).map_err(Error::NoReport)?;
    let mut findings = Vec::new();
    for (file, expected) in &written.outputs {
        match digest_if_there(&dir.join(file))? {
            None => findings.push(Finding::Missing { file: file.clone() }),
            Some(found) if found != *expected => {
                findings.push(Finding::FileChanged { file: file.clone() });
            }
            Some(_) => {}
        }
    }
    let mut gone = Vec::new();
    for (path, expected) in &written.inputs {
        match digest_if_there(path)? {
            None => gone.push(path.clone()),
            Some(found) if found != *expected => {
                findings.push(Finding::InputChanged { path: path.clone() });
            }
            Some(_) => {}
        }
    }
    let sparse = Reader::open(dir)?;
    let zeros = zeros(&sparse, &written, &mut findings)?;
    let recipe = recipe(dir)?.recipe.model;
    let model = match dense {
        Some(dense) => {
            let revision = recipe.revision.filter(|_| *dense == recipe.path && !dense.is_dir());
            locate(dense, revision.as_deref(), &|file, bytes| watch.bar(file, Steps::Bytes(bytes)))?
                .dir
        }
        None => recipe.path,
    };
    let dense = if dense.is_some() || model.is_dir() {
        let changed = compare(&sparse, &Reader::open(&model)?, &written, &mut findings)?;
        Dense::Compared { model, changed }
    } else {
        Dense::NotThere(model)
    };
    Ok(Verified {
        files: written.outputs.len(),
        inputs: written.inputs.len() - gone.len(),
        gone,
        matrices: written.matrices.len(),
        weights: written.matrices.iter().map(Matrix::weights).sum(),
        zeros,
        dense,
        findings,
    })
}

/// The recipe of a result, whatever the environment says.
pub(super) fn recipe(dir: &Path) -> Result<Loaded, Error> {
    let path = dir.join(RECIPE);
    let text = fs::read_to_string(&path);
    let text = text.map_err(|e| Error::NoResult { path: path.clone(), problem: e.to_string() })?;
    Ok(load_text(&path, &text, [], &[])?)
}

/// The digest of a file, if there is one.
pub(super) fn digest_if_there(path: &Path) -> Result<Option<String>, Error> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => Ok(Some(digest(path)?)),
    }
}

/// How many weights of a matrix are pruned.
fn pruned(matrix: &Matrix) -> usize {
    matrix.weights().saturating_sub(matrix.kept)
}

/// Checks the zeros of each matrix; returns how many there are.
fn zeros(sparse: &Reader, written: &Report, findings: &mut Vec<Finding>) -> Result<usize, Error> {
    let mut all = 0;
    for matrix in &written.matrices {
        let tensor = matrix.tensor.clone();
        let Ok(view) = sparse.tensor(&tensor) else {
            findings.push(Finding::NoTensor { tensor });
            continue;
        };
        let found = view.zeros()?;
        all += found;
        let expected = pruned(matrix);
        if found < expected {
            findings.push(Finding::Zeros { tensor: tensor.clone(), found, expected });
        }
        match matrix.pattern.parse::<Pattern>() {
            Err(_) => findings.push(Finding::NoPattern { tensor, pattern: matrix.pattern.clone() }),
            Ok(pattern) => {
                if let Some(at) = view.breach(pattern)? {
                    let index = unravel(at, view.shape);
                    findings.push(Finding::Pattern { tensor, pattern, index });
                }
            }
        }
    }
    Ok(all)
}

/// Compares each tensor with the dense one; returns how many kept weights are changed.
fn compare(
    sparse: &Reader,
    dense: &Reader,
    written: &Report,
    findings: &mut Vec<Finding>,
) -> Result<usize, Error> {
    let matrices = written.matrices.iter().map(|matrix| (matrix.tensor.as_str(), matrix));
    let matrices: BTreeMap<_, _> = matrices.collect();
    let alone = dense.names().filter(|name| sparse.tensor(name).is_err());
    findings.extend(alone.map(|name| Finding::Other { tensor: name.into() }));
    let mut changed = 0;
    for name in sparse.names() {
        let (tensor, view) = (name.to_owned(), sparse.tensor(name)?);
        let found = match dense.tensor(name) {
            Ok(other) => view.difference(&other)?,
            Err(_) => None,
        };
        let Some(found) = found else {
            findings.push(Finding::Other { tensor });
            continue;
        };
        let matrix = matrices.get(name);
        let expected = matrix.map_or(0, |matrix| pruned(matrix));
        // A changed weight may have become zero.
        if found.pruned > expected && written.changed_weights == 0 {
            let found = found.pruned;
            findings.push(Finding::Pruned { tensor: tensor.clone(), found, expected });
        }
        if let Some(first) = found.first {
            if matrix.is_some() && written.changed_weights > 0 {
                changed += found.changed;
            } else {
                let (count, index) = (found.changed, unravel(first, view.shape));
                findings.push(Finding::NotDense { tensor, count, index });
            }
        }
    }
    if changed > written.changed_weights {
        let expected = written.changed_weights;
        findings.push(Finding::Changed { found: changed, expected });
    }
    Ok(changed)
}
