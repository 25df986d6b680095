//! Recipes: TOML text to a resolved [`Recipe`], by way of figment's layers, with diagnostics that
//! show the line. Knows no tensors.

mod error;
mod exclude;
mod keys;
mod layers;
mod pipeline;
mod resolve;
mod sections;
mod stage;
mod text;

pub use self::{
    error::{Fault, Problem, RecipeError},
    exclude::Exclude,
    keys::{Key, keys},
    resolve::{Loaded, load, load_text},
    sections::{BlockGroup, Calibration, Evaluate, Mask, Model, Output, Rebuild, Recipe, Sparsity},
    stage::Stage,
};
use crate::{
    calibration::Selection,
    checkpoint::Dtype,
    mask::{Init, Pattern, Scope},
};
