//! Recipes that remove structures as a whole: what such a recipe cannot ask for, and what its model
//! must have.

use serde_json::Value;

use super::{
    Allocate, Loaded, Recipe, RecipeError, Rules,
    error::{Fault, Problem},
};
use crate::{
    family::Decoder,
    structure::{Error, Lost, Removal},
};

/// Checks what a recipe with a structure cannot have.
pub(super) fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let all = recipe.structures();
    if recipe.sparsity.multiple == 0 {
        let problem = Problem::at("sparsity.multiple", Fault::Value("must be at least 1".into()));
        problems.push(problem.help("leave it out, or choose 32, with which every format of llama.cpp but those of 2 to 6 bits works"));
    }
    let Some((first, _)) = all.first() else {
        let stages = recipe.refine.iter().enumerate();
        for (i, stage) in stages.filter(|(_, stage)| stage.changes_biases()) {
            let why = format!(
                "`{}` makes up for whole channels or heads, not single weights",
                stage.name()
            );
            let problem = Problem::at(&format!("refine.{i}.use"), Fault::Value(why));
            problems
                .push(problem.help("remove some with sparsity.structure, or leave the stage out"));
        }
        return;
    };
    let of_table = |table: &str| format!("{table}.structure");
    let key = of_table(first);
    let many: Vec<&str> = all.iter().map(|(_, of)| of.structure.many()).collect();
    let many = many.join(" and ");
    let mut wrong = |key: &str, why: String, help: &str, against: &str| {
        let problem = Problem::at(key, Fault::Value(why)).help(help);
        problems.push(if key == against { problem } else { problem.against(against) });
    };
    for (i, (table, of)) in
        all.iter().enumerate().filter(|_| !recipe.sparsity.structures.is_empty())
    {
        if !of.structure.is_whole() {
            let why = "single weights are not removed as a whole".to_owned();
            let help = "name `channels`, `heads`, `layers` or `experts`";
            wrong(&of_table(table), why, help, &of_table(table));
        }
        if !(0.0..1.0).contains(&of.ratio) || of.ratio == 0.0 {
            let why = format!("must be above 0 and below 1, got {}", of.ratio);
            let key = format!("{table}.ratio");
            wrong(&key, why, "0.2 removes a fifth", &key);
        }
        if let Some((twice, _)) =
            all[..i].iter().find(|(_, before)| before.structure == of.structure)
        {
            let why = format!("{} are named twice", of.structure.many());
            wrong(&of_table(table), why, "leave one of the tables out", &of_table(twice));
        }
    }
    if recipe.sparsity.structure.is_whole() && !recipe.sparsity.structures.is_empty() {
        let why = "there is a list of structures, too".to_owned();
        wrong(
            "sparsity.structure",
            why,
            "add it to the list, with its ratio",
            "sparsity.structures",
        );
    }
    let mut wrong = |at: &str, why: String, help: &str| wrong(at, why, help, &key);
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
    let inputs_left = all.iter().all(|(_, of)| of.structure.leaves_inputs());
    let cannot = recipe.refine.iter().enumerate();
    for (i, stage) in cannot.filter(|(_, stage)| !stage.takes_structures() || !inputs_left) {
        let why = match stage.takes_structures() {
            true => {
                format!("without some {many} no group is left as it is, to compare with")
            }
            false => format!("`{}` works on single weights, not on {many}", stage.name()),
        };
        let help = match inputs_left {
            true => "set `refine = []`, or use `rebuild`, `compensate` or `reconstruct`",
            false => "set `refine = []`",
        };
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
    if recipe.output.masks {
        let why = format!("{many} are removed as a whole, and leave no zeros for a mask");
        wrong("output.masks", why, weights);
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
        let wrong = |key: &str, why: String, help: &str| {
            self.source.error(vec![Problem::at(key, Fault::Value(why)).help(help)])
        };
        let of = |table: &str, error: Error| {
            let key = |key: &str| format!("{table}.{key}");
            let (key, help) = match error {
                Error::Multiple { .. } => (
                    "sparsity.multiple".into(),
                    "choose a smaller one, or a ratio that removes more",
                ),
                Error::Ratio { .. } => (
                    key("ratio"),
                    "choose a ratio that removes some and leaves enough, or another structure",
                ),
                Error::Biases { .. } => {
                    ("refine".into(), "use `reconstruct` in place of `compensate`")
                }
                _ => (key("structure"), "choose another structure, or \"weights\""),
            };
            wrong(&key, error.to_string(), help)
        };
        let mut all = Vec::new();
        let structures = self.recipe.structures();
        let compensated = self.recipe.refine.iter().any(|stage| stage.changes_biases());
        for (table, wanted) in &structures {
            let lost =
                Lost::new(wanted.structure, decoder, wanted.ratio, self.recipe.sparsity.multiple);
            let lost = lost.map_err(|error| of(table, error))?;
            all.extend(lost.map(|lost| lost.with_compensation(compensated)));
        }
        let removal = Removal::new(all, config);
        let table = structures.first().map_or("sparsity", |(table, _)| table);
        let removal = removal.map_err(|error| of(table, error))?;
        let lost = removal.as_ref().map(|removal| removal.matrices(decoder)).unwrap_or_default();
        let excluded = lost.keys().find(|name| rules.of(name).is_none());
        if let Some(name) = excluded {
            let many: Vec<&str> = structures.iter().map(|(_, of)| of.structure.many()).collect();
            let why = format!(
                "leaves out `{name}`, but {} are removed from all layers and matrices alike",
                many.join(" and ")
            );
            return Err(wrong("sparsity.exclude", why, "leave it out"));
        }
        Ok(removal)
    }
}
