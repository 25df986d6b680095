//! A choice from a closed set, read by its name and by nothing else: figment would take a variant's
//! number too.

use serde::{Deserialize, Deserializer, de::IntoDeserializer};

/// Reads a choice.
pub(crate) fn word<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    T::deserialize(String::deserialize(deserializer)?.into_deserializer())
}

/// Reads a choice of a key that may be left out.
pub(crate) fn optional_word<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    word(deserializer).map(Some)
}
