//! The errors of masks.

use super::{Pattern, Scope};
use crate::simd::first;

/// Why a mask could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The sparsity ratio is not within 0 and 1.
    #[error("the sparsity ratio must be from 0 to 1, got {ratio}")]
    Ratio {
        /// The ratio.
        ratio: f64,
    },
    /// The rebuild's α is not within 0 and 1.
    #[error("alpha must be from 0 to 1, got {alpha}")]
    Alpha {
        /// α.
        alpha: f64,
    },
    /// Swaps do not support the scope.
    #[error("swaps are within a `row` or a `layer`, not a `{scope}`")]
    SwapScope {
        /// The scope.
        scope: Scope,
    },
    /// Initial masks do not support the scope.
    #[error("scores of an initial mask compete in a `row` or a `layer`, not in a `{scope}`")]
    InitialScope {
        /// The scope.
        scope: Scope,
    },
    /// A slice does not have the length that its matrix needs.
    #[error("`{name}`: {found} {what}, but the matrix needs {expected}")]
    Length {
        /// Name of the matrix.
        name: String,
        /// What the slice holds.
        what: &'static str,
        /// The slice's length.
        found: usize,
        /// The length that the matrix needs.
        expected: usize,
    },
    /// A statistic was not computed.
    #[error("`{name}`: the initial mask needs `{statistic}`, which was not computed")]
    Missing {
        /// Name of the matrix.
        name: String,
        /// Name of the statistic.
        statistic: &'static str,
    },
    /// The pattern does not divide the matrix's columns.
    #[error("`{name}`: the pattern {pattern} does not divide its {columns} columns")]
    Indivisible {
        /// Name of the matrix.
        name: String,
        /// Number of columns.
        columns: usize,
        /// The pattern.
        pattern: Pattern,
    },
    /// A tile keeps more weights than the pattern allows.
    #[error(
        "`{name}`: the tile at row {row}, column {column} keeps {kept} weights, {pattern} allows \
         {allowed}"
    )]
    Overfull {
        /// Name of the matrix.
        name: String,
        /// The tile's row.
        row: usize,
        /// The tile's first column.
        column: usize,
        /// Number of weights that the tile keeps.
        kept: usize,
        /// Number of weights that the pattern allows.
        allowed: usize,
        /// The pattern.
        pattern: Pattern,
    },
    /// A score is NaN, so its weight cannot be ranked.
    #[error("`{name}`: the score at row {row}, column {column} is not a number")]
    NotANumber {
        /// The matrix.
        name: String,
        /// The weight's row.
        row: usize,
        /// The weight's column.
        column: usize,
    },
    /// A Hessian has no Cholesky factor.
    #[error(
        "`{name}`: the Hessian of its calibration inputs is not positive definite, even with a \
         damping of {damping} of its mean diagonal; the activations overflow or are not numbers"
    )]
    NotPositiveDefinite {
        /// The matrix.
        name: String,
        /// The damping, as a fraction of the mean diagonal.
        damping: f64,
    },
    /// A weight that was changed to compensate for pruned ones overflowed.
    #[error("`{name}`: the changed weight at row {row}, column {column} is {value}")]
    NotFinite {
        /// The matrix.
        name: String,
        /// The weight's row.
        row: usize,
        /// The weight's column.
        column: usize,
        /// The weight's new value.
        value: f32,
    },
}

impl Error {
    pub(super) fn check_length(
        name: &str,
        what: &'static str,
        found: usize,
        expected: usize,
    ) -> Result<(), Self> {
        if found == expected {
            return Ok(());
        }
        Err(Self::Length { name: name.into(), what, found, expected })
    }

    /// Checks that no score of matrix `name` is NaN.
    pub(crate) fn check_numbers(name: &str, columns: usize, scores: &[f32]) -> Result<(), Self> {
        match first(scores, f32::is_nan) {
            None => Ok(()),
            Some(i) => {
                Err(Self::NotANumber { name: name.into(), row: i / columns, column: i % columns })
            }
        }
    }
}
