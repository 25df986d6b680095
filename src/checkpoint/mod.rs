//! Hugging Face checkpoint directories: a memory-mapped reader and an atomic writer.

mod digest;
mod dtype;
mod error;
mod output;
mod pruned;
mod reader;

pub use self::{
    digest::{digest, digest_text},
    dtype::Dtype,
    error::Error,
    output::Output,
    pruned::{Masks, Pruned, Saved},
    reader::{Reader, TensorView, parse_header},
};
