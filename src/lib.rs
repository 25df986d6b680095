//! Barber prunes large language models from a declarative recipe.
//!
//! ```
//! use llm_barber::{recipe::load, run};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let dir = tempfile::tempdir()?;
//!     let output = format!("output.path={}", dir.path().join("sparse").display());
//!     let recipe = load("recipes/quickstart.toml".as_ref(), &[output])?;
//!     let report = run::prune(&recipe, &run::Settings::default())?;
//!     assert_eq!(report.pruned_weights, report.prunable_weights / 2);
//!     println!("{:?}", report.perplexity);
//!     Ok(())
//! }
//! ```
//!
//! [`run::prune`] does the same as the command `barber prune`, without printing.
//!
//! Data flows one way through the modules: [`recipe`] resolves the text of a recipe,
//! [`calibration`] turns texts into tokens, the [`executor`] runs one decoder layer of a [`family`]
//! at a time with the [`checkpoint`]'s weights and computes statistics, the metric pipeline turns
//! these into scores, [`mask`] turns scores into masks, and the checkpoint is written with the
//! masks applied. [`prune`] is the loop over layers, [`run`] is the whole run, [`report`] describes
//! its results, and [`cli`] prints them.

#![cfg_attr(
    not(feature = "cli"),
    allow(dead_code, unused_imports, reason = "some of it serves the command line alone")
)]

mod buffer;
pub mod calibration;
mod catch_panic;
pub mod checkpoint;
pub mod choice;
#[cfg(feature = "cli")]
pub mod cli;
pub mod dtype;
mod encoding;
pub mod estimate;
pub mod evaluate;
pub mod executor;
pub mod family;
mod files;
pub mod hub;
pub mod journal;
mod limits;
pub mod mask;
pub mod model;
mod nearest;
pub mod permutation;
pub mod plan;
mod plugins;
pub mod precision;
pub mod progress;
pub mod prune;
pub use barber_metric::random;
pub mod ranks;
pub mod recipe;
pub mod records;
pub mod report;
pub mod run;
mod simd;
pub mod structure;
pub mod version;

/// The Rust of the pages, as doctests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../book/src/library.md")]
    struct Library;
    #[doc = include_str!("../book/src/metrics.md")]
    struct Metrics;
}
