//! The identity of a run: runs with the same identity have the same result, byte for byte.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Error;

/// All that determines a run's result, except the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// The resolved recipe.
    pub(crate) recipe: Table,
    /// SHA-256 of each file that the run reads.
    pub(crate) inputs: BTreeMap<PathBuf, String>,
}

/// Keys that the result does not depend on.
const FREE: &[&str] = &["output.path", "executor.memory"];

impl Identity {
    /// Checks that the run whose state is in `dir` is the same as `now`.
    ///
    /// # Errors
    /// [`Error::OtherRun`] with the differences.
    pub(crate) fn check(&self, now: &Self, dir: &Path) -> Result<(), Error> {
        let differences = self.differences(now);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherRun { dir: dir.to_owned(), differences })
    }

    /// The differences to `now`, in words.
    fn differences(&self, now: &Self) -> Vec<String> {
        let keys = self.other_values(now).into_iter().filter(|(key, _)| !FREE.contains(&&**key));
        let keys =
            keys.map(|(key, [was, is])| format!("the recipe's `{key}` was {was} and is now {is}"));
        let mut found: Vec<String> = keys.collect();
        found.extend(changed(&self.inputs, &now.inputs));
        found
    }

    /// What another rank's run has that this one has not, in words.
    pub(crate) fn unlike(&self, other: &Self) -> Vec<String> {
        let keys = self.other_values(other).into_iter();
        let keys = keys
            .map(|(key, [of_first, own])| format!("its recipe's `{key}` is {own}, not {of_first}"));
        let files = self.inputs.keys().chain(other.inputs.keys()).collect::<BTreeSet<_>>();
        let differ = |file: &&PathBuf| self.inputs.get(*file) != other.inputs.get(*file);
        let files = files.into_iter().filter(differ);
        let files = files.map(|file| match [&self.inputs, &other.inputs].map(|of| of.get(file)) {
            [Some(of_first), Some(own)] => format!(
                "its {} has SHA-256 {}…, not {}…",
                file.display(),
                short(own),
                short(of_first)
            ),
            [Some(_), None] => format!("it does not read {}", file.display()),
            _ => format!("it reads {}", file.display()),
        });
        keys.chain(files).collect()
    }

    /// The keys of the recipes with other values in `now`, and both values, in words.
    fn other_values(&self, now: &Self) -> Vec<(String, [String; 2])> {
        let [mut before, mut after] = [BTreeMap::new(), BTreeMap::new()];
        flatten("", &Value::Table(self.recipe.clone()), &mut before);
        flatten("", &Value::Table(now.recipe.clone()), &mut after);
        let keys = before.keys().chain(after.keys()).collect::<BTreeSet<_>>();
        let values = keys.into_iter().map(|key| (key, [&before, &after].map(|of| of.get(key))));
        let shown = |value: Option<&Value>| {
            value.map_or_else(|| "left out".to_owned(), ToString::to_string)
        };
        let differ = values.filter(|(_, [was, is])| was != is);
        differ.map(|(key, values)| (key.clone(), values.map(shown))).collect()
    }
}

/// The changed inputs of a run, in words.
pub(crate) fn changed(
    before: &BTreeMap<PathBuf, String>,
    now: &BTreeMap<PathBuf, String>,
) -> Vec<String> {
    let paths = before.keys().chain(now.keys()).collect::<BTreeSet<_>>();
    let change = |path: &PathBuf| {
        let file = path.display();
        match [before, now].map(|of| of.get(path)) {
            [Some(was), Some(is)] if was == is => None,
            [Some(was), Some(is)] => Some(format!(
                "{file} has changed (SHA-256 {}… then, {}… now)",
                short(was),
                short(is)
            )),
            [Some(_), None] => Some(format!("the earlier run read {file}, this one does not")),
            _ => Some(format!("this run reads {file}, the earlier one did not")),
        }
    };
    paths.into_iter().filter_map(change).collect()
}

/// The first characters of a digest.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// The values of a table by their keys, such as `refine.0.alpha`.
fn flatten(key: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    let join = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Table(table) => {
            table.iter().for_each(|(name, value)| flatten(&join(name), value, into));
        }
        Value::Array(list) => {
            let items = list.iter().enumerate();
            items.for_each(|(i, value)| flatten(&join(&i.to_string()), value, into));
        }
        value => {
            into.insert(key.to_owned(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let recipe = "[sparsity]\nratio = 0.5\n[output]\npath = 'a'\n[[refine]]\nuse = 'swap'\n";
        Identity {
            recipe: toml::from_str(recipe).unwrap(),
            inputs: [("model/x".into(), "0123456789abcdef".into())].into(),
        }
    }

    #[test]
    fn what_does_not_matter_may_differ() {
        let mut now = identity();
        now.recipe["output"] = toml::from_str("path = 'b'").unwrap();
        now.recipe.insert("executor".into(), toml::from_str("memory = '1 GiB'").unwrap());
        assert_eq!(identity().differences(&now), [""; 0]);
    }

    #[test]
    fn what_another_rank_has_is_named() {
        let mut other = identity();
        other.recipe["output"] = toml::from_str("path = 'b'").unwrap();
        other.inputs = [("model/x".into(), "abcdef0123456789".into())].into();
        assert_eq!(
            identity().unlike(&other),
            [
                "its recipe's `output.path` is \"b\", not \"a\"",
                "its model/x has SHA-256 abcdef012345…, not 0123456789ab…",
            ]
        );
        assert_eq!(identity().unlike(&identity()), [""; 0]);
    }

    #[test]
    fn each_difference_is_named() {
        let mut now = identity();
        now.recipe =
            toml::from_str("[sparsity]\nratio = 0.6\n[[refine]]\nuse = 'swap'\nlimit = 3").unwrap();
        now.inputs =
            [("model/x".into(), "abcdef0123456789".into()), ("y".into(), "1".into())].into();
        let found = identity().differences(&now);
        assert_eq!(
            found,
            [
                "the recipe's `refine.0.limit` was left out and is now 3",
                "the recipe's `sparsity.ratio` was 0.5 and is now 0.6",
                "model/x has changed (SHA-256 0123456789ab… then, abcdef012345… now)",
                "this run reads y, the earlier one did not",
            ]
        );
        // A number that is no decimal fraction in memory comes back as it was.
        let text = toml::to_string(&now).unwrap();
        assert_eq!(toml::from_str::<Identity>(&text).unwrap(), now);
    }
}
