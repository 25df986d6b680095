//! Barber prunes large language models from a declarative recipe.
//!
//! Data flows one way, and the modules follow it: the text of a recipe becomes a resolved
//! [`recipe`], [`calibration`] turns its text into token batches, the [`executor`] runs one decoder
//! layer of a [`family`] at a time over the [`checkpoint`]'s weights and gathers statistics, the
//! metric pipeline turns those into scores, [`mask`] turns scores into masks, and the checkpoint is
//! written again with the masks applied. [`prune`] is that loop, [`report`] what it did; [`cli`] prints
//! it.

mod buffer;
pub mod calibration;
pub mod checkpoint;
pub mod cli;
pub mod estimate;
pub mod evaluate;
pub mod executor;
pub mod family;
mod find;
pub mod hub;
pub mod mask;
pub mod model;
mod number;
pub mod plan;
mod plugins;
pub mod prune;
pub mod random;
pub mod recipe;
pub mod records;
pub mod report;
