//! Differentiable operations of our own on dfdx's tape, where dfdx's are slow or missing.
//!
//! An operation is a trait with an implementation per device, so that everything above is generic;
//! [`Ops`] is their sum. Each file owns one operation: its mathematics, its kernel and its tests
//! against finite differences.

mod attention;
mod column_squares;
mod cpu;
mod cross_entropy;
mod gemm;
mod gram;
mod linear;
mod rms_norm;
mod rope;
mod squared_error;
mod swiglu;

use dfdx::{
    tensor::{NoneTape, Tensor},
    tensor_ops::Device,
};

pub use self::{
    attention::{Attention, Heads},
    column_squares::ColumnSquares,
    cross_entropy::CrossEntropy,
    gram::Gram,
    linear::{InputGradient, Linear, Weight},
    rms_norm::RmsNorm,
    rope::{Rotary, Rotation},
    squared_error::SquaredError,
    swiglu::SwiGlu,
};

/// A matrix on a device; the hidden states of a sample are one of [tokens, channels].
pub type Matrix<D, T = NoneTape> = Tensor<(usize, usize), f32, D, T>;

/// A device that has every operation that a decoder layer needs.
pub trait Ops:
    Device<f32>
    + Attention
    + ColumnSquares
    + CrossEntropy
    + Gram
    + Linear
    + RmsNorm
    + Rotary
    + SquaredError
    + SwiGlu
{
}

impl<D> Ops for D where
    D: Device<f32>
        + Attention
        + ColumnSquares
        + CrossEntropy
        + Gram
        + Linear
        + RmsNorm
        + Rotary
        + SquaredError
        + SwiGlu
{
}

#[cfg(test)]
mod testing;
