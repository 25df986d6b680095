//! Whether the texts that a recipe names are there.

use super::{
    Loaded, RecipeError,
    error::{Fault, Problem},
};

impl Loaded {
    /// Looks for the texts and the tasks that the recipe reads, before anything is run.
    ///
    /// # Errors
    /// If some of them are not there: all of those, each with its line.
    pub fn find_texts(&self) -> Result<(), RecipeError> {
        let recipe = &self.recipe;
        let calibration = recipe.calibration.source.iter().filter(|_| recipe.calibrates());
        let calibration = calibration.map(|path| ("calibration.source".to_owned(), path));
        let texts = recipe.evaluate.perplexity.iter().enumerate();
        let texts = texts.map(|(i, text)| (format!("evaluate.perplexity.{i}"), &text.path));
        let tasks = recipe.evaluate.tasks.iter();
        let tasks = tasks.map(|(name, path)| (format!("evaluate.tasks.{name}"), path));
        let missing = calibration.chain(texts).chain(tasks).filter(|(_, path)| !path.exists());
        let problems: Vec<Problem> = missing
            .map(|(key, path)| {
                let why = format!("there is no file {}", path.display());
                let help = "a path in a recipe's file begins at that file's own directory";
                Problem::at(&key, Fault::Value(why)).help(help)
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(self.source.error(problems)) }
    }
}
