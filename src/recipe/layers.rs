//! The layers a recipe is made of, merged by figment: built-in defaults, a preset, the files, from
//! the one that all others are built on to the recipe's own, `BARBER_*` environment variables,
//! `--set`; a later one wins.

use std::path::{Path, PathBuf};

use figment::{
    Figment, Metadata, Profile, Provider,
    error::Result,
    value::{Dict, Map, Value},
};

use super::{
    Recipe,
    error::{Fault, Problem, segments},
    keys::{keys, sections},
    preset::preset,
    text::{Place, Text},
};
use crate::nearest::nearest;

/// The arrays of tables. figment replaces arrays as a whole; as tables by index they merge, so
/// that a `--set` can reach into one.
const ARRAYS: [&str; 4] = ["blocks", "metric", "override", "refine"];
/// Deeper than any key.
const DEPTH: usize = 16;
const PREFIX: &str = "BARBER_";
const SEPARATOR: &str = "__";

/// One layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    /// What the user calls it.
    name: String,
    /// What it is written in; the defaults are in no text.
    text: Option<Text>,
    /// The recipe's file, if it is one: its paths are relative to the directory that it is in.
    file: Option<PathBuf>,
    values: Dict,
    /// The arrays that it gives as a whole, replacing those of the layers below.
    replaces: Vec<&'static str>,
}

impl Layer {
    fn new(name: String, text: Option<Text>, mut values: Dict) -> Self {
        let mut replaces = Vec::new();
        for name in ARRAYS {
            if let Some(Value::Array(tag, items)) = values.get(name) {
                let dict = (0..).map(|i: usize| i.to_string()).zip(items.clone()).collect();
                let dict = Value::Dict(*tag, dict);
                values.insert(name.into(), dict);
                replaces.push(name);
            }
        }
        Self { name, text, file: None, values, replaces }
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
        Self::new("default".into(), None, values)
    }

    /// What a preset stands for.
    pub(super) fn preset(name: &str) -> std::result::Result<Self, Problem> {
        let (text, values) = preset(name)?;
        Ok(Self::new(text.name.clone(), Some(text), values))
    }

    /// The preset that the layer names.
    pub(super) fn named_preset(&self) -> Option<&str> {
        self.values.get("preset")?.as_str()
    }

    /// A recipe's file.
    pub(super) fn file(path: &Path, text: Text, values: Dict) -> Self {
        let file = Some(path.to_owned());
        Self { file, ..Self::new(text.name.clone(), Some(text), values) }
    }

    /// An environment variable: `None` if it is none of a recipe's.
    pub(super) fn variable(name: &str, value: &str) -> Option<std::result::Result<Self, Problem>> {
        let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase();
        let path: Vec<String> = key.split(SEPARATOR).map(str::to_owned).collect();
        let section = path.first()?;
        // `BARBER_LOG` is another's; `BARBER_SPARSTIY__RATIO` is surely not.
        let meant = || path.len() > 1 && nearest(section, sections()).is_some();
        if !sections().any(|known| known == section) && !meant() {
            return None;
        }
        let origin = format!("environment variable {name}");
        let text = format!("{name}={value}");
        let place = Place { key: PREFIX.len()..name.len(), value: name.len() + 1..text.len() };
        Some(Self::assignment(origin, "environment", &text, path, place))
    }

    /// How an environment variable is surely meant that is no setting: its segments are joined by
    /// single underscores.
    pub(super) fn meant(name: &str) -> Option<String> {
        let words = name.strip_prefix(PREFIX)?.to_ascii_lowercase();
        let words: Vec<&str> = words.split('_').filter(|word| !word.is_empty()).collect();
        let is_number = |word: &str| word.parse::<usize>().is_ok();
        let pattern = words.iter().map(|word| if is_number(word) { "N" } else { word });
        let pattern = pattern.collect::<Vec<_>>().join("_");
        let key = keys()
            .iter()
            .find(|key| key.path.contains('.') && key.path.replace('.', "_") == pattern)?;
        let mut numbers = words.into_iter().filter(|word| is_number(word));
        let segments = key.path.split('.').map(|segment| match segment {
            "N" => numbers.next().unwrap_or_default().to_owned(),
            segment => segment.to_ascii_uppercase(),
        });
        let meant = format!("{PREFIX}{}", segments.collect::<Vec<_>>().join(SEPARATOR));
        (meant != name).then_some(meant)
    }

    /// The argument of a `--set`, `key=value`.
    pub(super) fn set(argument: &str) -> std::result::Result<Self, Problem> {
        let Some((key, value)) = argument.split_once('=') else {
            let why = format!("`--set {argument}` does not say which key has which value");
            return Err(Problem::new(Vec::new(), Fault::Assignment(why))
                .help("write it as `--set sparsity.ratio=0.6`"));
        };
        let (key, value) = (key.trim(), value.trim());
        let option = "--set ";
        let text = format!("{option}{key}={value}");
        let end = option.len() + key.len();
        let place = Place { key: option.len()..end, value: end + 1..text.len() };
        Self::assignment(text.clone(), "command line", &text, segments(key), place)
    }

    fn assignment(
        origin: String,
        name: &str,
        text: &str,
        path: Vec<String>,
        place: Place,
    ) -> std::result::Result<Self, Problem> {
        if path.iter().any(String::is_empty) || path.len() > DEPTH {
            let why = format!("`{}` is not a key", path.join("."));
            let mut problem = Problem::new(path, Fault::Assignment(why))
                .help("a key is a section and a name, such as `sparsity.ratio`");
            problem.origin = Some(origin);
            return Err(problem);
        }
        let assigned = Text::assignment(name, text, &path, place);
        let (text, value) = assigned.map_err(|mut problem| {
            problem.origin = Some(origin.clone());
            problem
        })?;
        Ok(Self::new(origin, Some(text), nest(&path, value)))
    }

    /// Of a file: the directory that its paths are relative to.
    pub(super) fn dir(&self) -> Option<&Path> {
        self.file.as_deref().map(|file| file.parent().unwrap_or(Path::new("")))
    }

    /// What it has at `path`.
    pub(super) fn value(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        below(self.values.get(first)?, rest)
    }

    /// Whether it is an assignment that gives the key at `path`, or something that the key is in.
    pub(super) fn assigns(&self, path: &[String]) -> bool {
        let mut table = &self.values;
        for segment in path {
            match table.get(segment) {
                Some(Value::Dict(_, inner)) => table = inner,
                Some(_) => return self.is_assignment(),
                None => return false,
            }
        }
        self.is_assignment()
    }

    fn is_assignment(&self) -> bool {
        self.text.is_some() && self.file.is_none()
    }

    /// The layer that gives the key at `path` the value that this layer has at `from`.
    pub(super) fn choice(&self, from: &[String], path: &[String]) -> Option<Self> {
        let value = self.value(from)?.clone();
        let text = self.text.as_ref().map(|text| text.moved(from, path));
        let layer = Self::new(self.name.clone(), text, nest(path, value));
        Some(Self { file: self.file.clone(), ..layer })
    }

    /// Where in its text the key at `path` stands.
    pub(super) fn start(&self, path: &[String]) -> usize {
        let place = self.text.as_ref().and_then(|text| text.place(path));
        place.map_or(0, |place| place.key.start)
    }

    /// What the user calls the place of the key at `path`: of a file, the line.
    pub(super) fn origin(&self, path: &[String]) -> String {
        let text = self.text.as_ref().filter(|_| self.file.is_some());
        match text.and_then(|text| Some((text, text.place(path)?))) {
            Some((text, place)) => text.origin(place.value.start),
            None => self.name.clone(),
        }
    }

    /// Says of a problem that the layer has it at `path`. The defaults have none.
    pub(super) fn blame(&self, problem: &mut Problem, path: &[String]) {
        let Some(text) = &self.text else { return };
        problem.origin = Some(self.origin(path));
        let Some(place) = text.place(path) else { return };
        problem.excerpt = Some(text.excerpt(match problem.fault {
            Fault::UnknownKey | Fault::Missing => place.key.clone(),
            _ => place.value.clone(),
        }));
    }

    /// Says what the layer has at the path that a problem is in conflict with, and where.
    pub(super) fn blame_too(&self, problem: &mut Problem) {
        let Some(against) = &mut problem.against else { return };
        let place = self.text.as_ref().and_then(|text| Some((text, text.place(&against.path)?)));
        match (place, &problem.excerpt) {
            (Some((text, place)), Some(excerpt)) if text.holds(excerpt) => {
                against.span = Some(place.value.clone());
            }
            _ => against.origin = Some(self.origin(&against.path)),
        }
    }
}

/// What a value has at `path`.
pub(super) fn below<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, segment| match value {
        Value::Array(_, items) => items.get(segment.parse::<usize>().ok()?),
        Value::Dict(_, dict) => dict.get(segment),
        _ => None,
    })
}

/// A table that has `value` at `path`, and nothing else.
fn nest(path: &[String], value: Value) -> Dict {
    let Some((first, rest)) = path.split_first() else { return Dict::new() };
    let value = if rest.is_empty() { value } else { nest(rest, value).into() };
    Dict::from([(first.clone(), value)])
}

/// A layer that figment knows by its number.
struct Numbered<'a>(usize, &'a Layer);

impl Provider for Numbered<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0.to_string())
    }

    fn data(&self) -> Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.1.values.clone()))
    }
}

/// Layers that are merged.
#[derive(Debug)]
pub(super) struct Merged {
    layers: Vec<Layer>,
    figment: Figment,
}

impl Merged {
    /// The recipes' files among the layers.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().filter_map(|layer| layer.file.as_deref())
    }

    /// The layer that a value of the merged ones is from; of a table, the one of its first value.
    pub(super) fn layer_of(&self, value: &Value) -> Option<&Layer> {
        match self.figment.get_metadata(value.tag()) {
            Some(metadata) => self.layers.get(metadata.name.parse::<usize>().ok()?),
            None => value.as_dict()?.values().find_map(|value| self.layer_of(value)),
        }
    }
}

/// Merges the layers, the lowest first. Each value of the result bears the tag of its layer's
/// metadata; arrays of tables are arrays again.
pub(super) fn merge(mut layers: Vec<Layer>) -> (Merged, Dict, Vec<Problem>) {
    for i in 0..layers.len() {
        let (below, this) = layers.split_at_mut(i);
        for name in &this[0].replaces {
            below.iter_mut().for_each(|layer| drop(layer.values.remove(*name)));
        }
    }
    let numbered = layers.iter().enumerate().map(|(i, layer)| Numbered(i, layer));
    let figment = numbered.fold(Figment::new(), Figment::merge);
    let mut values =
        figment.data().ok().and_then(|mut map| map.remove(&Profile::Default)).unwrap_or_default();
    let merged = Merged { layers, figment };
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
            let path = [name.to_owned(), (*key).clone()];
            let why = format!("`{name}` has no table with this index");
            let mut problem = Problem::new(path.to_vec(), Fault::Value(why)).help(match count {
                0 => format!("give `[[{name}]]` tables in the recipe first"),
                1 => "it has one, of index 0".to_owned(),
                _ => format!("it has {count}; the indices are 0 to {}", count - 1),
            });
            if let Some(layer) = merged.layer_of(value) {
                layer.blame(&mut problem, &path);
            }
            problems.push(problem);
        }
        let array = items[..count].iter().map(|(_, _, value)| (*value).clone()).collect();
        let array = Value::Array(*tag, array);
        values.insert(name.into(), array);
    }
    (merged, values, problems)
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
        // The section is surely misspelt: an unknown key.
        assert!(Layer::variable("BARBER_SPARSTIY__RATIO", "1").unwrap().is_ok());
    }

    #[test]
    fn single_underscores_are_told() {
        for (name, meant) in [
            ("BARBER_SPARSITY_RATIO", "BARBER_SPARSITY__RATIO"),
            ("BARBER_CALIBRATION_SEQUENCE_LENGTH", "BARBER_CALIBRATION__SEQUENCE_LENGTH"),
            ("BARBER_REFINE_0_ALPHA", "BARBER_REFINE__0__ALPHA"),
            ("BARBER_REFINE__0_ALPHA", "BARBER_REFINE__0__ALPHA"),
        ] {
            assert_eq!(Layer::meant(name).as_deref(), Some(meant));
        }
        let right = ["BARBER_SPARSITY__RATIO", "BARBER_REFINE__0__ALPHA", "BARBER_PRESET"];
        for name in right.into_iter().chain(["BARBER_LOG", "BARBER_OUTPUT_DIR", "SPARSITY_RATIO"]) {
            assert_eq!(Layer::meant(name), None);
        }
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
