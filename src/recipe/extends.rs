//! Recipes that extend others: `extends = "other.toml"`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use figment::value::Value;

use super::{
    diagnose::shown,
    error::{Fault, Problem},
    layers::Layer,
    schema::EXTENDS,
    text::{Text, read_text},
};

/// Maximum number of recipes that extend one another.
const MOST: usize = 16;

/// The layers of a recipe's file, given by its text, and of the recipes that it extends, from the
/// base upwards.
pub(super) fn files(path: &Path, text: &str) -> Result<Vec<Layer>, Vec<Problem>> {
    let mut layers = Vec::new();
    let mut chain = Chain(vec![path.to_owned()]);
    let mut text = text.to_owned();
    loop {
        let path = chain.last();
        let (parsed, mut values) = Text::parse(&path.display().to_string(), &text)?;
        let base = values.remove(EXTENDS);
        let layer = Layer::file(path, parsed, values);
        if let Some(base) = &base {
            text = chain.follow(base).map_err(|mut problem| {
                layer.blame(&mut problem, &[EXTENDS.to_owned()]);
                vec![problem]
            })?;
        }
        layers.push(layer);
        if base.is_none() {
            layers.reverse();
            return Ok(layers);
        }
    }
}

/// Recipes, each of which extends the next.
struct Chain(Vec<PathBuf>);

impl Chain {
    fn last(&self) -> &Path {
        self.0.last().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Adds the recipe that the last one extends; returns its text.
    fn follow(&mut self, base: &Value) -> Result<String, Problem> {
        let wrong = |fault| Problem::at(EXTENDS, fault);
        let Value::String(_, base) = base else {
            let found = shown(&base.to_actual());
            let expected = "the path of a recipe, relative to this one".into();
            return Err(wrong(Fault::Type { found, expected }));
        };
        let path = self.last().parent().unwrap_or(Path::new("")).join(base);
        // A file that does not exist has no other name.
        let same = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let circle = self.0.iter().any(|known| same(known) == same(&path));
        self.0.push(path);
        let (path, chain) = (self.last(), self.shown());
        if circle {
            let why = format!("the recipes extend one another in a circle: {chain}");
            return Err(wrong(Fault::Value(why)).help("leave `extends` out of one of them"));
        }
        if self.0.len() > MOST {
            let why = format!("more than {MOST} recipes extend one another: {chain}");
            return Err(wrong(Fault::Value(why)).help("extend fewer recipes"));
        }
        read_text(path).map_err(|why| {
            let why = format!("{} cannot be read: {why} ({chain})", path.display());
            wrong(Fault::Value(why)).help("the path is relative to the recipe that it stands in")
        })
    }

    /// The chain as a message shows it.
    fn shown(&self) -> String {
        let paths: Vec<_> = self.0.iter().map(|path| path.display().to_string()).collect();
        paths.join(" extends ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        prune::{Refine, Swap},
        recipe::{RecipeError, load_text},
    };

    /// Resolves `top.toml` in a directory of recipes.
    fn load(
        recipes: &[(&str, &str)],
    ) -> (tempfile::TempDir, Result<crate::recipe::Loaded, RecipeError>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in recipes {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let path = dir.path().join("top.toml");
        let loaded = load_text(&path, &fs::read_to_string(&path).unwrap(), [], &[]);
        (dir, loaded)
    }

    const BASE: &str = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";

    #[test]
    fn values_are_the_nearest_recipes_own() {
        let base = format!(
            "preset = 'best'\n{BASE}sparsity = {{ ratio = 0.4, exclude = ['a', 'b'] }}\n\
             [[refine]]\nuse = 'swap'\nlimit = 7\n[[refine]]\nuse = 'reconstruct'\n"
        );
        let (dir, loaded) = load(&[
            ("low/base.toml", &base),
            (
                "middle.toml",
                "extends = 'low/base.toml'\nsparsity.exclude = ['c']\nstreams.blend = 0.1\n",
            ),
            (
                "top.toml",
                "extends = 'middle.toml'\ncalibration.source = 'mine'\n[[refine]]\nuse = 'swap'\n",
            ),
        ]);
        let loaded = loaded.unwrap();
        let recipe = &loaded.recipe;
        // Tables are merged, arrays replaced as a whole.
        assert_eq!(recipe.sparsity.ratio, 0.4);
        assert_eq!(recipe.sparsity.exclude, ["c"]);
        assert_eq!(recipe.refine, [Refine::Swap(Swap::default())]);
        // A preset is below all of them, whoever names it.
        assert_eq!((recipe.streams.blend, recipe.calibration.held_out), (0.1, 4));
        // Paths are relative to the file that they stand in.
        let at = |path: &str| dir.path().join(path);
        assert_eq!(recipe.model.path, at("low/m"));
        assert_eq!(recipe.calibration.source, Some(at("mine")));
        for (key, origin) in [
            ("sparsity.ratio", "low/base.toml line 5"),
            ("sparsity.exclude", "middle.toml line 2"),
            ("calibration.source", "top.toml line 2"),
        ] {
            assert_eq!(loaded.origin(key), at(origin).display().to_string());
        }
        assert_eq!(loaded.origin("calibration.held_out"), "preset `best`");
        assert!(!recipe.to_toml().unwrap().contains("extends"));
    }

    #[test]
    fn a_problem_is_shown_in_the_recipe_that_has_it() {
        let (dir, loaded) = load(&[
            ("base.toml", &format!("{BASE}sparsity.ratio = 1.5\nmask.innit = 'wanda'\n")),
            ("top.toml", "extends = 'base.toml'\ncalibration.seed = 'a'\n"),
        ]);
        let error = loaded.unwrap_err();
        let found: Vec<_> = error
            .problems()
            .iter()
            .map(|problem| (problem.key(), problem.excerpt().unwrap(), problem.origin.clone()))
            .collect();
        let at = |line: &str| Some(dir.path().join(line).display().to_string());
        assert_eq!(
            found,
            [
                ("mask.innit".into(), "innit", at("base.toml line 5")),
                ("calibration.seed".into(), "'a'", at("top.toml line 2")),
                ("sparsity.ratio".into(), "1.5", at("base.toml line 4")),
            ]
        );
    }

    #[test]
    fn what_is_wrong_with_a_chain_names_it() {
        let long: Vec<(String, String)> = (0..20)
            .map(|i| (format!("{i}.toml"), format!("extends = '{}.toml'\n", i + 1)))
            .collect();
        let mut long: Vec<(&str, &str)> =
            long.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        long.push(("top.toml", "extends = '0.toml'\n"));
        for (recipes, expected) in [
            (
                &[("top.toml", "extends = 'top.toml'\n")][..],
                &["in a circle", "top.toml extends "][..],
            ),
            (
                &[("top.toml", "extends = 'a.toml'\n"), ("a.toml", "extends = './top.toml'\n")],
                &["in a circle", "top.toml extends ", "a.toml extends "],
            ),
            (
                &[("top.toml", "extends = 'a.toml'\n"), ("a.toml", "extends = 'none.toml'\n")],
                &["none.toml cannot be read: No such file", "a.toml extends "],
            ),
            (&[("top.toml", "extends = '.'\n")], &["a directory, not a regular file"]),
            (
                &[("top.toml", "extends = ['a.toml']\n")],
                &["`extends` is an array, expected the path"],
            ),
            (&long, &["more than 16 recipes", "3.toml extends "]),
        ] {
            let error = load(recipes).1.unwrap_err();
            let [problem] = error.problems() else { panic!("{error:?}") };
            assert_eq!(problem.key(), "extends");
            assert!(problem.excerpt().is_some(), "{problem:?}");
            for expected in expected {
                assert!(problem.to_string().contains(expected), "{problem}");
            }
        }
        // Only files are built on files.
        let sets = ["extends=base.toml".to_owned()];
        let error = load_text(Path::new("r.toml"), BASE, [], &sets).unwrap_err();
        assert!(error.to_string().contains("only a recipe's file"), "{error}");
    }
}
