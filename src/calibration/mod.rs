//! Turns texts into token ids: calibration samples, and segments of an evaluation.

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
