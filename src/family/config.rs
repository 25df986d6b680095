//! Reads keys of a `config.json`; every error names the key.

use serde_json::{Map, Value};

use crate::nearest::nearest;

/// Maximum number of decoder layers of a valid `config.json`.
const MOST_LAYERS: usize = 10_000;
/// Maximum width in a valid `config.json`; the product of two widths fits into 64 bits.
pub(super) const MOST: usize = i32::MAX as usize;

/// Why a `config.json` does not describe a [`Decoder`](super::Decoder).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The file does not have an object.
    #[error("config.json: must be an object, found {found}")]
    NotObject {
        /// The value that the file has.
        found: String,
    },
    /// A key is missing or null, but needs a value.
    #[error("config.json: missing key `{key}`")]
    Missing {
        /// The key, dotted from the top.
        key: String,
    },
    /// A key holds another type of value.
    #[error("config.json: `{key}` must be {expected}, found {found}")]
    Mistyped {
        /// The key, dotted from the top.
        key: String,
        /// The expected type, with its article.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// A key's value is an unknown name.
    #[error(
        "config.json: unknown `{key}` {found:?}{}, known: {}",
        near.map_or_else(String::new, |near| format!(", the nearest known one is {near:?}")),
        known.join(", ")
    )]
    Unknown {
        /// The key, dotted from the top.
        key: String,
        /// The name.
        found: String,
        /// The most similar known name, if one is similar.
        near: Option<&'static str>,
        /// The known names.
        known: Vec<&'static str>,
    },
    /// No family has this `model_type`.
    #[error(
        "config.json: unknown `model_type` {found:?}{}, known: {}; a new family is a file in \
         src/family, see the page Families of the book",
        near.map_or_else(String::new, |near| format!(", the nearest known one is {near:?}")),
        known.join(", ")
    )]
    UnknownFamily {
        /// The `model_type`.
        found: String,
        /// The most similar known one, if one is similar.
        near: Option<&'static str>,
        /// The known ones.
        known: Vec<&'static str>,
    },
    /// A key's value is invalid, by itself or in combination with another key.
    #[error("config.json: `{key}` is {found}, but {problem}")]
    Invalid {
        /// The key, dotted from the top.
        key: String,
        /// The value.
        found: String,
        /// What is wrong with the value.
        problem: String,
    },
}

/// An object in `config.json`, and its path.
#[derive(Clone, Debug)]
pub(super) struct Object<'a> {
    keys: &'a Map<String, Value>,
    path: String,
}

impl<'a> Object<'a> {
    /// The whole `config.json`.
    pub(super) fn top(config: &'a Value) -> Result<Self, Error> {
        let keys =
            config.as_object().ok_or_else(|| Error::NotObject { found: describe(config) })?;
        Ok(Self { keys, path: String::new() })
    }

    /// An object without keys.
    pub(super) fn empty(keys: &'a Map<String, Value>) -> Self {
        Self { keys, path: String::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key as errors name it.
    pub(super) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whether the key exists, even with the value null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The first key whose value is an object.
    pub(super) fn nested(&self) -> Option<&'a str> {
        self.keys.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// The value of a key; null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let mistyped = || Error::Mistyped { key: self.path(key), expected, found: describe(value) };
        convert(value).map(Some).ok_or_else(mistyped)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Self>, Error> {
        let keys = self.read(key, "an object", Value::as_object)?;
        Ok(keys.map(|keys| Self { keys, path: self.path(key) }))
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        self.read(key, "a list of numbers", |value| {
            value.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    /// A number from 0 to below 1, such as a norm's epsilon.
    pub(super) fn below_one(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.number(key)? {
            Some(value) if !(0.0..1.0).contains(&value) => {
                Err(self.invalid(key, value, "it must be from 0 to below 1"))
            }
            value => Ok(value),
        }
    }

    /// The value that a known name stands for.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        known: &[(&'static str, T)],
    ) -> Result<Option<T>, Error> {
        let Some(found) = self.string(key)? else { return Ok(None) };
        match known.iter().find(|(name, _)| *name == found) {
            Some((_, value)) => Ok(Some(*value)),
            None => Err(self.unknown(key, found, known.iter().map(|(name, _)| *name).collect())),
        }
    }

    /// The error for an unknown name.
    pub(super) fn unknown(&self, key: &str, found: &str, known: Vec<&'static str>) -> Error {
        let near = nearest(found, known.iter().copied());
        Error::Unknown { key: self.path(key), found: start(found), near, known }
    }

    /// The error for a `model_type` that no family has.
    pub(super) fn unknown_family(found: &str, known: Vec<&'static str>) -> Error {
        let near = nearest(found, known.iter().copied());
        Error::UnknownFamily { found: start(found), near, known }
    }

    /// The sliding window of each layer: `window` for layers of the type sliding in `layer_types`;
    /// without that list, for layers for which `default` is true.
    pub(super) fn windows(
        &self,
        window: Option<usize>,
        default: impl Fn(usize) -> bool,
    ) -> Result<impl Fn(usize) -> Option<usize>, Error> {
        let types = self.read("layer_types", "a list of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect::<Option<Vec<_>>>()
        })?;
        let known = ["full_attention", "sliding_attention"];
        if let Some(found) = types.iter().flatten().find(|found| !known.contains(found)) {
            return Err(self.unknown("layer_types", found, known.to_vec()));
        }
        if let Some(types) = &types {
            if let Some(layers) = self.layers("num_hidden_layers")?
                && layers != types.len()
            {
                let found = format!("a list of {}", types.len());
                let problem = format!("`num_hidden_layers` is {layers}");
                return Err(self.invalid("layer_types", found, problem));
            }
            if types.contains(&known[1]) && window.is_none() {
                let found = format!("a list with {:?}", known[1]);
                let problem = "no `sliding_window` is set, or it is not used";
                return Err(self.invalid("layer_types", found, problem));
            }
        }
        Ok(move |layer| {
            let slides = match &types {
                Some(types) => types.get(layer).is_some_and(|kind| *kind == known[1]),
                None => default(layer),
            };
            window.filter(|_| slides)
        })
    }

    /// A number above `floor`.
    pub(super) fn above(&self, key: &str, floor: f64) -> Result<Option<f64>, Error> {
        match self.number(key)? {
            Some(value) if value <= floor => {
                Err(self.invalid(key, value, format!("it must be above {floor}")))
            }
            value => Ok(value),
        }
    }

    /// A width or a count: at least 1, and small enough to multiply two of them.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        self.size_up_to(key, MOST)
    }

    /// A size, `None` if the value is null; `default` if the key is missing.
    pub(super) fn size_or(
        &self,
        key: &str,
        default: Option<usize>,
    ) -> Result<Option<usize>, Error> {
        Ok(self.size(key)?.or(default.filter(|_| !self.has(key))))
    }

    /// A number of decoder layers.
    pub(super) fn layers(&self, key: &str) -> Result<Option<usize>, Error> {
        self.size_up_to(key, MOST_LAYERS)
    }

    fn size_up_to(&self, key: &str, most: usize) -> Result<Option<usize>, Error> {
        let Some(value) = self.read(key, "a whole number", |value| {
            value.is_i64().then_some(value).or(value.is_u64().then_some(value))
        })?
        else {
            return Ok(None);
        };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=most).contains(&size) => Ok(Some(size)),
            _ => Err(self.invalid(key, value, format!("it must be from 1 to {most}"))),
        }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::Missing { key: self.path(key) }
    }

    pub(super) fn invalid(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        problem: impl Into<String>,
    ) -> Error {
        Error::Invalid { key: self.path(key), found: found.to_string(), problem: problem.into() }
    }
}

/// The start of a text, as much as an error shows.
fn start(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A value as shown in an error; long values are cut.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("the string {:?}", start(text)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
