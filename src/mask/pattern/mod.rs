//! Sparsity patterns: one file per kind, and a table of all.
//!
//! Code that prunes or rebuilds uses only a pattern's tiles, if it has tiles: runs of consecutive
//! inputs of a row, each of which keeps a fixed number of weights.

mod n_of_m;
mod unstructured;

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Error, Mask};

/// Every kind of pattern.
static ALL: [&Kind; 2] = [&unstructured::UNSTRUCTURED, &n_of_m::N_OF_M];

/// The numbers in a pattern's name, or the error in the name.
type Numbers = Result<[usize; 2], ParsePatternError>;

/// A kind of pattern.
struct Kind {
    /// Syntax of the name, for messages.
    form: &'static str,
    /// Description, to follow the syntax.
    help: &'static str,
    /// Patterns of the kind that editors propose.
    examples: &'static [&'static str],
    /// Regular expression of the kind's other names.
    regex: Option<&'static str>,
    /// Reads the numbers in a pattern's name; `None` if the text is not of this kind.
    read: fn(&str) -> Option<Numbers>,
    /// Writes the name with the numbers.
    write: fn([usize; 2], &mut fmt::Formatter<'_>) -> fmt::Result,
    /// The tile of rows with this number of columns, if the kind has tiles.
    tile: fn([usize; 2], usize) -> Option<Tile>,
    /// The fraction of pruned weights, if the pattern fixes it.
    ratio: fn([usize; 2]) -> Option<f64>,
}

/// A sparsity pattern: the allowed places of zeros in a weight matrix.
///
/// ```
/// use llm_barber::mask::Pattern;
///
/// assert_eq!("2:4".parse(), Ok(Pattern::n_of_m(2, 4)));
/// assert_eq!(Pattern::UNSTRUCTURED.to_string(), "unstructured");
/// assert_eq!(
///     "4:2".parse::<Pattern>().unwrap_err().to_string(),
///     "`4:2` keeps 4 of 2 weights: a pattern N:M needs 0 < N < M",
/// );
/// ```
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    kind: &'static Kind,
    /// The numbers in the name; zeros if there are none.
    numbers: [usize; 2],
}

/// Why a text is not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParsePatternError(String);

/// A run of `m` consecutive inputs of a row, `n` of which are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) n: usize,
    pub(crate) m: usize,
}

impl Pattern {
    /// Zeros anywhere.
    pub const UNSTRUCTURED: Self = Self { kind: &unstructured::UNSTRUCTURED, numbers: [0, 0] };

    /// Every tile of `m` consecutive inputs of a row keeps `n` of them, 0 < `n` < `m`.
    pub const fn n_of_m(n: usize, m: usize) -> Self {
        Self { kind: &n_of_m::N_OF_M, numbers: [n, m] }
    }

    /// A line of help: what the pattern decides, and all kinds.
    pub(crate) fn help_on(decides: &str) -> String {
        let each = ALL.map(|kind| format!("{}, {}", kind.form, kind.help));
        format!("{decides}: {}.", each.join("; "))
    }

    /// The fraction of pruned weights, if the pattern fixes it.
    pub fn ratio(self) -> Option<f64> {
        (self.kind.ratio)(self.numbers)
    }

    /// The tile of rows with this number of columns, if the pattern has tiles. Tile `i` is the
    /// weights from `i * m` on.
    pub(crate) fn tile(self, columns: usize) -> Option<Tile> {
        (self.kind.tile)(self.numbers, columns)
    }

    /// Whether the pattern's tiles divide this number of columns.
    pub fn divides(self, columns: usize) -> bool {
        self.tile(columns).is_none_or(|Tile { m, .. }| columns.checked_rem(m) == Some(0))
    }

    /// The tile of the pattern, if it has tiles, for matrix `name`.
    ///
    /// # Errors
    /// If the tile does not divide the columns.
    pub(super) fn tile_of(self, name: &str, columns: usize) -> Result<Option<Tile>, Error> {
        if self.divides(columns) {
            return Ok(self.tile(columns));
        }
        Err(Error::Indivisible { name: name.into(), columns, pattern: self })
    }

    /// Checks that the mask of matrix `name` follows the pattern: no tile keeps too many weights.
    ///
    /// # Errors
    /// [`Error::Overfull`] for the first tile that keeps too many weights, and
    /// [`Error::Indivisible`] if the tile does not divide the columns.
    pub fn check(self, name: &str, mask: &Mask) -> Result<(), Error> {
        let dims = mask.dims();
        let Some(Tile { n, m }) = self.tile_of(name, dims.columns)? else { return Ok(()) };
        for start in (0..dims.len()).step_by(m) {
            let kept = (start..start + m).filter(|&i| mask.get(i)).count();
            if kept > n {
                return Err(Error::Overfull {
                    name: name.into(),
                    row: start / dims.columns,
                    column: start % dims.columns,
                    kept,
                    allowed: n,
                    pattern: self,
                });
            }
        }
        Ok(())
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        (self.kind.form, self.numbers) == (other.kind.form, other.numbers)
    }
}

impl Eq for Pattern {}

impl JsonSchema for Pattern {
    fn schema_name() -> Cow<'static, str> {
        "Pattern".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut forms = vec![json!({ "enum": ALL.map(|kind| kind.examples).concat() })];
        forms.extend(ALL.iter().filter_map(|kind| Some(json!({ "pattern": kind.regex? }))));
        json_schema!({ "type": "string", "anyOf": Value::from(forms) })
    }
}

impl FromStr for Pattern {
    type Err = ParsePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        for kind in ALL {
            if let Some(numbers) = (kind.read)(text) {
                return Ok(Self { kind, numbers: numbers? });
            }
        }
        let forms = ALL.map(|kind| kind.form).join(" or ");
        Err(ParsePatternError(format!("`{text}` is not a pattern: expected {forms}")))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.kind.write)(self.numbers, f)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
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

#[cfg(test)]
mod tests {
    use barber_metric::Dims;

    use super::*;

    #[test]
    fn patterns_are_read_and_written_alike() {
        for (text, pattern) in [
            ("unstructured", Pattern::UNSTRUCTURED),
            ("2:4", Pattern::n_of_m(2, 4)),
            ("1:32", Pattern::n_of_m(1, 32)),
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
        let form = |text: &str| {
            format!("`{text}` is not a pattern: expected `unstructured` or N:M, such as `2:4`")
        };
        let number = |pattern: &str, part: &str| {
            format!("`{part}` in the pattern `{pattern}` is not a whole number")
        };
        let range = |n: usize, m: usize| {
            format!("`{n}:{m}` keeps {n} of {m} weights: a pattern N:M needs 0 < N < M")
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
            ("0:4", range(0, 4)),
            ("4:4", range(4, 4)),
            ("0:0", range(0, 0)),
        ] {
            assert_eq!(text.parse::<Pattern>().expect_err("no pattern").to_string(), error);
        }
    }

    #[test]
    fn an_overfull_tile_is_found() {
        let dims = Dims { rows: 2, columns: 8 };
        let pattern = Pattern::n_of_m(2, 4);
        let mut mask = Mask::from_fn(dims, |i| i % 4 < 2);
        assert_eq!(pattern.check("w", &mask), Ok(()));
        mask.set(15, true);
        let error = pattern.check("w", &mask).expect_err("three kept");
        assert_eq!(
            error.to_string(),
            "`w`: the tile at row 1, column 4 keeps 3 weights, 2:4 allows 2"
        );
        assert_eq!(Pattern::UNSTRUCTURED.check("w", &mask), Ok(()));
    }

    #[test]
    fn rows_are_whole_tiles() {
        let mask = Mask::kept_nowhere(Dims { rows: 2, columns: 6 });
        let error = Pattern::n_of_m(2, 4).check("w", &mask).expect_err("6 / 4");
        assert_eq!(error.to_string(), "`w`: the pattern 2:4 does not divide its 6 columns");
        assert!(Pattern::n_of_m(0, 0).check("w", &mask).is_err());
    }
}
