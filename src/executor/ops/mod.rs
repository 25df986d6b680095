//! Differentiable operations of our own on dfdx's tape, where dfdx's are slow or missing.
//!
//! An operation is a trait. A device implements its pure functions: the output from the inputs, and
//! the gradients of the inputs from that of the output. The code for the tape is written once for
//! all devices. A folder has one operation: in `mod.rs` its mathematics, the CPU's kernels and
//! their tests against finite differences or literals; in `cuda.rs` the GPU's kernels, which tests
//! compare with the CPU's.
//!
//! All functions that return a `Result` fail if the device lacks memory or is lost.

#![allow(clippy::missing_errors_doc, reason = "all fail for the reason above")]

mod activation;
mod add;
mod attention;
mod blend;
mod cap;
mod column_squares;
mod columns;
mod cpu;
mod cross_entropy;
mod divergence;
mod gated;
mod gemm;
#[cfg(feature = "cuda")]
pub(super) mod gpu;
mod linear;
mod matrix;
mod norm;
mod panels;
#[cfg(any(feature = "cuda", test))]
mod place;
mod rope;
mod route;
mod rows;
mod sparse_product;
mod squared_error;
mod sums;
mod tape;
mod transpose;

pub use dfdx::tensor::Tape;

#[cfg(feature = "cuda")]
pub use self::gpu::source as kernel_source;
pub use crate::buffer::Buffer;

pub(crate) use self::{attention::scores, sums::gram_numbers};
pub use self::{
    attention::{AttentionMask, Heads},
    gemm::Products,
    linear::{InputGradient, Trace, Values, Weight},
    matrix::{Computed, Hold, Matrix, Name},
    norm::Norm,
    panels::Factor,
    rope::Rotation,
    route::{Route, Weighted, gate, route},
    sparse_product::Entry,
    tape::{Traced, TracedLoss, gradient, seeded, traced},
    transpose::transpose,
};

/// Declares the modules of all operations, the trait that sums them up, and the list of CUDA
/// kernels.
macro_rules! operations {
    ($($module:ident::$operation:ident),* $(,)?) => {
        $(pub use self::$module::$operation;)*

        /// A device that has every operation that a decoder layer needs.
        pub trait Ops: $($operation +)* {}

        impl<D: $($operation +)*> Ops for D {}

        #[cfg(feature = "cuda")]
        const KERNELS: &[gpu::Kernels] = &[gpu::HALVES, matrix::cuda::KERNELS, $($module::cuda::KERNELS),*];
    };
}

operations! {
    activation::Activate,
    add::Add,
    attention::Attention,
    blend::Blend,
    cap::Cap,
    column_squares::ColumnSquares,
    columns::Columns,
    cross_entropy::CrossEntropy,
    divergence::Divergence,
    gated::Gated,
    linear::Linear,
    norm::Normalise,
    rope::Rotary,
    rows::Rows,
    sparse_product::SparseProduct,
    squared_error::SquaredError,
    sums::Sums,
}

#[cfg(test)]
pub(super) mod testing;
