//! The keys a recipe can have, from the types' own documentation.

use std::sync::LazyLock;

use serde_json::Value;

use super::schema::plain;

/// A key of the recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Path of the key, such as `sparsity.ratio`; `N` is the index in an array of tables, as in
    /// `blocks.N.name`.
    pub path: String,
    /// Description of the key.
    pub help: String,
}

/// All keys of a recipe, section by section; a section comes before the keys in it.
///
/// ```
/// let ratio = llm_barber::recipe::keys().iter().find(|key| key.path == "sparsity.ratio");
/// assert!(ratio.unwrap().help.starts_with("The fraction of the weights"));
/// ```
pub fn keys() -> &'static [Key] {
    static KEYS: LazyLock<Vec<Key>> = LazyLock::new(|| {
        let mut keys = Vec::new();
        walk(plain().as_value(), "", &mut keys);
        keys
    });
    &KEYS
}

/// The key at `path`, whose segments may be indices.
pub(super) fn key(path: &[String]) -> Option<&'static Key> {
    let path: Vec<_> =
        path.iter().map(|s| if s.parse::<usize>().is_ok() { "N" } else { s }).collect();
    let path = path.join(".");
    keys().iter().find(|key| key.path == path)
}

/// Whether a recipe has a key at `path`; any parameter of a metric counts.
pub(super) fn is_key(path: &[String]) -> bool {
    let path_of: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(path_of[..], ["metric", _, ..] | ["mask", "metric", _, ..])
        || path.last().is_some_and(|last| last.parse::<usize>().is_ok())
        || key(path).is_some()
}

/// The names of the recipe's sections.
pub(super) fn sections() -> impl Iterator<Item = &'static str> {
    keys().iter().map(|key| key.path.as_str()).filter(|path| !path.contains('.'))
}

fn walk(schema: &Value, prefix: &str, keys: &mut Vec<Key>) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    for (name, property) in properties {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let help = property.get("description").and_then(Value::as_str).unwrap_or_default();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        keys.push(Key { path: path.clone(), help });
        match property.get("items") {
            Some(items) => walk(items, &format!("{path}.N"), keys),
            None => walk(property, &path, keys),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_help() {
        let paths: Vec<_> = keys().iter().map(|key| key.path.as_str()).collect();
        for path in ["model.path", "refine.N.alpha", "blocks.N.layers", "metric.N.use"] {
            assert!(paths.contains(&path), "{path} not in {paths:?}");
        }
        for key in keys() {
            assert!(!key.help.is_empty(), "{}", key.path);
        }
        let expected = [
            "preset",
            "model",
            "calibration",
            "sparsity",
            "mask",
            "blocks",
            "override",
            "streams",
            "refine",
            "metric",
            "executor",
            "output",
            "evaluate",
            "extends",
            "sweep",
        ];
        assert_eq!(sections().collect::<Vec<_>>(), expected);
    }
}
