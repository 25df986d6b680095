//! The files that a run reads beside the model's, and whether they can be read.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::{
    Loaded, Recipe, RecipeError,
    error::{Fault, Problem},
};
use crate::files;

impl Recipe {
    /// The texts and the tasks that a run reads.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &Path> {
        let calibration = self.calibration.source.iter().filter(|_| self.calibrates());
        let perplexity = self.evaluate.perplexity.iter().map(|text| &text.path);
        let files = calibration.chain(perplexity).chain(self.evaluate.tasks.values());
        files.map(PathBuf::as_path)
    }
}

impl Loaded {
    /// The files that a run reads, but for the model's: texts, tasks, the recipe and those that it is
    /// built on.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &Path> {
        self.recipe.texts().chain(self.source.merged.files())
    }

    /// Opens the texts and the tasks that the recipe reads, before anything is run. A run reads them
    /// more than once, so each is a regular file.
    ///
    /// # Errors
    /// If some of them are missing or cannot be read: all of those, each with its line.
    pub fn find_texts(&self) -> Result<(), RecipeError> {
        let recipe = &self.recipe;
        let calibration = recipe.calibration.source.iter().filter(|_| recipe.calibrates());
        let calibration = calibration.map(|path| ("calibration.source".to_owned(), path));
        let texts = recipe.evaluate.perplexity.iter().enumerate();
        let texts = texts.map(|(i, text)| (format!("evaluate.perplexity.{i}"), &text.path));
        let tasks = recipe.evaluate.tasks.iter();
        let tasks = tasks.map(|(name, path)| (format!("evaluate.tasks.{name}"), path));
        let problems: Vec<Problem> = calibration
            .chain(texts)
            .chain(tasks)
            .filter_map(|(key, path)| {
                let error = files::open(path).err()?;
                let why = match error.kind() {
                    ErrorKind::NotFound => format!("there is no file {}", path.display()),
                    _ => format!("{}: {error}", path.display()),
                };
                let help = "a path in a recipe's file begins at that file's own directory";
                Some(Problem::at(&key, Fault::Value(why)).help(help))
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(self.source.error(problems)) }
    }
}
