//! Checks that a result matches its report, and that its kept weights are the dense model's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Error, Watch, files};
use crate::{
    checkpoint::{
        Cuts, Difference, Fit, MASKS, RECIPE, Reader, StoredMasks, dense_config, digest, sizes,
        unravel,
    },
    hub::locate,
    limits,
    mask::Pattern,
    model::{self, check_config},
    permutation,
    progress::Steps,
    recipe::{Loaded, Model, load_text},
    report::{self, Matrix, Report, StructureReport},
    structure::Removal,
    version::Version,
};

/// A fault of a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Finding {
    #[error("{file} is missing")]
    Missing { file: String },
    #[error("{file} changed since the run wrote it")]
    FileChanged { file: String },
    #[error("{file} was not written by the run")]
    Added { file: String },
    #[error("{count} more files were not written by the run")]
    MoreAdded { count: usize },
    #[error("the report's {figure} is {reported}, but the files have {found}")]
    Figure { figure: &'static str, reported: u64, found: u64 },
    #[error("tensor `{tensor}` is in the report's matrices more than once")]
    Twice { tensor: String },
    #[error("tensor `{tensor}` has shape {found:?}, but the report says {reported:?}")]
    Shape { tensor: String, found: Vec<usize>, reported: [usize; 2] },
    #[error("{}, which the run read, has changed since", path.display())]
    InputChanged { path: PathBuf },
    #[error("there is no tensor `{tensor}`")]
    NoTensor { tensor: String },
    #[error("tensor `{tensor}` has {found} zeros, fewer than the {expected} expected")]
    Zeros { tensor: String, found: usize, expected: usize },
    #[error("tensor `{tensor}`: the report's {pattern:?} is not a pattern")]
    NoPattern { tensor: String, pattern: String },
    #[error("tensor `{tensor}`: the tile at {index:?} keeps more than {pattern} allows")]
    Pattern { tensor: String, pattern: Pattern, index: Vec<usize> },
    #[error("tensor `{tensor}` has {found} weights, but the report says that {reported} are left")]
    Left { tensor: String, found: usize, reported: usize },
    #[error("the report's structures are not those of the dense model: {problem}")]
    Structures { problem: String },
    #[error("the report's permutations are not of the dense model: {problem}")]
    Permutation { problem: String },
    #[error("config.json does not have the sizes of the smaller model")]
    Config,
    #[error("tensor `{tensor}` is missing from one of the two models, or has another shape")]
    Other { tensor: String },
    #[error(
        "tensor `{tensor}`: {count} kept weights are not the dense model's; the first at {index:?}"
    )]
    NotDense { tensor: String, count: usize, index: Vec<usize> },
    #[error("tensor `{tensor}`: {found} weights are pruned, at most {expected} are expected")]
    Pruned { tensor: String, found: usize, expected: usize },
    #[error("{MASKS} has no mask of tensor `{tensor}` in its shape")]
    NoMask { tensor: String },
    #[error("{MASKS} has a mask of `{tensor}`, which the run did not prune")]
    OtherMask { tensor: String },
    #[error("{MASKS} keeps {found} weights of tensor `{tensor}`, but the report says {expected}")]
    MaskKept { tensor: String, found: usize, expected: usize },
    #[error("{MASKS} prunes {count} weights of tensor `{tensor}` that are not zero")]
    MaskNotZero { tensor: String, count: usize },
    #[error("{found} kept {what} are not the dense model's, but the report says {expected}")]
    Changed { what: &'static str, found: usize, expected: usize },
}

/// The outcome of the comparison with the dense model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dense {
    /// The result was compared.
    Compared {
        /// Path of the dense model.
        model: PathBuf,
        /// Quantisation of the dense model, whose weights were dequantised, if it has one.
        quantisation: Option<String>,
        /// Number of kept weights that the recipe's stages changed.
        changed: usize,
    },
    /// The model of this path cannot have lost the report's structures, or lacks the channels that the
    /// run permuted.
    Unlike(PathBuf),
    /// The dense model of this path does not exist.
    NotThere(PathBuf),
}

/// The result of [`verify`].
#[derive(Clone, Debug)]
pub struct Verified {
    /// Number of files that were compared with their digests.
    pub files: usize,
    /// Whether the page was compared with the page that the report gives. Another version of the
    /// program may make another page.
    pub page: bool,
    /// Number of the run's inputs that were compared with their digests.
    pub inputs: usize,
    /// Inputs that no longer exist.
    pub gone: Vec<PathBuf>,
    /// Number of pruned matrices.
    pub matrices: usize,
    /// Number of weights of the pruned matrices.
    pub weights: usize,
    /// Number of zeros in the pruned matrices; 0 if they lost structures.
    pub zeros: usize,
    /// Number of matrices whose stored masks were compared with their zeros; `None` without masks.
    pub masks: Option<usize>,
    /// The structures that the model lost, in words, if it is smaller than the dense one.
    pub structures: Option<String>,
    /// Number of output projections whose inner channels are in another order than the dense model's.
    pub permuted: usize,
    /// The outcome of the comparison with the dense model.
    pub dense: Dense,
    /// All faults.
    pub findings: Vec<Finding>,
}

/// Checks the result of a run in `dir` against its report: its files, and that there are no others,
/// its page, the report's counts and sizes, the run's inputs, and the zeros and the mask of each matrix.
/// Compares all weights bit for bit with the dense model, `dense` or else the directory that the
/// recipe names.
///
/// # Errors
/// If the directory is not the result of a run, or something cannot be read. Faults of the result
/// are not errors but [`Finding`]s.
pub fn verify(dir: &Path, dense: Option<&Path>, watch: &dyn Watch) -> Result<Verified, Error> {
    let written = report::read(dir).map_err(Error::NoReport)?;
    let mut findings = Vec::new();
    let intact = outputs(dir, &written, &mut findings)?;
    let page = page(dir, &written, &mut findings)?;
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
    let zeros = match written.structures.is_empty() {
        true => zeros(&sparse, &written, &mut findings)?,
        false => 0,
    };
    let masks = masks(&sparse, &written, &mut findings)?;
    counts(&written, &mut findings);
    if intact {
        sizes_on_disk(&sparse, &written, &mut findings)?;
    }
    let models = models(dir)?;
    let (reference, revision) = models.reference();
    let model = match dense {
        Some(dense) => {
            let revision = revision.filter(|_| *dense == *reference && !dense.is_dir());
            let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
            locate(dense, revision, &new, &|dir| Ok(check_config(dir)?))?.dir
        }
        None => reference.to_owned(),
    };
    let dense = if dense.is_some() || model.is_dir() {
        let given = dense.is_some();
        let dense = Reader::open(&model)?;
        if !given {
            let (reported, found) = (written.sizes.dense.weight_bytes, dense.weight_bytes());
            compared(&[("sizes.dense.weight_bytes", reported, found)], &mut findings);
        }
        let quantisation = dense.quantisation()?.map(ToString::to_string);
        let decoder = model::decoder(&dense).map_err(model::Error::from)?;
        let compared = match permutation::orders(&decoder, &written.permuted) {
            Ok(orders) => {
                compare(&sparse, &dense.reordered(orders), &written, zeros, &mut findings)?
            }
            Err(error) => {
                findings.push(Finding::Permutation { problem: error.to_string() });
                None
            }
        };
        match compared {
            Some(changed) => Dense::Compared { model, quantisation, changed },
            None => Dense::Unlike(model),
        }
    } else {
        Dense::NotThere(model)
    };
    Ok(Verified {
        files: written.outputs.len(),
        page,
        inputs: written.inputs.len() - gone.len(),
        gone,
        matrices: written.matrices.len(),
        weights: written.matrices.iter().map(Matrix::weights).sum(),
        zeros,
        masks,
        structures: StructureReport::in_words(&written.structures),
        permuted: written.permuted.iter().map(|part| part.orders.len()).sum(),
        dense,
        findings,
    })
}

/// Maximum number of added files that are named.
const NAMED: usize = 20;

/// Compares the files of a result with their digests, and looks for others; returns whether all
/// exist and are unchanged.
fn outputs(dir: &Path, written: &Report, findings: &mut Vec<Finding>) -> Result<bool, Error> {
    for (file, expected) in &written.outputs {
        match digest_if_there(&dir.join(file))? {
            None => findings.push(Finding::Missing { file: file.clone() }),
            Some(found) if found != *expected => {
                findings.push(Finding::FileChanged { file: file.clone() });
            }
            Some(_) => {}
        }
    }
    let intact = findings.is_empty();
    let known = |name: &str| {
        written.outputs.contains_key(name) || [report::JSON, report::HTML].contains(&name)
    };
    let names = files(dir)?
        .into_iter()
        .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    let mut added: Vec<String> = names.filter(|name| !known(name)).collect();
    added.sort();
    let count = added.len().saturating_sub(NAMED);
    findings.extend(added.into_iter().take(NAMED).map(|file| Finding::Added { file }));
    if count > 0 {
        findings.push(Finding::MoreAdded { count });
    }
    Ok(intact)
}

/// Makes the page again, if this version made it, and compares; returns whether it compared.
fn page(dir: &Path, written: &Report, findings: &mut Vec<Finding>) -> Result<bool, Error> {
    let file = report::HTML.to_owned();
    let path = dir.join(&file);
    if !path.exists() {
        findings.push(Finding::Missing { file });
        return Ok(false);
    }
    let now = Version::current();
    if (&written.version.barber, &written.version.commit) != (&now.barber, &now.commit) {
        return Ok(false);
    }
    let page = report::page(written).map_err(|e| Error::Report(e.to_string()))?;
    let found = limits::read(&path, limits::PAGE)
        .map_err(|source| Error::File { path: path.clone(), source })?;
    if found != page.as_bytes() {
        findings.push(Finding::FileChanged { file });
    }
    Ok(true)
}

/// Compares the report's totals with the counts of its matrices.
fn counts(written: &Report, findings: &mut Vec<Finding>) {
    let sum = |of: fn(&Matrix) -> usize| {
        let counts = written.matrices.iter().map(of);
        counts.fold(0, |sum: usize, count| sum.saturating_add(count)) as u64
    };
    compared(
        &[
            ("prunable_weights", written.prunable_weights as u64, sum(Matrix::weights)),
            ("pruned_weights", written.pruned_weights as u64, sum(pruned)),
        ],
        findings,
    );
}

/// Compares the report's sizes with those of the files, which are unchanged.
fn sizes_on_disk(
    sparse: &Reader,
    written: &Report,
    findings: &mut Vec<Finding>,
) -> Result<(), Error> {
    let reported = written.sizes;
    let files = written.outputs.keys().map(|file| sparse.path().join(file));
    let (pruned, compressed) = (written.matrices.len(), sparse.compressed_matrices());
    // A model that lost structures has fewer weights than the dense one.
    let dense = match written.structures.is_empty() {
        true => sparse.weights(),
        false => written.model_weights,
    };
    compared(
        &[
            ("model_weights", written.model_weights as u64, dense as u64),
            ("output_weights", written.output_weights as u64, sparse.weights() as u64),
            ("sizes.output.weight_bytes", reported.output.weight_bytes, sparse.weight_bytes()),
            ("sizes.output.directory_bytes", reported.output.directory_bytes, sizes(files)?),
            ("sizes.pruned_matrices", reported.pruned_matrices as u64, pruned as u64),
            ("sizes.compressed_matrices", reported.compressed_matrices as u64, compressed as u64),
        ],
        findings,
    );
    Ok(())
}

/// Compares figures of a report with those of the files.
fn compared(figures: &[(&'static str, u64, u64)], findings: &mut Vec<Finding>) {
    let wrong = figures.iter().filter(|(_, reported, found)| reported != found);
    findings.extend(wrong.map(|&(figure, reported, found)| Finding::Figure {
        figure,
        reported,
        found,
    }));
}

/// The models that the recipe of a result names. The recipe's metrics need not be linked.
fn models(dir: &Path) -> Result<Model, Error> {
    #[derive(Deserialize)]
    struct Models {
        model: Model,
    }
    let (path, text) = recipe_text(dir)?;
    match toml::from_str(&text) {
        Ok(Models { model }) => Ok(model),
        Err(e) => Err(Error::NoResult { path, problem: e.message().to_owned() }),
    }
}

/// The text of the recipe of a result.
fn recipe_text(dir: &Path) -> Result<(PathBuf, String), Error> {
    let path = dir.join(RECIPE);
    let text = limits::read(&path, limits::RESULT).map_err(|e| e.to_string());
    let text = text.and_then(|text| String::from_utf8(text).map_err(|e| e.to_string()));
    match text {
        Ok(text) => Ok((path, text)),
        Err(problem) => Err(Error::NoResult { path, problem }),
    }
}

/// The recipe of a result, without environment variables.
pub(crate) fn recipe(dir: &Path) -> Result<Loaded, Error> {
    let (path, text) = recipe_text(dir)?;
    Ok(load_text(&path, &text, [], &[])?)
}

/// The digest of a file; `None` if it does not exist.
pub(super) fn digest_if_there(path: &Path) -> Result<Option<String>, Error> {
    match fs::metadata(path).map_err(|e| e.kind()) {
        Err(io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        _ => Ok(Some(digest(path)?)),
    }
}

/// Number of pruned weights of a matrix.
fn pruned(matrix: &Matrix) -> usize {
    matrix.weights().saturating_sub(matrix.kept)
}

/// What the dense model leaves when it loses the structures of a report, and the biases that may differ
/// from its own; `None` and a finding if the structures are not its own.
fn cuts(
    (sparse, dense): (&Reader, &Reader),
    written: &Report,
    findings: &mut Vec<Finding>,
) -> Result<Option<(Cuts, BTreeSet<String>)>, Error> {
    let decoder = model::decoder(dense).map_err(model::Error::from)?;
    let structures = written.structures.iter();
    let gone: Vec<_> =
        structures.map(|of| (of.structure, &of.removed[..], of.compensated)).collect();
    let (removal, masks) = match Removal::reported(&gone, &decoder, dense.config()) {
        Ok(Some(found)) => found,
        Ok(None) => return Ok(Some(Default::default())),
        Err(error) => {
            findings.push(Finding::Structures { problem: error.to_string() });
            return Ok(None);
        }
    };
    if StructureReport::all(&removal, &decoder, &masks) != written.structures {
        let problem = "its numbers are not those of the removed indices".to_owned();
        findings.push(Finding::Structures { problem });
    }
    let cuts = removal.cuts(&decoder, &masks);
    let (mut found, expected) = (sparse.config().clone(), dense_config(dense, &cuts.config, None));
    // The format of weights may be another one.
    for key in ["torch_dtype", "dtype"] {
        if let (Some(own), Some(dense)) = (found.get_mut(key), expected.get(key)) {
            *own = dense.clone();
        }
    }
    if found != expected {
        findings.push(Finding::Config);
    }
    Ok(Some((cuts, removal.biases(&decoder))))
}

/// Checks the zeros of each matrix; returns their number.
fn zeros(sparse: &Reader, written: &Report, findings: &mut Vec<Finding>) -> Result<usize, Error> {
    let (mut all, mut seen) = (0, BTreeSet::new());
    for matrix in &written.matrices {
        let tensor = matrix.tensor.clone();
        if !seen.insert(&matrix.tensor) {
            findings.push(Finding::Twice { tensor });
            continue;
        }
        let Ok(view) = sparse.tensor(&tensor) else {
            findings.push(Finding::NoTensor { tensor });
            continue;
        };
        if view.shape != matrix.shape {
            let (found, reported) = (view.shape.to_vec(), matrix.shape);
            findings.push(Finding::Shape { tensor: tensor.clone(), found, reported });
        }
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

/// Checks the number of weights that are left of a matrix that lost structures.
fn left(matrix: &Matrix, found: usize, findings: &mut Vec<Finding>) {
    if found != matrix.kept {
        let (tensor, reported) = (matrix.tensor.clone(), matrix.kept);
        findings.push(Finding::Left { tensor, found, reported });
    }
}

/// Compares the stored masks with the zeros of the matrices, if the run wrote masks; returns the number
/// of matrices.
fn masks(
    sparse: &Reader,
    written: &Report,
    findings: &mut Vec<Finding>,
) -> Result<Option<usize>, Error> {
    if !written.outputs.contains_key(MASKS) {
        return Ok(None);
    }
    let Some(stored) = StoredMasks::open(sparse.path())? else { return Ok(None) };
    let kept = written.matrices.iter().map(|of| (of.tensor.as_str(), of.kept));
    let kept: BTreeMap<_, _> = kept.collect();
    let is_pruned = |name: &str| kept.contains_key(name);
    let found = stored.compare(sparse, is_pruned)?;
    let count = found.len();
    for (name, fit) in found {
        let tensor = name.to_owned();
        let Some(Fit { kept: found, not_zero: count }) = fit else {
            findings.push(Finding::NoMask { tensor });
            continue;
        };
        let all = sparse.tensor(name)?.shape.iter().product();
        let expected = kept.get(name).copied().unwrap_or(all);
        if found != expected {
            findings.push(Finding::MaskKept { tensor: tensor.clone(), found, expected });
        }
        if count > 0 {
            findings.push(Finding::MaskNotZero { tensor, count });
        }
    }
    let others = stored.others(sparse, is_pruned).into_iter();
    findings.extend(others.map(|tensor| Finding::OtherMask { tensor }));
    Ok(Some(count))
}

/// Compares each tensor with the dense one, or with what the removed structures leave of it; returns the
/// number of changed kept weights. `zeros` is the number of zeros in the pruned matrices. `None` if the
/// dense model cannot have lost the structures.
fn compare(
    sparse: &Reader,
    dense: &Reader,
    written: &Report,
    zeros: usize,
    findings: &mut Vec<Finding>,
) -> Result<Option<usize>, Error> {
    let matrices = written.matrices.iter().map(|matrix| (matrix.tensor.as_str(), matrix));
    let matrices: BTreeMap<_, _> = matrices.collect();
    let is_smaller = !written.structures.is_empty();
    let Some((cuts, biases)) = cuts((sparse, dense), written, findings)? else { return Ok(None) };
    let added = cuts.added.keys().map(String::as_str);
    let is_missing = |name: &&str| cuts.name(name).is_some_and(|of| sparse.tensor(&of).is_err());
    let alone = dense.names().chain(added).filter(is_missing);
    findings.extend(alone.map(|name| Finding::Other { tensor: name.into() }));
    if is_smaller {
        let gone = written.matrices.iter().filter(|of| cuts.name(&of.tensor).is_none());
        gone.for_each(|matrix| left(matrix, 0, findings));
    }
    let [mut changed, mut changed_biases, mut zeros_left] = [0; 3];
    for name in sparse.names() {
        let (tensor, view) = (name.to_owned(), sparse.tensor(name)?);
        let dense_name = cuts.dense_name(name).unwrap_or_default();
        let found = match (cuts.added.get(&*dense_name), dense.tensor(&dense_name)) {
            (Some(shape), _) if view.shape == shape => {
                let changed = shape.iter().product::<usize>() - view.zeros()?;
                let first = (changed > 0).then_some(0);
                Some(Difference { changed, first, ..Difference::default() })
            }
            (None, Ok(other)) => view.difference(&other, cuts.tensors.get(&*dense_name))?,
            _ => None,
        };
        let Some(found) = found else {
            findings.push(Finding::Other { tensor });
            continue;
        };
        if written.changed_biases > 0 && biases.contains(&*dense_name) {
            changed_biases += found.changed + found.pruned;
            continue;
        }
        let matrix = matrices.get(&*dense_name);
        if let Some(matrix) = matrix.filter(|_| is_smaller) {
            left(matrix, view.shape.iter().product(), findings);
            zeros_left += view.zeros()?;
        }
        // Of structures nothing is left, not even zeros.
        let matrix_with_zeros = matrix.filter(|_| !is_smaller);
        let expected = matrix_with_zeros.map_or(0, |matrix| pruned(matrix));
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
    // Some of the changed weights may be zero.
    let kept = match is_smaller {
        false => zeros.saturating_sub(written.pruned_weights),
        true => zeros_left,
    };
    if !(changed..=changed.saturating_add(kept)).contains(&written.changed_weights) {
        let (what, expected) = ("weights", written.changed_weights);
        findings.push(Finding::Changed { what, found: changed, expected });
    }
    if changed_biases != written.changed_biases {
        let (what, expected) = ("values of biases", written.changed_biases);
        findings.push(Finding::Changed { what, found: changed_biases, expected });
    }
    Ok(Some(changed))
}
