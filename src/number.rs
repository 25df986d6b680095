//! Numbers in JSON, where what is not finite is `null`.

use serde::{Deserialize, Deserializer};

/// A number; not a number where JSON says `null`.
pub(crate) fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// [`or_nan`] of a key that may be left out.
pub(crate) fn some_or_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    or_nan(deserializer).map(Some)
}
