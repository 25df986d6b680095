//! Differentiable operations of our own on dfdx's tape, where dfdx's are slow or missing.
//!
//! An operation is a trait with an implementation per device, so that everything above is generic;
//! [`Ops`] is their sum. Each file owns one operation: its mathematics, its kernel and its tests
//! against finite differences.

mod activation;
mod attention;
mod column_squares;
mod columns;
mod cpu;
mod cross_entropy;
mod gated;
mod gemm;
mod gram;
mod linear;
mod norm;
mod rope;
mod squared_error;

use dfdx::{
    tensor::{NoneTape, Tensor},
    tensor_ops::Device,
};

pub use self::{
    activation::{Activate, Activation},
    attention::{Attention, Heads, Sight},
    column_squares::ColumnSquares,
    columns::Columns,
    cross_entropy::CrossEntropy,
    gated::Gated,
    gram::Gram,
    linear::{InputGradient, Linear, Weight},
    norm::{Norm, Normalise},
    rope::{Rotary, Rotation},
    squared_error::SquaredError,
};

/// A matrix on a device; the hidden states of a sample are one of [tokens, channels].
pub type Matrix<D, T = NoneTape> = Tensor<(usize, usize), f32, D, T>;

/// A device that has every operation that a decoder layer needs.
pub trait Ops:
    Device<f32>
    + Activate
    + Attention
    + ColumnSquares
    + Columns
    + CrossEntropy
    + Gated
    + Gram
    + Linear
    + Normalise
    + Rotary
    + SquaredError
{
}

impl<D> Ops for D where
    D: Device<f32>
        + Activate
        + Attention
        + ColumnSquares
        + Columns
        + CrossEntropy
        + Gated
        + Gram
        + Linear
        + Normalise
        + Rotary
        + SquaredError
{
}

#[cfg(test)]
mod testing;
