//! Recipes: TOML text to a resolved [`Recipe`], by way of figment's layers, with diagnostics that
//! show the line. Knows no tensors.

pub(crate) mod describe;
mod error;
mod keys;
mod layers;
mod pipeline;
mod preset;
mod refine;
mod resolve;
mod rules;
mod sections;
mod settings;
mod stage;
mod study;
mod text;

pub use self::{
    error::{Fault, Problem, RecipeError},
    keys::{Key, keys},
    refine::{Kind, Refine, Rounds, Share, Values},
    resolve::{Loaded, load, load_text},
    rules::Rules,
    sections::{
        Allocate, BlockGroup, Calibration, Evaluate, Mask, Model, Output, Override, Recipe,
        Sparsity, Streams,
    },
    settings::Setting,
    stage::Stage,
    study::{Study, Variant, load_study},
};
use crate::{
    calibration::{Selection, Text},
    checkpoint::{Dtype, Format},
    mask::{Init, Pattern, Scope},
};
