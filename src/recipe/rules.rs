//! What a recipe says of one tensor: whether it is pruned, and how.

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::{
    Kind, Loaded, Override, Pattern, Recipe, RecipeError, Scope, Sparsity,
    error::{Fault, Problem},
};
use crate::plan::Rule;

/// The rules for tensors by their names.
#[derive(Clone, Debug)]
pub struct Rules {
    excluded: Names,
    all: Rule,
    overrides: Vec<(Names, Override)>,
}

/// Globs over tensor names, with or without `.weight`.
#[derive(Clone, Debug)]
struct Names(GlobSet);

impl Names {
    fn new(globs: &[String]) -> Result<Self, globset::Error> {
        let mut set = GlobSetBuilder::new();
        for glob in globs {
            set.add(Glob::new(glob)?);
        }
        set.build().map(Self)
    }

    fn match_tensor(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        self.0.is_match(tensor) || self.0.is_match(module)
    }
}

impl Recipe {
    /// The rules for tensors.
    ///
    /// ```
    /// use llm_barber::{mask::Pattern, recipe::{Override, Recipe}};
    ///
    /// let mut recipe = Recipe::default();
    /// recipe.overrides = vec![Override {
    ///     tensors: vec!["*.down_proj".into()],
    ///     ratio: Some(0.3),
    ///     ..Override::default()
    /// }];
    /// let rules = recipe.rules().unwrap();
    /// assert_eq!(rules.of("model.layers.0.mlp.down_proj.weight").unwrap().ratio, 0.3);
    /// assert_eq!(rules.of("model.layers.0.mlp.up_proj.weight").unwrap().ratio, 0.5);
    /// assert!(rules.of("lm_head.weight").is_none());
    /// ```
    ///
    /// # Errors
    /// If a glob is none; loading a recipe has checked that they are.
    pub fn rules(&self) -> Result<Rules, globset::Error> {
        let Sparsity { pattern, ratio, exclude, .. } = &self.sparsity;
        let overrides = self.overrides.iter();
        let overrides = overrides.map(|of| Ok((Names::new(&of.tensors)?, of.clone())));
        Ok(Rules {
            excluded: Names::new(exclude)?,
            all: Rule { pattern: *pattern, ratio: *ratio, count: None, scope: None },
            overrides: overrides.collect::<Result<_, _>>()?,
        })
    }
}

impl Rules {
    /// How the tensor of this name is pruned; `None` if it is not. Where several overrides match,
    /// the last that says something wins.
    pub fn of(&self, tensor: &str) -> Option<Rule> {
        if self.excluded.match_tensor(tensor) {
            return None;
        }
        let mut rule = self.all;
        for (names, of) in &self.overrides {
            if names.match_tensor(tensor) {
                rule.pattern = of.pattern.unwrap_or(rule.pattern);
                rule.ratio = of.ratio.unwrap_or(rule.ratio);
                rule.scope = of.scope.or(rule.scope);
            }
        }
        rule.ratio = Sparsity::implied_ratio(rule.pattern).unwrap_or(rule.ratio);
        Some(rule)
    }
}

impl Loaded {
    /// The rules for tensors, for a model whose weight matrices are called `tensors`.
    ///
    /// # Errors
    /// If an override matches none of them.
    pub fn rules<'a>(
        &self,
        tensors: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Rules, RecipeError> {
        let wrong = |key: String, why: String, help: String| {
            self.source.error(vec![Problem::at(&key, Fault::Value(why)).help(help)])
        };
        let rules = self.recipe.rules().map_err(|e| {
            wrong("sparsity.exclude".into(), e.to_string(), "globs over tensor names".into())
        })?;
        for (i, (names, _)) in rules.overrides.iter().enumerate() {
            if !tensors.clone().any(|tensor| names.match_tensor(tensor)) {
                let help = match tensors.clone().next() {
                    Some(tensor) => format!("the model's are called like `{tensor}`"),
                    None => "the model has none".into(),
                };
                let why = "no weight matrix of the blocks has such a name".into();
                return Err(wrong(format!("override.{i}.tensors"), why, help));
            }
        }
        Ok(rules)
    }
}

/// What is wrong with the overrides, beyond their types.
pub(super) fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    for (i, of) in recipe.overrides.iter().enumerate() {
        let mut wrong = |key: &str, why: &str, help: &str| {
            let path = format!("override.{i}{key}");
            problems.push(Problem::at(&path, Fault::Value(why.into())).help(help));
        };
        if of.tensors.is_empty() {
            wrong(".tensors", "is empty", "a glob over tensor names, such as `*.down_proj`");
        }
        if of.ratio.is_none() && of.pattern.is_none() && of.scope.is_none() {
            wrong("", "changes nothing", "give it a `ratio`, a `pattern` or a `scope`");
        }
        if of.scope.is_some() && recipe.refine.iter().all(|refine| refine.scope.is_none()) {
            wrong(".scope", "has no effect", "a scope is where a stage's weights compete");
        }
        let swaps = recipe.refine.iter().any(|refine| refine.stage == Some(Kind::Swap));
        if swaps && matches!(of.scope, Some(Scope::Group | Scope::Column)) {
            let help = "a recipe's swaps are within a `row` or a `layer`";
            wrong(".scope", "is no scope of swaps", help);
        }
        let pattern = of.pattern.unwrap_or(recipe.sparsity.pattern);
        let Some(ratio) = of.ratio else { continue };
        if !(0.0..1.0).contains(&ratio) {
            wrong(".ratio", "is not a share", "it must be at least 0 and below 1");
        } else if let (Pattern::NofM { .. }, Some(implied)) =
            (pattern, Sparsity::implied_ratio(pattern))
            && (ratio - implied).abs() > 1e-9
        {
            let why = format!("the pattern {pattern} prunes {implied}");
            let problem = Problem::at(&format!("override.{i}.ratio"), Fault::Value(why));
            let problem = problem.help("leave it out, or add `pattern = \"unstructured\"`");
            problems.push(problem.against(&match of.pattern {
                Some(_) => format!("override.{i}.pattern"),
                None => "sparsity.pattern".into(),
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(exclude: &[&str], overrides: Vec<Override>) -> Rules {
        let exclude = exclude.iter().map(|&glob| glob.into()).collect();
        let sparsity = Sparsity { exclude, ..Sparsity::default() };
        Recipe { sparsity, overrides, ..Recipe::default() }.rules().unwrap()
    }

    #[test]
    fn globs_match_tensors_and_modules() {
        let rules = rules(&["*.down_proj", "model.layers.[01].*"], Vec::new());
        for name in ["model.layers.5.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"] {
            assert!(rules.of(name).is_none(), "{name}");
        }
        for name in ["model.layers.5.mlp.up_proj.weight", "down_proj.weight", "lm_head.weight"] {
            assert!(rules.of(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_last_override_that_says_something_wins() {
        let of = |glob: &str, ratio, pattern: Option<&str>| Override {
            tensors: vec![glob.into()],
            ratio,
            pattern: pattern.map(|pattern| pattern.parse().unwrap()),
            scope: None,
        };
        let overrides = vec![of("*.mlp.*", Some(0.7), None), of("*.down_proj", None, Some("1:4"))];
        let rules = rules(&[], overrides);
        let ratio = |name: &str| rules.of(name).unwrap().ratio;
        assert_eq!(ratio("l.self_attn.q_proj.weight"), 0.5);
        assert_eq!(ratio("l.mlp.up_proj.weight"), 0.7);
        assert_eq!(ratio("l.mlp.down_proj.weight"), 0.75);
    }
}
