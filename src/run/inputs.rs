//! The files that a run reads, and their digests.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use super::{Checkpoints, Error};
use crate::{checkpoint::digest, recipe::Recipe, report};

/// Absolute paths of all files that a run reads.
pub(super) fn inputs(recipe: &Recipe, checkpoints: &Checkpoints) -> Result<Vec<PathBuf>, Error> {
    let Checkpoints { dense: reader, sparse, .. } = checkpoints;
    let files = [reader].into_iter().chain(sparse).flat_map(|reader| {
        let weights = reader.weight_files().map(Path::to_owned);
        weights.chain([reader.path().join("config.json")])
    });
    let others = ["tokenizer.json", report::CARD].map(|name| reader.path().join(name));
    let files = files.chain(others.into_iter().filter(|file| file.is_file()));
    let files = files.chain(recipe.texts().map(Path::to_owned));
    files
        .map(|file| std::path::absolute(&file).map_err(|source| Error::File { path: file, source }))
        .collect()
}

/// Digests of files, each of which is read once.
#[derive(Default)]
pub(crate) struct Digests(BTreeMap<PathBuf, String>);

impl Digests {
    /// SHA-256 of each of some files.
    pub(crate) fn of(&mut self, files: &[PathBuf]) -> Result<BTreeMap<PathBuf, String>, Error> {
        let new = files.par_iter().filter(|file| !self.0.contains_key(*file));
        let new = new.map(|file| Ok((file.clone(), digest(file)?)));
        let new: Vec<(PathBuf, String)> = new.collect::<Result<_, Error>>()?;
        self.0.extend(new);
        Ok(files.iter().map(|file| (file.clone(), self.0[file].clone())).collect())
    }
}
