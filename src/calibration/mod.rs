//! Text to batches of tokens: the calibration samples and the segments of an evaluation.

mod bounded;
mod document;
mod error;
mod extent;
mod pieces;
mod places;
mod source;
mod tokens;

pub use self::{
    document::Text,
    error::Error,
    extent::Extent,
    source::{Samples, Selection, extent, samples, segments},
    tokens::Tokens,
};
