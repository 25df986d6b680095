//! Hugging Face checkpoint directories: a memory-mapped reader and an atomic writer.

mod compare;
mod cut;
mod digest;
mod error;
mod foreign;
mod layout;
mod links;
mod masks;
mod output;
mod owned;
mod partial;
mod place;
mod pruned;
mod quantised;
mod reader;
mod round;
mod transposed;
mod zeros;

pub use self::{
    compare::Difference,
    cut::{Axis, Cut, Cuts},
    digest::{digest, digest_text},
    error::Error,
    layout::{Format, Layout},
    masks::{Fit, MASKS, StoredMasks, mask_bytes},
    output::{Existing, Form, Output, Written, dense_config, left_behind},
    owned::{CARD, HTML, JSON, RECIPE},
    pruned::{Masks, Pruned, Saved},
    quantised::Quantisation,
    reader::{Mapped, Orders, Reader, TensorView, parse_header, parse_index, readable_config},
    zeros::Zeros,
};
pub(crate) use self::{
    links::check_inside,
    quantised::weight_dtype,
    reader::{sizes, unravel},
};
use crate::dtype::Dtype;
