//! A resolved recipe: its values, their sources, and the files that it reads.

use std::{io::ErrorKind, path::Path};

use figment::value::Value;

use super::{
    Point, Recipe, RecipeError,
    error::{Fault, Problem, segments},
    layers::{Layer, Merged, below},
};
use crate::files;

/// A resolved recipe, with the source of each value.
#[derive(Debug)]
pub struct Loaded {
    /// The resolved values. Relative paths of the file are joined to the file's directory.
    pub recipe: Recipe,
    /// The run's point of the sweep.
    pub point: Point,
    pub(super) source: Source,
}

/// The layers that a recipe was resolved from.
#[derive(Debug)]
pub(super) struct Source {
    /// Name of the recipe, as the user sees it.
    pub(super) name: String,
    pub(super) merged: Merged,
    pub(super) values: Value,
}

impl Loaded {
    /// The source of a key's value: `my.toml line 12`, `environment variable BARBER_…`, `--set …`
    /// or `default`.
    pub fn origin(&self, key: &str) -> String {
        let key = segments(key);
        self.source.layer_of(&key).map_or_else(|| "default".into(), |layer| layer.origin(&key))
    }

    /// The files that a run reads, except the model's: texts, tasks, the recipe and those that it
    /// extends.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &Path> {
        self.recipe.texts().chain(self.source.merged.files())
    }

    /// Opens all texts and tasks before anything is run. A run reads them more than once, so each
    /// must be a regular file.
    ///
    /// # Errors
    /// All files that are missing or cannot be read, each with its line.
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
                let help = "a path in a recipe is relative to the recipe's directory";
                Some(Problem::at(&key, Fault::Value(why)).help(help))
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(self.source.error(problems)) }
    }
}

impl Source {
    pub(super) fn value(&self, path: &[String]) -> Option<&Value> {
        below(&self.values, path)
    }

    /// The layer of the value at `path`.
    pub(super) fn layer_of(&self, path: &[String]) -> Option<&Layer> {
        self.merged.layer_of(self.value(path)?)
    }

    /// An error of these problems, each with its place.
    pub(super) fn error(&self, problems: Vec<Problem>) -> RecipeError {
        RecipeError::new(&self.name, self.located(problems))
    }

    pub(super) fn located(&self, mut problems: Vec<Problem>) -> Vec<Problem> {
        for problem in &mut problems {
            self.locate(problem);
        }
        problems
    }

    fn locate(&self, problem: &mut Problem) {
        if problem.origin.is_none() {
            // For a missing key, the table that lacks it is shown.
            let mut path = problem.path.clone();
            while self.value(&path).is_none() && path.len() > 1 {
                path.pop();
            }
            if let Some(layer) = self.layer_of(&path) {
                layer.blame(problem, &path);
            }
        }
        let against = problem.against.as_ref();
        if let Some(layer) = against.and_then(|against| self.layer_of(&against.path)) {
            layer.blame_too(problem);
        }
    }
}
