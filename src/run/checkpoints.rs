//! The checkpoints that a recipe names: the dense one, and the sparse one whose masks are refined,
//! if there is one.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use super::{Error, Watch};
use crate::{
    checkpoint::Reader,
    executor::ops::Ops,
    family::{self, Decoder},
    hub::locate,
    limits::SEQUENCE,
    model::{self, Model, check_config},
    plan::Plan,
    progress::Steps,
    recipe::{self, Recipe},
    report,
};

/// The checkpoints of a recipe.
pub(crate) struct Checkpoints {
    /// The dense checkpoint, which has the values of all weights.
    pub(crate) dense: Reader,
    /// The sparse checkpoint whose zeros are the initial masks, if it is not the dense one.
    pub(crate) sparse: Option<Reader>,
    /// Number of positions of the model.
    positions: usize,
    /// The commits of `model.path` and `model.dense`; `None` for a model that is not from the hub.
    commits: [Option<String>; 2],
}

impl Checkpoints {
    /// Opens the checkpoints of a recipe, fetching those on the hub.
    ///
    /// # Errors
    /// If one cannot be fetched or read, or the two are not the same model.
    pub(crate) fn open(recipe: &Recipe, watch: &dyn Watch) -> Result<Self, Error> {
        let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
        let suits: &dyn Fn(&Path) -> _ = &|dir| Ok(check_config(dir)?);
        let recipe::Model { path, revision, dense, dense_revision } = &recipe.model;
        let found = locate(path, revision.as_deref(), &new, suits)?;
        let reader = Reader::open(&found.dir)?;
        let Some(path) = dense else {
            return Self::of(reader, None, [found.commit, None]);
        };
        let of_dense = locate(path, dense_revision.as_deref(), &new, suits)?;
        let dense = Reader::open(&of_dense.dir)?;
        reader.quantisation()?;
        alike(&dense, &reader)?;
        if report::read(reader.path()).is_ok_and(|report| !report.permuted.is_empty()) {
            let [sparse, dense] = [&reader, &dense].map(|of| of.path().to_owned());
            return Err(Error::Permuted { sparse, dense });
        }
        Self::of(dense, Some(reader), [found.commit, of_dense.commit])
    }

    fn of(
        dense: Reader,
        sparse: Option<Reader>,
        commits: [Option<String>; 2],
    ) -> Result<Self, Error> {
        let positions = decoder(&dense)?.positions().tokens;
        Ok(Self { dense, sparse, positions, commits })
    }

    /// The files of the sparse checkpoint that a run reads.
    pub(crate) fn sparse_files(&self) -> impl Iterator<Item = &Path> {
        self.sparse.iter().flat_map(Reader::weight_files)
    }

    /// The recipe with the model's default lengths of sequences filled in.
    pub(crate) fn settled(&self, recipe: &Recipe) -> Recipe {
        let length = self.positions.min(SEQUENCE);
        let mut settled = recipe.clone();
        settled.calibration.sequence_length.get_or_insert(length);
        settled.evaluate.sequence_length.get_or_insert(length);
        settled
    }

    /// The recipe as written beside the result, with absolute paths and the hub's commits.
    pub(crate) fn resolved(&self, recipe: &Recipe) -> Result<Recipe, Error> {
        let mut resolved = self.settled(recipe);
        [resolved.model.revision, resolved.model.dense_revision] = self.commits.clone();
        resolved.absolute().map_err(|e| Error::Report(e.to_string()))
    }

    /// Compares the sparse checkpoint with the dense one, and warns of differences that the result
    /// will not have; with `retain` it has the values of kept weights.
    ///
    /// # Errors
    /// If the sparse checkpoint prunes no matrix of the plan, or a tensor is damaged.
    pub(crate) fn compare<D: Ops>(
        &self,
        model: &Model<'_, D>,
        plan: &Plan,
        retain: bool,
        watch: &dyn Watch,
    ) -> Result<(), Error> {
        let Some(sparse) = &self.sparse else { return Ok(()) };
        let matrices: BTreeSet<&str> = (0..plan.layers.len())
            .flat_map(|layer| plan.matrices(&model.decoder, layer))
            .map(|(_, linear)| linear.weight.as_str())
            .collect();
        let bar = watch.bar("comparing", Steps::Bytes(sparse.weight_bytes()));
        let (mut zeros, mut changed, mut left) = (0, (0, String::new()), (0, String::new()));
        for name in sparse.names() {
            let (own, Ok(dense)) = (sparse.tensor(name)?, self.dense.tensor(name)) else {
                continue;
            };
            let found = own.zeroed(&dense)?.unwrap_or_default();
            bar.advance(own.stored as u64);
            let is_pruned = matrices.contains(name);
            if is_pruned {
                zeros += found.pruned;
            } else {
                add(&mut left, found.pruned, name);
            }
            if !(is_pruned && retain) {
                add(&mut changed, found.changed, name);
            }
        }
        drop(bar);
        let [sparse, dense] = [sparse, &self.dense].map(|of| of.path().display().to_string());
        if zeros == 0 {
            return Err(Error::NoZeros { sparse, dense });
        }
        if let (count @ 1.., first) = changed {
            tracing::warn!(
                "{count} weights that {sparse} keeps are not the dense model's, the first in \
                 `{first}`: the result has the dense model's. mask.retain = true keeps those of \
                 pruned matrices"
            );
        }
        if let (count @ 1.., first) = left {
            tracing::warn!(
                "{count} zeros of {sparse} are in tensors that the recipe does not prune, the first \
                 in `{first}`: there the result has the dense model's weights"
            );
        }
        Ok(())
    }
}

fn decoder(reader: &Reader) -> Result<Decoder, Error> {
    Ok(family::decoder(reader.config()).map_err(model::Error::from)?)
}

/// Adds to a count, which has the name of its first tensor.
fn add((count, first): &mut (usize, String), more: usize, name: &str) {
    if *count == 0 && more > 0 {
        *first = name.to_owned();
    }
    *count += more;
}

/// Checks that two checkpoints are the same model: equivalent configurations, the same tensors.
fn alike(dense: &Reader, sparse: &Reader) -> Result<(), Error> {
    let unlike = |problem: String| Error::Unlike {
        sparse: sparse.path().to_owned(),
        dense: dense.path().to_owned(),
        problem,
    };
    if decoder(dense)? != decoder(sparse)? {
        let differs = differing(dense.config(), sparse.config());
        return Err(unlike(format!("config.json differs in {}", differs.join(", "))));
    }
    let mut names = dense.names().chain(sparse.names());
    match names.find(|name| {
        let shape = |of: &Reader| of.tensor(name).map(|of| of.shape.to_vec()).ok();
        shape(dense) != shape(sparse)
    }) {
        None => Ok(()),
        Some(name) => Err(unlike(format!(
            "tensor `{name}` is missing from one of them, or has another shape"
        ))),
    }
}

/// The keys whose values differ between two JSON objects.
fn differing(one: &Value, other: &Value) -> Vec<String> {
    let keys = |of: &Value| of.as_object().into_iter().flat_map(|of| of.keys().cloned()).collect();
    let keys: [BTreeSet<String>; 2] = [keys(one), keys(other)];
    let all = keys[0].union(&keys[1]).filter(|key| one.get(key) != other.get(key));
    all.map(|key| format!("`{key}`")).collect()
}
