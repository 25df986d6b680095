//! Recipes that permute inner channels: what such a recipe cannot ask for, and what its model must have.

use super::{
    Loaded, Recipe, RecipeError,
    error::{Fault, Problem},
};
use crate::{family::Decoder, limits::REPORT, permutation::Reach, plan::Plan};

/// Maximum number of channels whose order a report can have: with a comma and a space each takes about 7
/// of its bytes.
const MOST: usize = REPORT.bytes as usize / 8;

/// The key.
const KEY: &str = "sparsity.permute";

/// Checks what a recipe that permutes channels cannot have.
pub(super) fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    if !recipe.sparsity.permute {
        return;
    }
    let mut wrong = |why: String, help: &str, against: &str| {
        problems.push(Problem::at(KEY, Fault::Value(why)).help(help).against(against));
    };
    if let Some((key, of)) = recipe.structures().first() {
        let many = of.structure.many();
        let key = if key == "sparsity" { "sparsity.structure" } else { key };
        wrong(format!("{many} are removed as a whole, in any order"), "leave it out", key);
        return;
    }
    let mut overrides = recipe.overrides.iter().filter_map(|of| of.pattern);
    let has_tiles = recipe.sparsity.pattern.ratio().is_some()
        || overrides.any(|pattern| pattern.ratio().is_some());
    if !has_tiles {
        let why = "the order of channels matters to patterns N:M alone".to_owned();
        wrong(why, "leave it out, or set `sparsity.pattern = \"2:4\"`", "sparsity.pattern");
    }
    if recipe.mask.init.zeros {
        let why = "the zeros of a sparse model are in the order of its channels".to_owned();
        wrong(why, "leave it out, or choose another `mask.init`", "mask.init");
    }
}

impl Loaded {
    /// Checks that the recipe, if it permutes channels, prunes matrices whose channels can be permuted.
    ///
    /// # Errors
    /// If the plan prunes no such matrix, or the report cannot have the orders of all.
    pub fn check_permutation(&self, plan: &Plan, decoder: &Decoder) -> Result<(), RecipeError> {
        if !self.recipe.sparsity.permute {
            return Ok(());
        }
        let wrong = |why: String, help: &str| {
            Err(self.source.error(vec![Problem::at(KEY, Fault::Value(why)).help(help)]))
        };
        match Reach::of(plan, decoder) {
            Reach { permuted: 0, .. } => {
                let why = "no output projection (`down_proj`, `o_proj`) is pruned in tiles N:M that fit \
                           its inner channels, within a head";
                wrong(why.into(), "leave it out, or choose another pattern N:M")
            }
            Reach { channels, .. } if channels > MOST => {
                let why = format!(
                    "the report would have the order of {channels} channels; at most {MOST} fit"
                );
                wrong(why, "leave it out, or leave experts out with sparsity.exclude")
            }
            _ => Ok(()),
        }
    }
}
