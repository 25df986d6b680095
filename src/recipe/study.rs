//! Studies: a recipe with varied methods, cases and seeds.

use std::path::{Path, PathBuf};

use figment::value::Value;
use serde::Deserialize;

use super::{
    RecipeError,
    diagnose::typed,
    error::{Fault, Problem},
    text::{Text, read},
};

/// Several methods in several cases, each with several seeds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Path of the recipe of all runs; in the file it is relative to the file.
    pub recipe: PathBuf,
    /// Settings of all runs, written as for `--set`.
    #[serde(default)]
    pub set: Vec<String>,
    /// The values of `calibration.seed`.
    pub seeds: Vec<u64>,
    /// The columns of the tables: ratios and patterns.
    #[serde(rename = "case")]
    pub cases: Vec<Variant>,
    /// The rows of the tables.
    #[serde(rename = "method")]
    pub methods: Vec<Variant>,
}

/// A case or a method.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Name in the tables.
    pub name: String,
    /// Settings, written as for `--set`.
    #[serde(default)]
    pub set: Vec<String>,
}

/// Reads a study from a file. The recipes of its runs are not checked.
///
/// # Errors
/// All errors of the study.
pub fn load_study(path: &Path) -> Result<Study, RecipeError> {
    parse(path, &read(path, "a study, such as recipes/study-smollm2.toml")?)
}

fn parse(path: &Path, text: &str) -> Result<Study, RecipeError> {
    let name = path.display().to_string();
    let fail = |problems| RecipeError::new(&name, problems);
    let (parsed, values) = Text::parse(&name, text).map_err(fail)?;
    let (study, problems) = match Value::from(values).deserialize::<Study>() {
        Ok(study) => {
            let problems = study.problems();
            (Some(study), problems)
        }
        Err(error) => (None, error.into_iter().map(typed).collect()),
    };
    match study.filter(|_| problems.is_empty()) {
        Some(mut study) => {
            study.recipe = path.parent().unwrap_or(Path::new("")).join(&study.recipe);
            Ok(study)
        }
        None => Err(fail(problems.into_iter().map(|problem| locate(problem, &parsed)).collect())),
    }
}

/// Adds the place of the problem's key, or of the table that the key is in.
fn locate(mut problem: Problem, text: &Text) -> Problem {
    let lengths = (1..=problem.path.len()).rev();
    let place = lengths.filter_map(|length| text.place(&problem.path[..length])).next();
    problem.origin = Some(place.map_or(text.name.clone(), |place| text.origin(place.key.start)));
    problem.excerpt = place.map(|place| {
        text.excerpt(match problem.fault {
            Fault::UnknownKey | Fault::Missing => place.key.clone(),
            _ => place.value.clone(),
        })
    });
    problem
}

impl Study {
    /// The problems that the types cannot rule out.
    fn problems(&self) -> Vec<Problem> {
        let wrong = |key: &str, why: String, help| Problem::at(key, Fault::Value(why)).help(help);
        let mut problems = Vec::new();
        let empty = [
            ("seeds", self.seeds.is_empty()),
            ("case", self.cases.is_empty()),
            ("method", self.methods.is_empty()),
        ];
        for (key, _) in empty.into_iter().filter(|(_, empty)| *empty) {
            problems.push(wrong(key, "is empty".into(), "a study has at least one"));
        }
        for (i, seed) in self.seeds.iter().enumerate() {
            if self.seeds[..i].contains(seed) {
                let why = format!("{seed} is listed twice");
                problems.push(wrong(&format!("seeds.{i}"), why, "list each seed once"));
            }
        }
        for (key, variants) in [("case", &self.cases), ("method", &self.methods)] {
            for (i, Variant { name, .. }) in variants.iter().enumerate() {
                if variants[..i].iter().any(|other| other.name == *name) {
                    let why = format!("`{name}` is the name of another {key}");
                    let help = "give each a name of its own";
                    problems.push(wrong(&format!("{key}.{i}.name"), why, help));
                }
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: &str = "[[case]]\nname = '2:4'\nset = ['sparsity.pattern=2:4']\n";
    const METHOD: &str = "[[method]]\nname = 'Wanda'\n";

    #[test]
    fn a_study_is_read() {
        let text = format!("recipe = 'r.toml'\nseeds = [0, 7]\n{CASE}{METHOD}");
        let study = parse(Path::new("dir/s.toml"), &text).unwrap();
        assert_eq!(study.recipe, Path::new("dir/r.toml"));
        assert_eq!(study.seeds, [0, 7]);
        assert_eq!(study.cases[0].set, ["sparsity.pattern=2:4"]);
        assert_eq!((study.methods[0].name.as_str(), study.methods[0].set.len()), ("Wanda", 0));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let fine = "recipe = 'r.toml'\nseeds = [0]\n";
        for (text, key, line) in [
            (format!("{fine}sed = 1\n{CASE}{METHOD}"), "sed", 3),
            (format!("{fine}{CASE}{METHOD}sets = []\n"), "method.0.sets", 8),
            (format!("{fine}{CASE}[[method]]\nset = []\n"), "method.0.name", 6),
            (format!("{fine}{CASE}{METHOD}set = [1]\n"), "method.0.set.0", 8),
            (format!("recipe = 'r'\nseeds = [-1]\n{CASE}{METHOD}"), "seeds.0", 2),
            (format!("recipe = 'r'\nseeds = []\n{CASE}{METHOD}"), "seeds", 2),
            (format!("recipe = 'r'\nseeds = [3, 3]\n{CASE}{METHOD}"), "seeds.1", 2),
            (format!("{fine}{CASE}{CASE}{METHOD}"), "case.1.name", 7),
            (format!("{fine}seeds = [1]\n"), "", 3),
        ] {
            let error = parse(Path::new("s.toml"), &text).unwrap_err();
            let problem = &error.problems()[0];
            assert_eq!(problem.key(), key, "{text}");
            assert_eq!(problem.origin, Some(format!("s.toml line {line}")), "{text}");
        }
        let error = parse(Path::new("s.toml"), &format!("seeds = [0]\n{CASE}{METHOD}"));
        assert_eq!(error.unwrap_err().to_string(), "`recipe` is missing (s.toml)");
    }
}
