//! The rules by which a recipe prunes each tensor.

use std::collections::{BTreeMap, BTreeSet};

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::{
    Loaded, Override, Pattern, Recipe, RecipeError, Sparsity,
    error::{Fault, Problem},
    refine::wrong_scope,
};
use crate::{nearest::nearest, plan::Rule};

/// The rules for all tensors, by name.
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
    /// The recipe's rules for tensors.
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
    /// If a glob is invalid, which loading a recipe rules out.
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
    /// The rule for the tensor of this name; `None` if it is excluded. Of several overrides that
    /// match, the last one that sets a value wins.
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
        rule.ratio = rule.pattern.ratio().unwrap_or(rule.ratio);
        Some(rule)
    }

    /// The key that sets a tensor's pattern.
    fn pattern_key(&self, tensor: &str) -> String {
        let says =
            |(names, of): &(Names, Override)| of.pattern.is_some() && names.match_tensor(tensor);
        let last = self.overrides.iter().rposition(says);
        last.map_or_else(|| "sparsity.pattern".into(), |i| format!("override.{i}.pattern"))
    }
}

/// The output head, which every model has; it may be stored as the embedding.
const HEAD: &str = "lm_head.weight";

impl Loaded {
    /// The rules for a model with these `tensors`, of which `matrices` can be pruned.
    ///
    /// # Errors
    /// If a glob of `sparsity.exclude` matches no tensor, or a glob of an override no matrix.
    pub fn rules<'a>(
        &self,
        tensors: impl Iterator<Item = &'a str>,
        matrices: impl Iterator<Item = &'a str>,
    ) -> Result<Rules, RecipeError> {
        let rules = self.recipe.rules().map_err(|e| {
            let problem = Problem::at("sparsity.exclude", Fault::Value(e.to_string()));
            self.source.error(vec![problem.help("globs over tensor names")])
        })?;
        let tensors: Vec<&str> = tensors.chain([HEAD]).collect();
        let matrices: Vec<&str> = matrices.collect();
        let exclude = self.recipe.sparsity.exclude.iter().enumerate();
        let exclude = exclude.map(|(i, glob)| (format!("sparsity.exclude.{i}"), glob, &tensors));
        let overrides = self.recipe.overrides.iter().enumerate().flat_map(|(i, of)| {
            of.tensors.iter().map(move |glob| (format!("override.{i}.tensors"), glob))
        });
        let overrides = overrides.map(|(key, glob)| (key, glob, &matrices));
        let mut problems = Vec::new();
        for (key, glob, names) in exclude.chain(overrides) {
            if !matches(glob, names) {
                let what = if key.starts_with("override") {
                    "matches no weight matrix of the blocks"
                } else {
                    "matches no tensor of the model"
                };
                let problem = Problem::at(&key, Fault::Value(format!("`{glob}` {what}")));
                problems.push(problem.help(suggestion(glob, names)));
            }
        }
        if problems.is_empty() { Ok(rules) } else { Err(self.source.error(problems)) }
    }

    /// Checks that each pattern divides the number of columns of its matrices.
    ///
    /// # Errors
    /// A problem for the key of each pattern that does not fit.
    pub fn check_widths<'a>(
        &self,
        rules: &Rules,
        matrices: impl Iterator<Item = (&'a str, usize, Pattern)>,
    ) -> Result<(), RecipeError> {
        let mut found: BTreeMap<String, (String, usize)> = BTreeMap::new();
        for (name, columns, pattern) in matrices.filter(|(_, columns, of)| !of.divides(*columns)) {
            let of = || {
                let why = format!(
                    "the pattern {pattern} does not divide the {columns} columns of `{name}`"
                );
                (why, 0)
            };
            found.entry(rules.pattern_key(name)).or_insert_with(of).1 += 1;
        }
        let problems = found.into_iter().map(|(key, (why, count))| {
            let more = match count {
                1 => String::new(),
                2 => ", nor those of another matrix".into(),
                more => format!(", nor those of {} others", more - 1),
            };
            Problem::at(&key, Fault::Value(format!("{why}{more}"))).help(
                "choose a pattern N:M whose M divides them, or leave the matrices out with \
                 sparsity.exclude",
            )
        });
        let problems: Vec<Problem> = problems.collect();
        if problems.is_empty() { Ok(()) } else { Err(self.source.error(problems)) }
    }
}

/// Whether a glob matches any of the tensors.
fn matches(glob: &str, tensors: &[&str]) -> bool {
    let names = Names::new(&[glob.to_owned()]);
    names.is_ok_and(|names| tensors.iter().any(|tensor| names.match_tensor(tensor)))
}

/// A suggestion for a glob that matches none of the tensors.
fn suggestion(glob: &str, tensors: &[&str]) -> String {
    let regex = glob.strip_prefix("re:");
    let meant = match regex {
        Some(regex) => {
            let plain = regex.trim_start_matches('^').trim_end_matches('$').to_owned();
            [("\\.", "."), (".*", "*"), ("\\d+", "*"), ("|", ","), ("(", "{"), (")", "}")]
                .into_iter()
                .fold(plain, |plain, (from, to)| plain.replace(from, to))
        }
        None => glob.to_owned(),
    };
    let spelt = spelt(&meant, tensors);
    let variants = [meant, spelt].into_iter().flat_map(|glob| {
        [glob.clone(), format!("*.{glob}"), format!("{glob}.*"), format!("*.{glob}.*")]
    });
    let likely = variants.into_iter().find(|glob| matches(glob, tensors));
    match (regex, likely, tensors.first()) {
        (Some(_), Some(likely), _) => format!("it is a glob, not a regular expression: `{likely}`"),
        (Some(_), None, _) => "it is a glob, not a regular expression: `*.down_proj`".into(),
        (None, Some(likely), _) => format!("did you mean `{likely}`?"),
        (None, None, Some(tensor)) => format!("the model has names such as `{tensor}`"),
        (None, None, None) => "the model has none".into(),
    }
}

/// The glob with each plain part between dots replaced by the nearest part of a tensor name.
fn spelt(glob: &str, tensors: &[&str]) -> String {
    let known: BTreeSet<&str> = tensors.iter().flat_map(|tensor| tensor.split('.')).collect();
    let parts = glob.split('.').map(|part| {
        let plain = part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let near = if plain { nearest(part, known.iter().copied()) } else { None };
        near.unwrap_or(part)
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Checks the overrides and the order of the stages, beyond their types.
pub(super) fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let groups = recipe.stages().0.len();
    for (i, stage) in recipe.refine.iter().enumerate().skip(groups) {
        if stage.is_of_groups() {
            let why =
                format!("`{}` comes after a stage that refines the whole model", stage.name());
            let problem = Problem::at(&format!("refine.{i}.use"), Fault::Value(why));
            problems.push(problem.help("stages that refine the groups of a layer come first"));
        }
    }
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
        if of.scope.is_some() && recipe.refine.iter().all(|stage| stage.scope().is_none()) {
            wrong(".scope", "has no effect", "no stage of the recipe has a scope");
        }
        let scoped = recipe.refine.iter().filter(|stage| stage.scope().is_some());
        for (stage, scope) in scoped.filter_map(|stage| Some((stage, of.scope?))) {
            if let Some((why, help)) = wrong_scope(stage, scope) {
                wrong(".scope", &why, &help);
            }
        }
        let pattern = of.pattern.unwrap_or(recipe.sparsity.pattern);
        let Some(ratio) = of.ratio else { continue };
        if !(0.0..1.0).contains(&ratio) {
            let why = format!("must be at least 0 and below 1, got {ratio}");
            wrong(".ratio", &why, "0.3 prunes 30% of the weights");
        } else if let Some(implied) = pattern.ratio()
            && (ratio - implied).abs() > 1e-9
        {
            let why = format!("the pattern {pattern} prunes {implied}, not {ratio}");
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

    /// A model of one layer and a tied head.
    const TENSORS: [&str; 5] = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ];

    fn loaded(line: &str) -> Loaded {
        let text =
            format!("model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n{line}\n");
        super::super::load_text(std::path::Path::new("r.toml"), &text, [], &[]).unwrap()
    }

    fn of(line: &str) -> Result<Rules, RecipeError> {
        loaded(line).rules(TENSORS.into_iter(), TENSORS[1..4].iter().copied())
    }

    #[test]
    fn a_glob_that_matches_nothing_is_an_error_with_what_was_meant() {
        for fine in ["lm_head", "lm_head.weight", "*.q_proj", "model.norm", "model.layers.0.*", "*"]
        {
            of(&format!("sparsity.exclude = ['{fine}']")).unwrap();
        }
        of("").unwrap();
        for (glob, help) in [
            ("down_proj", "did you mean `*.down_proj`?"),
            ("layers.0.*", "did you mean `*.layers.0.*`?"),
            ("model.layers.0", "did you mean `model.layers.0.*`?"),
            ("layers.0", "did you mean `*.layers.0.*`?"),
            ("*.down_porj", "did you mean `*.down_proj`?"),
            ("model.layer.0.mlp.*", "did you mean `model.layers.0.mlp.*`?"),
            ("re:.*down_proj", "not a regular expression: `*down_proj`"),
            ("re:^model\\.layers\\.\\d+\\.(mlp|self_attn).*$", "`model.layers.*.{mlp,self_attn}*`"),
            ("re:.*typo.*", "not a regular expression: `*.down_proj`"),
            ("xyz", "such as `model.embed_tokens.weight`"),
            ("model.layers.7.*", "names such as"),
        ] {
            let line = format!("sparsity.exclude = ['lm_head', '{glob}']");
            let error = of(&line).unwrap_err();
            let problem = &error.problems()[0];
            assert_eq!(problem.key(), "sparsity.exclude.1");
            assert_eq!(problem.excerpt(), Some(&*format!("'{glob}'")));
            assert!(problem.help.as_deref().unwrap().contains(help), "{glob}: {problem:?}");
            assert!(problem.to_string().contains("no tensor of the model"), "{problem}");
        }
        // Each glob of each override counts, and one that can be pruned has to be matched.
        let error = of("override = [{ tensors = ['*.q_proj', '*.embed_tokens'], ratio = 0.1 }, \
                        { tensors = 'q_proj', ratio = 0.2 }]")
        .unwrap_err();
        let found: Vec<_> = error.problems().iter().map(|p| (p.key(), p.to_string())).collect();
        let [(one, embedding), (other, short)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((one.as_str(), other.as_str()), ("override.0.tensors", "override.1.tensors"));
        assert!(
            embedding.contains("`*.embed_tokens` matches no weight matrix of the blocks"),
            "{found:?}"
        );
        assert!(short.contains("`q_proj`"), "{found:?}");
    }

    #[test]
    fn widths_that_a_pattern_does_not_divide_are_an_error_of_its_key() {
        let loaded = loaded(
            "sparsity.pattern = '2:4'\noverride = [{ tensors = '*.q_proj', pattern = '8:16' }, \
             { tensors = '*.self_attn.*', pattern = '16:32' }]",
        );
        let rules = loaded.recipe.rules().unwrap();
        let matrices = |columns: usize| {
            let of = |tensor: &'static str| (tensor, columns, rules.of(tensor).unwrap().pattern);
            TENSORS[1..4].iter().copied().map(of).collect::<Vec<_>>().into_iter()
        };
        loaded.check_widths(&rules, matrices(64)).unwrap();
        let error = loaded.check_widths(&rules, matrices(50)).unwrap_err();
        let found: Vec<_> = error.problems().iter().map(|p| (p.key(), p.to_string())).collect();
        let [(over, two), (all, one)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((over.as_str(), all.as_str()), ("override.1.pattern", "sparsity.pattern"));
        let expected = "the pattern 16:32 does not divide the 50 columns of \
                        `model.layers.0.self_attn.q_proj.weight`, nor those of another matrix";
        assert!(two.contains(expected), "{two}");
        assert!(one.contains("down_proj") && one.contains("2:4"), "{one}");
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
