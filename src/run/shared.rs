//! Data that runs of a sweep or a study share: computed once, and kept for later runs that need the
//! same.

use std::{collections::VecDeque, path::Path, rc::Rc};

use super::{Error, Notes, Progress, Tests, single_pass};
use crate::{
    checkpoint::Pruned,
    executor::ops::Ops,
    recipe::{Executor, Output, Recipe, Streams},
};

/// The shared data, each with the part of the recipe that determines it. Masks are kept only as
/// long as a later run needs them.
#[derive(Default)]
pub(crate) struct Shared {
    /// The recipes of later runs.
    remaining: VecDeque<Recipe>,
    tests: Kept<Rc<Tests>>,
    samples: Kept<Rc<Vec<Vec<u32>>>>,
    /// The measurements of the dense model.
    dense: Kept<Notes>,
    /// The notes before the refinement, and the initial masks, unless these are made layer by layer
    /// with it.
    begun: Kept<(Notes, Pruned)>,
}

type Kept<T> = Option<(Recipe, T)>;

impl Shared {
    /// Shared data for runs of these recipes, in order.
    pub(crate) fn among<'a>(recipes: impl Iterator<Item = &'a Recipe>) -> Self {
        Self { remaining: recipes.cloned().collect(), ..Self::default() }
    }

    /// Moves on to the next run.
    pub(crate) fn go_on(&mut self) {
        self.remaining.pop_front();
    }

    /// The texts, tasks and prompts of a run.
    pub(crate) fn tests(
        &mut self,
        recipe: &Recipe,
        make: impl FnOnce() -> Result<Tests, Error>,
    ) -> Result<Rc<Tests>, Error> {
        kept(&mut self.tests, of_evaluation(recipe), make)
    }

    /// The calibration samples.
    pub(crate) fn samples(
        &mut self,
        recipe: &Recipe,
        make: impl FnOnce() -> Result<Vec<Vec<u32>>, Error>,
    ) -> Result<Rc<Vec<Vec<u32>>>, Error> {
        kept(&mut self.samples, of_samples(recipe), make)
    }

    /// Gives a run that begins the results that are known. Changed weights are stored in `scratch`.
    pub(super) fn begin<D: Ops>(
        &self,
        recipe: &Recipe,
        progress: &mut Progress<D>,
        scratch: &Path,
    ) -> Result<(), Error> {
        if !progress.is_new() {
            return Ok(());
        }
        let of = of_beginning(recipe);
        if let Some((_, (notes, pruned))) = self.begun.as_ref().filter(|(known, _)| *known == of) {
            progress.take(notes.clone(), pruned.copy(scratch)?);
            return Ok(());
        }
        let of = of_evaluation(recipe);
        if let Some((_, notes)) = self.dense.as_ref().filter(|(known, _)| *known == of) {
            progress.notes = notes.clone();
        }
        Ok(())
    }

    /// Keeps the measurements of the dense model.
    pub(super) fn keep_dense(&mut self, recipe: &Recipe, notes: &Notes) {
        self.dense = Some((of_evaluation(recipe), notes.clone()));
    }

    /// Keeps a run's initial masks and notes, if later runs need them.
    pub(super) fn keep<D: Ops>(
        &mut self,
        recipe: &Recipe,
        progress: &Progress<D>,
        scratch: &Path,
    ) -> Result<(), Error> {
        let of = of_beginning(recipe);
        let known = self.begun.as_ref().is_some_and(|(known, _)| *known == of);
        if progress.is_begun() && !known {
            self.begun = None;
            if self.remaining.iter().any(|recipe| of_beginning(recipe) == of) {
                let pruned = progress.pass.pruned.copy(scratch)?;
                self.begun = Some((of, (progress.notes.clone(), pruned)));
            }
        }
        Ok(())
    }
}

/// The kept value if it is for the same settings; otherwise the value that `make` computes.
fn kept<T>(
    slot: &mut Kept<Rc<T>>,
    of: Recipe,
    make: impl FnOnce() -> Result<T, Error>,
) -> Result<Rc<T>, Error> {
    if let Some((_, value)) = slot.as_ref().filter(|(known, _)| *known == of) {
        return Ok(value.clone());
    }
    *slot = None;
    let value = Rc::new(make()?);
    *slot = Some((of, value.clone()));
    Ok(value)
}

/// The settings that determine the measurements of the dense model.
fn of_evaluation(recipe: &Recipe) -> Recipe {
    let Recipe { model, evaluate, executor, .. } = recipe.clone();
    Recipe { model, evaluate, executor: anywhere(executor), ..Recipe::default() }
}

/// The settings that determine the calibration samples.
fn of_samples(recipe: &Recipe) -> Recipe {
    let Recipe { model, calibration, .. } = recipe.clone();
    let mut of = Recipe { model, ..Recipe::default() };
    // A recipe that needs no samples has none.
    if recipe.calibrates() {
        of.calibration = calibration;
    }
    of
}

/// The settings that determine all results before the refinement.
pub(crate) fn of_beginning(recipe: &Recipe) -> Recipe {
    let mut of = recipe.clone();
    of.preset = None;
    of.refine.clear();
    of.metric.clear();
    of.mask.passes = if single_pass(recipe) { 1 } else { 2 };
    of.streams = Streams { statistics: recipe.streams.statistics, ..Streams::default() };
    of.executor = anywhere(of.executor);
    of.output = Output { dtype: recipe.output.dtype, ..Output::default() };
    // Without the refinement, only the initial masks need samples.
    if !of.calibrates() {
        of.calibration = Recipe::default().calibration;
    }
    of
}

/// The executor's settings without the memory limit.
fn anywhere(executor: Executor) -> Executor {
    Executor { memory: None, ..executor }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::load_text;

    fn recipe(text: &str) -> Recipe {
        let fine = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";
        // The first line is the file's; the others are assignments over it.
        let mut lines = text.lines();
        let file = lines.next().unwrap_or_default();
        let sets: Vec<String> = lines.filter(|line| !line.is_empty()).map(str::to_owned).collect();
        load_text(Path::new("r.toml"), &format!("{fine}{file}\n"), [], &sets).unwrap().recipe
    }

    #[test]
    fn runs_share_what_their_differences_do_not_touch() {
        let rebuild = "refine = [{ use = 'rebuild' }]\n";
        let (one, of) = (recipe(rebuild), |text: &str| recipe(&format!("{rebuild}{text}\n")));
        for (text, samples, beginning) in [
            ("", true, true),
            ("output.path = 'p'", true, true),
            ("executor.memory = '1 GiB'", true, true),
            ("metric = [{ use = 'gradient' }]", true, true),
            ("streams.blend = 0.3", true, true),
            ("sparsity.ratio = 0.6", true, false),
            ("mask.init = 'magnitude'", true, false),
            ("mask.passes = 1", true, false),
            ("output.dtype = 'f16'", true, false),
            ("streams.statistics = 'dense'", true, false),
            ("blocks = [{ name = 'a', layers = ['q_proj'] }]", true, false),
            ("override = [{ tensors = '*.q_proj', ratio = 0.1 }]", true, false),
            ("calibration.seed = 1", false, false),
            ("model.revision = 'main'", false, false),
        ] {
            let other = of(text);
            assert_eq!(of_samples(&one) == of_samples(&other), samples, "{text}");
            assert_eq!(of_beginning(&one) == of_beginning(&other), beginning, "{text}");
        }
        assert!(of_beginning(&one) == of_beginning(&recipe("refine = [{ use = 'swap' }]")));
        // Magnitudes are the same on any text.
        let [a, b] =
            [0, 1].map(|seed| of(&format!("mask.init = 'magnitude'\ncalibration.seed = {seed}")));
        assert!(of_beginning(&a) == of_beginning(&b) && of_samples(&a) != of_samples(&b));
        assert!(of_evaluation(&a) == of_evaluation(&of("sparsity.pattern = '2:4'")));
        assert!(of_evaluation(&a) != of_evaluation(&of("evaluate.segments = 3")));
    }
}
