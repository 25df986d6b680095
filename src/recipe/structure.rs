//! Recipes that remove structures as a whole: what such a recipe cannot ask for, and what its model
//! must have.

use serde_json::Value;

use super::{
    Allocate, Loaded, Recipe, RecipeError, Rules,
    error::{Fault, Problem},
};
use crate::{
    family::Decoder,
    structure::{Error, Removal},
};

/// The key of the structure.
const KEY: &str = "sparsity.structure";

/// Checks what a recipe with a structure cannot have.
pub(super) fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let structure = recipe.sparsity.structure;
    if !structure.is_whole() {
        return;
    }
    let many = structure.many();
    let mut wrong = |key: &str, why: String, help: &str| {
        let problem = Problem::at(key, Fault::Value(why)).help(help);
        problems.push(problem.against(KEY));
    };
    let weights = "leave it out, or set sparsity.structure to \"weights\"";
    if recipe.sparsity.pattern.ratio().is_some() {
        let why = format!("{many} are removed as a whole, and leave no zeros for a pattern");
        wrong("sparsity.pattern", why, weights);
    }
    let alike = format!("all layers lose as many {many}, as config.json has one number for them");
    if recipe.sparsity.allocation != Allocate::Uniform {
        wrong("sparsity.allocation", alike.clone(), weights);
    }
    for i in 0..recipe.overrides.len() {
        wrong(&format!("override.{i}"), alike.clone(), weights);
    }
    if !recipe.blocks.is_empty() {
        let why = format!("the matrices that have the {many} are one group");
        wrong("blocks", why, weights);
    }
    for (i, stage) in recipe.refine.iter().enumerate().filter(|(_, stage)| !stage.keeps_masks()) {
        let why = format!("`{}` works on single weights, not on {many}", stage.name());
        let help =
            "set `refine = []`, or use `reconstruct`, which changes the weights that are left";
        wrong(&format!("refine.{i}.use"), why, help);
    }
    let (init, format) = (recipe.mask.init, recipe.output.format);
    if !init.is_scored() {
        let why = format!("`{init}` has no scores, by which {many} are removed");
        wrong("mask.init", why, "`magnitude`, `wanda`, or `metric` with any metrics");
    }
    if recipe.mask.scope.is_some() {
        let why = format!("the {many} of a layer compete with one another");
        wrong("mask.scope", why, "leave it out");
    }
    if !format.is_dense() {
        let why = format!("`{format}` stores zeros, and without some {many} there are none");
        wrong("output.format", why, "leave it out: the result is smaller as it is");
    }
}

impl Loaded {
    /// The structures that the recipe removes from a model; `None` if it prunes single weights.
    ///
    /// # Errors
    /// If the model lacks the structure, the ratio removes none or all, or `sparsity.exclude` names a
    /// matrix that has some of it.
    pub fn removal(
        &self,
        rules: &Rules,
        decoder: &Decoder,
        config: &Value,
    ) -> Result<Option<Removal>, RecipeError> {
        let (structure, ratio) = (self.recipe.sparsity.structure, self.recipe.sparsity.ratio);
        let wrong = |key: &str, why: String, help: &str| {
            self.source.error(vec![Problem::at(key, Fault::Value(why)).help(help)])
        };
        let removal = Removal::new(structure, decoder, config, ratio).map_err(|error| {
            let (key, help) = match error {
                Error::Ratio { .. } => {
                    ("sparsity.ratio", "choose a ratio that leaves some and removes some")
                }
                _ => (KEY, "choose another structure, or \"weights\""),
            };
            wrong(key, error.to_string(), help)
        })?;
        let mut matrices = removal.iter().flat_map(|of| of.matrices(decoder));
        let excluded = matrices.find(|of| rules.of(&of.weight).is_none());
        drop(matrices);
        if let Some(of) = excluded {
            let why = format!(
                "leaves out `{}`, but {} are removed from all layers and matrices alike",
                of.weight,
                structure.many()
            );
            return Err(wrong("sparsity.exclude", why, "leave it out"));
        }
        Ok(removal)
    }
}
