//! Differentiable operations of our own on dfdx's tape, where dfdx's are slow or missing.
//!
//! An operation is a trait with an implementation per device, so that everything above is generic;
//! [`Ops`] is their sum. Each file owns one operation: its mathematics, its kernel and its tests
//! against finite differences.

mod activation;
mod add;
mod attention;
mod blend;
mod cap;
mod column_squares;
mod columns;
#[cfg(test)]
mod composed;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod gated;
mod gemm;
mod linear;
mod matrix;
mod norm;
mod panels;
mod rope;
mod sparse_product;
mod squared_error;
mod sums;
mod transpose;

pub use crate::buffer::Buffer;

pub use self::{
    activation::Activate,
    add::Add,
    attention::{Attention, Heads, Sight},
    blend::Blend,
    cap::Cap,
    column_squares::ColumnSquares,
    columns::Columns,
    cross_entropy::CrossEntropy,
    gated::Gated,
    gemm::Products,
    linear::{InputGradient, Linear, Trace, Weight},
    matrix::{Hold, Matrix},
    norm::{Norm, Normalise},
    panels::Factor,
    rope::{Rotary, Rotation},
    sparse_product::{Entry, SparseProduct},
    squared_error::SquaredError,
    sums::Sums,
};
pub(crate) use self::{attention::scores, sums::gram_numbers};

/// A device that has every operation that a decoder layer needs.
pub trait Ops:
    Activate
    + Add
    + Attention
    + Blend
    + Cap
    + ColumnSquares
    + Columns
    + CrossEntropy
    + Gated
    + Linear
    + Normalise
    + Rotary
    + SparseProduct
    + SquaredError
    + Sums
{
}

impl<D> Ops for D where
    D: Activate
        + Add
        + Attention
        + Blend
        + Cap
        + ColumnSquares
        + Columns
        + CrossEntropy
        + Gated
        + Linear
        + Normalise
        + Rotary
        + SparseProduct
        + SquaredError
        + Sums
{
}

#[cfg(test)]
pub(super) mod testing;
