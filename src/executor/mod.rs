//! Runs decoder layers on dfdx, generic over the device; dfdx's tape gives gradients.
//!
//! The executor knows neither files nor recipes. It takes weights and hidden states, and returns
//! hidden states, losses and statistics.

mod activation_cache;
mod backward;
mod cost;
mod device;
mod finite;
mod forward;
mod history;
mod loss;
pub mod ops;
mod pass;
mod positions;
mod probe;
mod rate;
mod store;
mod stream;
mod structures;

use std::fmt;

use crate::ranks::Ranks;

#[cfg(feature = "cuda")]
pub use self::device::cuda;
pub use self::{
    activation_cache::{ActivationCache, Caching, Changes, Recorded},
    backward::Traces,
    cost::{CacheShape, HELD_EXPERTS, PartShape, PassShape, Rows, Tokens},
    device::available_memory,
    forward::{AttentionWeights, Inner, PartWeights, Router, forward},
    history::History,
    loss::Loss,
    pass::{Beside, Found, Outputs, Pass, Targets},
    positions::{Positions, Tree},
    probe::{FEWEST_ROWS, Probe, Statistics},
    rate::rate,
    store::{Scratch, Spill, Storage, Store},
    stream::{BATCH, Side, Stream},
    structures::StructureStatistics,
};

pub(crate) use self::loss::{or_nan, some_or_nan};

/// Why the executor failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The device failed.
    #[error("{0}")]
    Device(String),
    /// The scratch space failed.
    #[error("{0}")]
    Scratch(String),
    /// An activation is NaN or infinite.
    #[error(
        "the {what} of `{tensor}` is {value} on sample {sample}, at token {token}, channel \
         {channel}: the checkpoint is damaged, or its activations overflow f32"
    )]
    Activation {
        /// `input` or `output`.
        what: &'static str,
        /// Tensor name of the layer's weight.
        tensor: String,
        /// Index of the sample.
        sample: usize,
        /// Index of the token in the sample.
        token: usize,
        /// Index of the channel.
        channel: usize,
        /// Value of the activation.
        value: f32,
    },
    /// A hidden state is too large for its storage format.
    #[error("a hidden state is {value}, too large for {dtype}")]
    Overflow {
        /// Value of the hidden state.
        value: f32,
        /// Name of the format.
        dtype: &'static str,
    },
}

impl Error {
    /// An error of the device.
    pub(crate) fn device(problem: impl fmt::Display) -> Self {
        Self::Device(problem.to_string())
    }
}

/// Runs decoder layers on a device, and stores hidden states between layers.
#[derive(Clone, Debug)]
pub struct Executor<D> {
    /// The device.
    pub device: D,
    /// The storage of hidden states.
    pub storage: Storage,
    /// The ranks that share the samples.
    pub ranks: Ranks,
}

impl<D> From<D> for Executor<D> {
    fn from(device: D) -> Self {
        Self { device, storage: Storage::default(), ranks: Ranks::ONE }
    }
}
