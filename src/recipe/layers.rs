//! The layers a recipe is made of, merged by figment: built-in defaults, a preset, the file,
//! `BARBER_*` environment variables, `--set`; a later one wins.

use std::path::Path;

use figment::{
    Figment, Metadata, Profile, Provider,
    error::Result,
    value::{Dict, Map, Value},
};

use super::{
    Recipe,
    error::{Fault, Problem, alternatives, nearest, segments},
    keys::sections,
    preset::preset,
    text::parse_value,
};

/// The arrays of tables. figment replaces arrays as a whole; as tables by index they merge, so
/// that a `--set` can reach into one.
const ARRAYS: [&str; 4] = ["blocks", "metric", "override", "refine"];
/// Deeper than any key.
const DEPTH: usize = 16;
const PREFIX: &str = "BARBER_";
const SEPARATOR: &str = "__";

/// One layer.
pub(super) struct Layer {
    metadata: Metadata,
    values: Dict,
    /// The arrays that it gives as a whole, replacing those of the layers below.
    replaces: Vec<&'static str>,
}

impl Layer {
    fn new(metadata: Metadata, mut values: Dict) -> Self {
        let mut replaces = Vec::new();
        for name in ARRAYS {
            if let Some(Value::Array(tag, items)) = values.get(name) {
                let dict = (0..).map(|i: usize| i.to_string()).zip(items.clone()).collect();
                let dict = Value::Dict(*tag, dict);
                values.insert(name.into(), dict);
                replaces.push(name);
            }
        }
        Self { metadata, values, replaces }
    }

    /// What holds when nothing else is said.
    pub(super) fn defaults() -> Self {
        let mut values = match Value::serialize(Recipe::default()) {
            Ok(Value::Dict(_, dict)) => dict,
            _ => Dict::new(),
        };
        // These are no defaults: the one is the user's to give, the other follows from the pattern.
        for (section, key) in [("model", "path"), ("sparsity", "ratio")] {
            if let Some(Value::Dict(_, dict)) = values.get_mut(section) {
                dict.remove(key);
            }
        }
        Self::new(Metadata::named("default"), values)
    }

    /// What a preset stands for.
    pub(super) fn preset(name: &str) -> std::result::Result<Self, Problem> {
        Ok(Self::new(Metadata::named(format!("preset `{name}`")), preset(name)?))
    }

    /// The preset that the layer names.
    pub(super) fn named_preset(&self) -> Option<&str> {
        self.values.get("preset")?.as_str()
    }

    /// The recipe's file.
    pub(super) fn file(path: &Path, values: Dict) -> Self {
        Self::new(Metadata::from(path.display().to_string(), path), values)
    }

    /// An environment variable: `None` if it is none of a recipe's.
    pub(super) fn variable(name: &str, value: &str) -> Option<std::result::Result<Self, Problem>> {
        let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase();
        let path: Vec<String> = key.split(SEPARATOR).map(str::to_owned).collect();
        let origin = format!("environment variable {name}");
        let section = path.first()?;
        if !sections().any(|known| known == section) {
            // `BARBER_LOG` is another's; `BARBER_SPARSTIY__RATIO` is surely not.
            let near = nearest(section, sections()).filter(|_| path.len() > 1)?;
            let mut problem = Problem::new(path.clone(), Fault::UnknownKey)
                .help(format!("did you mean {PREFIX}{}…?", near.to_ascii_uppercase() + SEPARATOR));
            problem.origin = Some(origin);
            return Some(Err(problem));
        }
        Some(Self::assignment(path, value, origin))
    }

    /// The argument of a `--set`, `key=value`.
    pub(super) fn set(argument: &str) -> std::result::Result<Self, Problem> {
        let Some((key, value)) = argument.split_once('=') else {
            let why = format!("`--set {argument}` does not say which key has which value");
            return Err(Problem::new(Vec::new(), Fault::Assignment(why))
                .help("write it as `--set sparsity.ratio=0.6`"));
        };
        let path = segments(key.trim());
        let origin = format!("--set {argument}");
        if let Some(section) = path.first().filter(|s| !sections().any(|known| known == *s)) {
            let mut problem = Problem::new(path.clone(), Fault::UnknownKey).help(
                match nearest(section, sections()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("a key starts with {}", alternatives(sections())),
                },
            );
            problem.origin = Some(origin);
            return Err(problem);
        }
        Self::assignment(path, value.trim(), origin)
    }

    fn assignment(
        path: Vec<String>,
        value: &str,
        origin: String,
    ) -> std::result::Result<Self, Problem> {
        let problem = |fault, help: &str| {
            let mut problem = Problem::new(path.clone(), fault).help(help);
            problem.origin = Some(origin.clone());
            problem
        };
        if path.iter().any(String::is_empty) || path.len() > DEPTH {
            return Err(problem(
                Fault::Assignment(format!("`{}` is no key", path.join("."))),
                "a key is a section and a name, such as `sparsity.ratio`",
            ));
        }
        let value = match parse_value(value) {
            Ok(value) => value,
            // What opens like TOML was meant as TOML; anything else is a text without its quotes.
            Err(why) if value.starts_with(['[', '{', '"', '\'']) => {
                return Err(problem(
                    Fault::Syntax(why),
                    "a value that starts with a bracket or a quote is read as TOML",
                ));
            }
            Err(_) => value.into(),
        };
        let mut values = Dict::new();
        let mut segments = path.iter().rev();
        let Some(last) = segments.next() else { return Ok(Self::new(Metadata::default(), values)) };
        values.insert(last.clone(), value);
        for segment in segments {
            values = Dict::from([(segment.clone(), values.into())]);
        }
        Ok(Self::new(Metadata::named(origin), values))
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        self.metadata.clone()
    }

    fn data(&self) -> Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// Merges the layers, the lowest first. Each value of the result bears the tag of its layer's
/// metadata; arrays of tables are arrays again.
pub(super) fn merge(mut layers: Vec<Layer>) -> (Figment, Dict, Vec<Problem>) {
    for i in 0..layers.len() {
        let (below, this) = layers.split_at_mut(i);
        for name in &this[0].replaces {
            below.iter_mut().for_each(|layer| drop(layer.values.remove(*name)));
        }
    }
    let figment = layers.into_iter().fold(Figment::new(), Figment::merge);
    let mut values =
        figment.data().ok().and_then(|mut map| map.remove(&Profile::Default)).unwrap_or_default();
    let mut problems = Vec::new();
    for name in ARRAYS {
        let Some(Value::Dict(tag, dict)) = values.get(name) else { continue };
        let mut items = Vec::new();
        for (key, value) in dict {
            match key.parse::<usize>() {
                Ok(i) => items.push((i, key, value)),
                Err(_) => items.clear(),
            }
        }
        if items.len() != dict.len() {
            // A table, where an array of them is needed: the types will say so.
            continue;
        }
        items.sort_by_key(|(i, ..)| *i);
        let gap = items.iter().enumerate().position(|(place, (i, ..))| place != *i);
        let count = gap.unwrap_or(items.len());
        for (_, key, value) in &items[count..] {
            let mut problem = Problem::new(
                vec![name.into(), (*key).clone()],
                Fault::Value(format!("`{name}` has no table of this index")),
            )
            .help(match count {
                0 => format!("give `[[{name}]]` tables in the recipe first"),
                1 => "it has one, of index 0".to_owned(),
                _ => format!("it has {count}; the indices are 0 to {}", count - 1),
            });
            problem.origin = origin_below(&figment, value);
            problems.push(problem);
        }
        let array = items[..count].iter().map(|(_, _, value)| (*value).clone()).collect();
        let array = Value::Array(*tag, array);
        values.insert(name.into(), array);
    }
    (figment, values, problems)
}

/// The layer that the first value at or below `value` comes from.
fn origin_below(figment: &Figment, value: &Value) -> Option<String> {
    match figment.get_metadata(value.tag()) {
        Some(metadata) => Some(metadata.name.to_string()),
        None => value.as_dict()?.values().find_map(|value| origin_below(figment, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_others_are_left_alone() {
        for name in ["PATH", "BARBER_LOG", "BARBER_TEST_DEVICE", "BARBER_", "BARBER___X"] {
            assert!(Layer::variable(name, "1").is_none(), "{name}");
        }
        assert!(Layer::variable("BARBER_SPARSITY__RATIO", "1").unwrap().is_ok());
        let problem = Layer::variable("BARBER_SPARSTIY__RATIO", "1").unwrap().err().unwrap();
        assert!(problem.help.unwrap().contains("BARBER_SPARSITY__"));
    }

    #[test]
    fn values_are_toml_or_bare_text() {
        let value = |argument| {
            let layer = Layer::set(argument).ok().unwrap();
            Value::from(layer.values).find("model.path").unwrap()
        };
        assert_eq!(value("model.path=7"), Value::from(7i64));
        assert_eq!(value("model.path = 'a b'"), Value::from("a b"));
        assert_eq!(value("model.path=a=b"), Value::from("a=b"));
        assert_eq!(value("model.path=../models/7b"), Value::from("../models/7b"));
        assert_eq!(value("model.path="), Value::from(""));
        assert_eq!(value("model.path=2024-01-01"), Value::from("2024-01-01"));
    }
}
