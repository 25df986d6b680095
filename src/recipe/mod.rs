//! Recipes: from TOML text to a resolved [`Recipe`], with diagnostics that show the line.

mod advice;
pub(crate) mod describe;
mod device;
mod diagnose;
mod error;
mod extends;
mod keys;
mod layers;
mod loaded;
mod metric_step;
mod permute;
mod pipeline;
mod preset;
mod prompts;
#[cfg(test)]
mod properties;
mod refine;
mod resolve;
mod rules;
mod schema;
mod sections;
mod settings;
mod structure;
mod study;
mod sweep;
mod text;

pub use self::{
    device::Device,
    error::{Fault, Problem, RecipeError},
    keys::{Key, keys},
    loaded::Loaded,
    metric_step::MetricStep,
    prompts::Prompts,
    resolve::{load, load_runs, load_text, misspelt_settings},
    rules::Rules,
    schema::schema,
    sections::{
        Allocate, BlockGroup, Calibration, Evaluate, Executor, Mask, Model, Output, Override,
        Recipe, Sparsity, Streams,
    },
    settings::Setting,
    study::{Study, Variant, load_study},
    sweep::Point,
};
use crate::{
    calibration::{Selection, Text},
    checkpoint::Format,
    dtype::Dtype,
    mask::{Init, Pattern, Scope},
    prune::Refine,
};
