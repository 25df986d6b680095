//! Where zeros may be: anywhere, or so many in each tile.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{Error, Mask};

/// Where the zeros of a weight matrix may be.
///
/// ```
/// use llm_barber::mask::Pattern;
///
/// assert_eq!("2:4".parse(), Ok(Pattern::NofM { n: 2, m: 4 }));
/// assert_eq!(Pattern::Unstructured.to_string(), "unstructured");
/// assert_eq!(
///     "4:2".parse::<Pattern>().unwrap_err().to_string(),
///     "`4:2` keeps 4 of 2 weights: a pattern N:M needs 0 < N < M",
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Anywhere.
    Unstructured,
    /// Every tile of `m` consecutive inputs of a row keeps `n` of them, 0 < `n` < `m`.
    NofM {
        /// How many of a tile are kept.
        n: usize,
        /// How many inputs make a tile.
        m: usize,
    },
}

/// Why a text is not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParsePatternError {
    /// It is of neither form.
    #[error("`{0}` is not a pattern: expected `unstructured` or N:M, such as `2:4`")]
    Form(String),
    /// A part of N:M is no number, or one too large.
    #[error("`{part}` in the pattern `{pattern}` is not a whole number")]
    Number {
        /// The whole text.
        pattern: String,
        /// The part that is no number.
        part: String,
    },
    /// Not 0 < N < M.
    #[error("`{n}:{m}` keeps {n} of {m} weights: a pattern N:M needs 0 < N < M")]
    Range {
        /// N.
        n: usize,
        /// M.
        m: usize,
    },
}

impl JsonSchema for Pattern {
    fn schema_name() -> Cow<'static, str> {
        "Pattern".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "anyOf": [
                { "enum": ["unstructured", "2:4", "4:8"] },
                { "pattern": "^0*[1-9][0-9]*:0*[1-9][0-9]*$" }
            ]
        })
    }
}

impl FromStr for Pattern {
    type Err = ParsePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "unstructured" {
            return Ok(Self::Unstructured);
        }
        let (n, m) = text.split_once(':').ok_or_else(|| ParsePatternError::Form(text.into()))?;
        let number = |part: &str| {
            // `parse` would allow a sign.
            let digits = part.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten().ok_or_else(|| ParsePatternError::Number {
                pattern: text.into(),
                part: part.into(),
            })
        };
        let (n, m) = (number(n)?, number(m)?);
        if !(0 < n && n < m) {
            return Err(ParsePatternError::Range { n, m });
        }
        Ok(Self::NofM { n, m })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unstructured => f.write_str("unstructured"),
            Self::NofM { n, m } => write!(f, "{n}:{m}"),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = ParsePatternError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

/// A run of `m` consecutive inputs of a row, `n` of which are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub(super) n: usize,
    pub(super) m: usize,
}

impl Pattern {
    /// Whether rows of so many columns are whole tiles.
    pub fn divides(self, columns: usize) -> bool {
        match self {
            Self::Unstructured => true,
            Self::NofM { m, .. } => columns.checked_rem(m) == Some(0),
        }
    }

    /// The tile that divides the rows of matrix `name`, if the pattern has one. Tile `i` is the
    /// weights from `i * m` on.
    pub(super) fn tile(self, name: &str, columns: usize) -> Result<Option<Tile>, Error> {
        match self {
            Self::Unstructured => Ok(None),
            Self::NofM { n, m } if self.divides(columns) => Ok(Some(Tile { n, m })),
            Self::NofM { .. } => {
                Err(Error::Indivisible { name: name.into(), columns, pattern: self })
            }
        }
    }

    /// Whether `mask`, of matrix `name`, follows the pattern: no tile keeps more than it may.
    ///
    /// # Errors
    /// [`Error::Overfull`] for the first tile that does not, and [`Error::Indivisible`] if the
    /// rows are not whole tiles.
    pub fn check(self, name: &str, mask: &Mask) -> Result<(), Error> {
        let dims = mask.dims();
        let Some(Tile { n, m }) = self.tile(name, dims.columns)? else { return Ok(()) };
        for start in (0..dims.len()).step_by(m) {
            let kept = (start..start + m).filter(|&i| mask.get(i)).count();
            if kept > n {
                return Err(Error::Overfull {
                    name: name.into(),
                    row: start / dims.columns,
                    column: start % dims.columns,
                    kept,
                    pattern: self,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;

    use super::*;

    #[test]
    fn patterns_are_read_and_written_alike() {
        for (text, pattern) in [
            ("unstructured", Pattern::Unstructured),
            ("2:4", Pattern::NofM { n: 2, m: 4 }),
            ("1:32", Pattern::NofM { n: 1, m: 32 }),
        ] {
            assert_eq!(text.parse(), Ok(pattern));
            assert_eq!(pattern.to_string(), text);
            let json = serde_json::to_string(&pattern).expect("a string");
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Pattern>(&json).expect("a pattern"), pattern);
        }
    }

    #[test]
    fn what_is_wrong_with_a_pattern_is_said() {
        let form = |text: &str| ParsePatternError::Form(text.into());
        let number = |pattern: &str, part: &str| ParsePatternError::Number {
            pattern: pattern.into(),
            part: part.into(),
        };
        for (text, error) in [
            ("", form("")),
            ("Unstructured", form("Unstructured")),
            ("24", form("24")),
            (":", number(":", "")),
            ("2:x", number("2:x", "x")),
            ("+2:4", number("+2:4", "+2")),
            (" 2:4", number(" 2:4", " 2")),
            ("2:4:8", number("2:4:8", "4:8")),
            ("2:99999999999999999999", number("2:99999999999999999999", "99999999999999999999")),
            ("0:4", ParsePatternError::Range { n: 0, m: 4 }),
            ("4:4", ParsePatternError::Range { n: 4, m: 4 }),
            ("0:0", ParsePatternError::Range { n: 0, m: 0 }),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(error));
        }
    }

    #[test]
    fn an_overfull_tile_is_found() {
        let dims = Dims { rows: 2, columns: 8 };
        let pattern = Pattern::NofM { n: 2, m: 4 };
        let mut mask = Mask::from_fn(dims, |i| i % 4 < 2);
        assert_eq!(pattern.check("w", &mask), Ok(()));
        mask.set(15, true);
        let error = pattern.check("w", &mask).expect_err("three kept");
        assert_eq!(
            error.to_string(),
            "`w`: 3 weights are kept from row 1, column 4 on: 2:4 allows 2"
        );
        assert_eq!(Pattern::Unstructured.check("w", &mask), Ok(()));
    }

    #[test]
    fn rows_are_whole_tiles() {
        let mask = Mask::kept_nowhere(Dims { rows: 2, columns: 6 });
        let error = Pattern::NofM { n: 2, m: 4 }.check("w", &mask).expect_err("6 / 4");
        assert_eq!(error.to_string(), "`w`: its 6 columns are not whole tiles of the pattern 2:4");
        assert!(Pattern::NofM { n: 0, m: 0 }.check("w", &mask).is_err());
    }
}
