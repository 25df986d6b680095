//! The layers of a recipe, merged by figment: defaults, a preset, the extended files from the base
//! upwards, the recipe's file, `BARBER_*` environment variables, `--set`. A later layer wins.

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

/// The paths of the arrays of tables. figment replaces arrays as a whole, so these are merged as tables
/// keyed by index: a `--set` can change a single entry.
const ARRAYS: [&[&str]; 6] = [
    &["blocks"],
    &["metric"],
    &["override"],
    &["refine"],
    &["mask", "metric"],
    &["sparsity", "structures"],
];
/// Maximum nesting of values that are looked at; keys are less deep.
const DEPTH: usize = 16;
const PREFIX: &str = "BARBER_";
const SEPARATOR: &str = "__";

/// One layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    /// Name of the layer, as the user sees it.
    name: String,
    /// Text of the layer; `None` for the defaults.
    text: Option<Text>,
    /// Path of the layer's file, if it has one; paths in it are relative to its directory.
    file: Option<PathBuf>,
    values: Dict,
    /// The arrays that the layer gives as a whole, which replace those of the layers below.
    replaces: Vec<&'static [&'static str]>,
}

impl Layer {
    fn new(name: String, text: Option<Text>, mut values: Dict) -> Self {
        let mut replaces = Vec::new();
        for path in ARRAYS {
            let Some((table, name)) = table_of(&mut values, path) else { continue };
            if let Some(Value::Array(tag, items)) = table.get(name) {
                let dict = (0..).map(|i: usize| i.to_string()).zip(items.clone()).collect();
                let dict = Value::Dict(*tag, dict);
                table.insert(name.into(), dict);
                replaces.push(path);
            }
        }
        Self { name, text, file: None, values, replaces }
    }

    /// The built-in defaults.
    pub(super) fn defaults() -> Self {
        let mut values = match Value::serialize(Recipe::default()) {
            Ok(Value::Dict(_, dict)) => dict,
            _ => Dict::new(),
        };
        // These have no default: the path is required, and the pattern may imply the ratio.
        for (section, key) in [("model", "path"), ("sparsity", "ratio")] {
            if let Some(Value::Dict(_, dict)) = values.get_mut(section) {
                dict.remove(key);
            }
        }
        Self::new("default".into(), None, values)
    }

    /// The values of a preset.
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

    /// An environment variable; `None` if it does not set a key of a recipe.
    pub(super) fn variable(name: &str, value: &str) -> Option<std::result::Result<Self, Problem>> {
        let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase();
        let path: Vec<String> = key.split(SEPARATOR).map(str::to_owned).collect();
        let section = path.first()?;
        // `BARBER_LOG` is not a setting, `BARBER_SPARSTIY__RATIO` is a misspelt one.
        let meant = || path.len() > 1 && nearest(section, sections()).is_some();
        if !sections().any(|known| known == section) && !meant() {
            return None;
        }
        let origin = format!("environment variable {name}");
        let text = format!("{name}={value}");
        let place = Place { key: PREFIX.len()..name.len(), value: name.len() + 1..text.len() };
        Some(Self::assignment(origin, "environment", &text, path, place))
    }

    /// The correct name of a misspelt variable whose segments are joined by single underscores.
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

    /// The directory that the paths of a file's layer are relative to.
    pub(super) fn dir(&self) -> Option<&Path> {
        self.file.as_deref().map(|file| file.parent().unwrap_or(Path::new("")))
    }

    /// The layer's value at `path`.
    pub(super) fn value(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        below(self.values.get(first)?, rest)
    }

    /// Whether the layer is an assignment to the key at `path`, or to a table that holds the key.
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

    /// A layer that sets the key at `path` to this layer's value at `from`.
    pub(super) fn choice(&self, from: &[String], path: &[String]) -> Option<Self> {
        let value = self.value(from)?.clone();
        let text = self.text.as_ref().map(|text| text.moved(from, path));
        let layer = Self::new(self.name.clone(), text, nest(path, value));
        Some(Self { file: self.file.clone(), ..layer })
    }

    /// Offset of the key at `path` in the layer's text.
    pub(super) fn start(&self, path: &[String]) -> usize {
        let place = self.text.as_ref().and_then(|text| text.place(path));
        place.map_or(0, |place| place.key.start)
    }

    /// The source of the key at `path`, in words; for a file, with the line.
    pub(super) fn origin(&self, path: &[String]) -> String {
        let text = self.text.as_ref().filter(|_| self.file.is_some());
        match text.and_then(|text| Some((text, text.place(path)?))) {
            Some((text, place)) => text.origin(place.value.start),
            None => self.name.clone(),
        }
    }

    /// Adds the layer's place of `path` to a problem. The defaults have no places.
    pub(super) fn blame(&self, problem: &mut Problem, path: &[String]) {
        let Some(text) = &self.text else { return };
        problem.origin = Some(self.origin(path));
        let Some(place) = text.place(path) else { return };
        problem.excerpt = Some(text.excerpt(match problem.fault {
            Fault::UnknownKey | Fault::Missing => place.key.clone(),
            _ => place.value.clone(),
        }));
    }

    /// Adds the layer's place of the key that a problem's value conflicts with.
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

/// The value at `path` in another value.
pub(super) fn below<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, segment| match value {
        Value::Array(_, items) => items.get(segment.parse::<usize>().ok()?),
        Value::Dict(_, dict) => dict.get(segment),
        _ => None,
    })
}

/// The table that has the key at `path`, and the key's name in it.
fn table_of<'a>(
    values: &'a mut Dict,
    path: &[&'static str],
) -> Option<(&'a mut Dict, &'static str)> {
    let (name, tables) = path.split_last()?;
    let table = tables.iter().try_fold(values, |table, name| match table.get_mut(*name)? {
        Value::Dict(_, inner) => Some(inner),
        _ => None,
    });
    Some((table?, name))
}

/// A table with only `value`, at `path`.
fn nest(path: &[String], value: Value) -> Dict {
    let Some((first, rest)) = path.split_first() else { return Dict::new() };
    let value = if rest.is_empty() { value } else { nest(rest, value).into() };
    Dict::from([(first.clone(), value)])
}

/// A layer with its index, which is its name for figment.
struct Numbered<'a>(usize, &'a Layer);

impl Provider for Numbered<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0.to_string())
    }

    fn data(&self) -> Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.1.values.clone()))
    }
}

/// Merged layers.
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

    /// The layer of a merged value; for a table, the layer of its first value.
    pub(super) fn layer_of(&self, value: &Value) -> Option<&Layer> {
        match self.figment.get_metadata(value.tag()) {
            Some(metadata) => self.layers.get(metadata.name.parse::<usize>().ok()?),
            None => value.as_dict()?.values().find_map(|value| self.layer_of(value)),
        }
    }
}

/// Merges the layers, the lowest first. Each value of the result has the tag of its layer's
/// metadata; arrays of tables become arrays again.
pub(super) fn merge(mut layers: Vec<Layer>) -> (Merged, Dict, Vec<Problem>) {
    for i in 0..layers.len() {
        let (below, this) = layers.split_at_mut(i);
        for path in &this[0].replaces {
            for layer in &mut *below {
                if let Some((table, name)) = table_of(&mut layer.values, path) {
                    table.remove(name);
                }
            }
        }
    }
    let numbered = layers.iter().enumerate().map(|(i, layer)| Numbered(i, layer));
    let figment = numbered.fold(Figment::new(), Figment::merge);
    let mut values =
        figment.data().ok().and_then(|mut map| map.remove(&Profile::Default)).unwrap_or_default();
    let merged = Merged { layers, figment };
    let mut problems = Vec::new();
    for path in ARRAYS {
        let Some((table, key)) = table_of(&mut values, path) else { continue };
        let Some(Value::Dict(tag, dict)) = table.get(key) else { continue };
        let name = path.join(".");
        let mut items = Vec::new();
        for (key, value) in dict {
            match key.parse::<usize>() {
                Ok(i) => items.push((i, key, value)),
                Err(_) => items.clear(),
            }
        }
        if items.len() != dict.len() {
            // A table in place of an array of tables: the types report it.
            continue;
        }
        items.sort_by_key(|(i, ..)| *i);
        let gap = items.iter().enumerate().position(|(place, (i, ..))| place != *i);
        let count = gap.unwrap_or(items.len());
        for (_, index, value) in &items[count..] {
            let path: Vec<String> =
                path.iter().copied().chain([index.as_str()]).map(str::to_owned).collect();
            let why = format!("`{name}` has no table with this index");
            let mut problem = Problem::new(path.clone(), Fault::Value(why)).help(match count {
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
        table.insert(key.into(), array);
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
