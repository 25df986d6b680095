//! Decoder layers on dfdx, generic over the device; gradients come from its tape.
//!
//! The executor knows no files and no recipes: it is given values and gives back hidden states,
//! losses and statistics.

mod activation_cache;
mod backward;
mod cost;
mod device;
mod finite;
mod forward;
mod loss;
pub mod ops;
mod pass;
mod positions;
mod probe;
mod rate;
mod store;
mod stream;

use std::fmt;

#[cfg(feature = "cuda")]
pub use self::device::cuda;
pub use self::{
    activation_cache::{ActivationCache, Caching, Changes, Recorded},
    backward::Traces,
    cost::{CacheShape, PartShape, PassShape, Rows, Tokens},
    device::available_memory,
    forward::{Inner, PartWeights, forward},
    loss::Loss,
    pass::{Beside, Found, Outputs, Pass, Targets},
    positions::{Positions, Tree},
    probe::{Probe, Statistics},
    rate::rate,
    store::{Scratch, Spill, Storage, Store},
    stream::{BATCH, Side, Stream},
};

pub(crate) use self::loss::{or_nan, some_or_nan};

/// Why the executor failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The device failed.
    #[error("{0}")]
    Device(String),
    /// The scratch space of what does not fit into memory failed.
    #[error("{0}")]
    Scratch(String),
    /// An activation is NaN or infinite.
    #[error(
        "the {what} of `{tensor}` is {value} on sample {sample}, at token {token}, channel \
         {channel}: the checkpoint is damaged, or its activations overflow f32"
    )]
    Activation {
        /// Input or output.
        what: &'static str,
        /// Of which weight.
        tensor: String,
        /// The sample, from 0 on.
        sample: usize,
        /// The row, from 0 on.
        token: usize,
        /// The column, from 0 on.
        channel: usize,
        /// The activation.
        value: f32,
    },
    /// A hidden state does not fit the format in which it is to be stored.
    #[error("a hidden state is {value}, too large for {dtype}")]
    Overflow {
        /// The state.
        value: f32,
        /// The format.
        dtype: &'static str,
    },
}

impl Error {
    /// A device's own error.
    pub(crate) fn device(problem: impl fmt::Display) -> Self {
        Self::Device(problem.to_string())
    }
}

/// What runs decoder layers: a device, and where samples wait between two layers.
#[derive(Clone, Debug)]
pub struct Executor<D> {
    /// The device.
    pub device: D,
    /// Where samples wait.
    pub storage: Storage,
}

impl<D> From<D> for Executor<D> {
    fn from(device: D) -> Self {
        Self { device, storage: Storage::default() }
    }
}
