//! Every way in which a mask cannot be made.

use super::{Pattern, Scope};
use crate::simd::first;

/// Why a mask could not be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The sparsity ratio is no share.
    #[error("the sparsity ratio must be from 0 to 1, got {ratio}")]
    Ratio {
        /// It.
        ratio: f64,
    },
    /// The rebuild's α is no share.
    #[error("alpha must be from 0 to 1, got {alpha}")]
    Alpha {
        /// It.
        alpha: f64,
    },
    /// Swaps do not know the scope.
    #[error("swaps are within a `row` or a `layer`, not a `{scope}`")]
    SwapScope {
        /// It.
        scope: Scope,
    },
    /// Initial masks do not know the scope.
    #[error("scores of an initial mask compete in a `row` or a `layer`, not in a `{scope}`")]
    InitialScope {
        /// It.
        scope: Scope,
    },
    /// A slice does not fit its matrix.
    #[error("`{name}`: {found} {what}, but the matrix needs {expected}")]
    Length {
        /// The matrix.
        name: String,
        /// What the slice holds.
        what: &'static str,
        /// The slice's length.
        found: usize,
        /// The length that fits.
        expected: usize,
    },
    /// A statistic was not computed.
    #[error("`{name}`: the initial mask needs `{statistic}`, which was not computed")]
    Missing {
        /// The matrix.
        name: String,
        /// The statistic.
        statistic: &'static str,
    },
    /// The pattern's tiles do not divide the rows.
    #[error("`{name}`: the pattern {pattern} does not divide its {columns} columns")]
    Indivisible {
        /// The matrix.
        name: String,
        /// Its number of columns.
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
        /// The matrix.
        name: String,
        /// The tile's row.
        row: usize,
        /// The tile's first column.
        column: usize,
        /// How many weights it keeps.
        kept: usize,
        /// How many it may keep.
        allowed: usize,
        /// The pattern.
        pattern: Pattern,
    },
    /// A score is not a number: nothing can be said about its weight.
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
    /// Making up for pruned weights went beyond what a number can hold.
    #[error("`{name}`: the changed weight at row {row}, column {column} is {value}")]
    NotFinite {
        /// The matrix.
        name: String,
        /// The weight's row.
        row: usize,
        /// The weight's column.
        column: usize,
        /// It.
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

    /// That no score of matrix `name` is NaN.
    pub(super) fn check_numbers(name: &str, columns: usize, scores: &[f32]) -> Result<(), Self> {
        match first(scores, f32::is_nan) {
            None => Ok(()),
            Some(i) => {
                Err(Self::NotANumber { name: name.into(), row: i / columns, column: i % columns })
            }
        }
    }
}
