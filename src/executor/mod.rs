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

use self::ops::{Matrix, Ops, Rotation};
pub use self::{
    forward::{Inner, PartWeights, Seen, forward},
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

/// What attention knows of a sequence: its length, and the angles of its positions.
#[derive(Clone, Debug)]
pub struct Positions {
    length: usize,
    rotation: Option<Rotation>,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let rotation = decoder.rope.as_ref().map(|rope| {
            let (cos, sin) = rope.tables(length);
            Rotation { cos: Arc::new(cos), sin: Arc::new(sin), half: rope.head_dim / 2 }
        });
        Self { length, rotation }
    }
}

/// A vector on a device, such as the weight of a norm.
pub type Vector<D> = Tensor<(usize,), f32, D, NoneTape>;
