//! A choice from a closed set: one value of a table of named values. A new value is a new line of
//! its table, from which names, help and schema follow.

use std::{borrow::Cow, fmt, ops::Deref, sync::OnceLock};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, IntoDeserializer},
};
use serde_json::{Value, json};

/// A value of a table.
pub trait Named: Sized + 'static {
    /// Name of the set, such as `Init`.
    const SET: &str;

    /// The table of all values.
    fn table() -> &'static Table<Self>;

    /// The value's name.
    fn name(&self) -> &'static str;

    /// Description of the value, without a capital letter or a full stop.
    fn help(&self) -> &'static str;
}

/// Values, in the order in which their names are listed.
pub struct Table<T: 'static> {
    values: &'static [&'static T],
    names: OnceLock<Vec<&'static str>>,
}

impl<T: Named> Table<T> {
    pub(crate) const fn new(values: &'static [&'static T]) -> Self {
        Self { values, names: OnceLock::new() }
    }

    /// The names of all values.
    fn names(&self) -> &[&'static str] {
        self.names.get_or_init(|| self.values.iter().map(|value| value.name()).collect())
    }
}

/// One of a table's values. It is serialized as its name.
pub struct Choice<T: 'static>(pub(crate) &'static T);

impl<T: Named> Choice<T> {
    /// All choices.
    pub fn all() -> impl Iterator<Item = Self> {
        T::table().values.iter().map(|value| Self(value))
    }

    /// The choice of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|choice| choice.name() == name)
    }

    /// A line of help: what the choice decides, and a description of each value.
    pub(crate) fn help_on(decides: &str) -> String {
        let each: Vec<String> =
            Self::all().map(|value| format!("`{value}`, {}", value.help())).collect();
        format!("{decides}: {}.", each.join("; "))
    }
}

impl<T> Clone for Choice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Choice<T> {}

impl<T> Deref for Choice<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0
    }
}

impl<T: Named> PartialEq for Choice<T> {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl<T: Named> Eq for Choice<T> {}

impl<T: Named> fmt::Display for Choice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl<T: Named> fmt::Debug for Choice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl<T: Named> Serialize for Choice<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de, T: Named> Deserialize<'de> for Choice<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| de::Error::unknown_variant(&name, T::table().names()))
    }
}

impl<T: Named> JsonSchema for Choice<T> {
    fn schema_name() -> Cow<'static, str> {
        T::SET.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let each =
            |value: Self| json!({ "const": value.name(), "description": sentence(value.help()) });
        let all: Vec<Value> = Self::all().map(each).collect();
        json_schema!({ "oneOf": all })
    }
}

/// A value's help as a sentence.
pub(crate) fn sentence(help: &str) -> String {
    let mut chars = help.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars).chain(['.']).collect()
}

/// Deserializes a variant by its name only; figment would also accept its index.
pub(crate) fn word<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    T::deserialize(String::deserialize(deserializer)?.into_deserializer())
}

/// [`word`] for a key that may be missing.
pub(crate) fn optional_word<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    word(deserializer).map(Some)
}
