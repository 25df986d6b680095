//! Decoder layers on dfdx, generic over the device; gradients come from its tape.
//!
//! The executor knows no files and no recipes: it is given values and gives back hidden states,
//! losses and statistics.

mod forward;
mod inputs;
mod measure;
pub mod ops;

use std::sync::Arc;

use dfdx::tensor::{NoneTape, Tensor};

use self::ops::{Heads, Matrix, Ops, Rotation};
pub use self::{
    forward::{PartWeights, Seen, forward},
    measure::{Measured, Statistics, inputs, loss, measure, outputs},
};
use crate::family::Decoder;

/// The hidden states of a sample between two layers, [tokens, channels], with their positions.
#[derive(Clone, Debug)]
pub struct Hidden<D: Ops> {
    /// The states.
    pub states: Matrix<D>,
    /// The position code of this many tokens.
    pub positions: Positions,
}

/// What attention knows of a sequence: its length and the angles of its positions.
#[derive(Clone, Debug)]
pub struct Positions {
    heads: Heads,
    rotation: Rotation,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let (cos, sin) = decoder.rope.tables(length);
        Self {
            heads: Heads {
                queries: decoder.heads,
                keys: decoder.kv_heads,
                width: decoder.head_dim,
                sequence_length: length,
            },
            rotation: Rotation {
                cos: Arc::new(cos),
                sin: Arc::new(sin),
                half: decoder.head_dim / 2,
            },
        }
    }
}

/// A vector on a device, such as the weight of a norm.
pub type Vector<D> = Tensor<(usize,), f32, D, NoneTape>;
