//! Why a run failed.

use std::path::PathBuf;

use crate::{calibration, checkpoint, evaluate, hub, model, plan, prune, recipe, records};

/// Why a run failed. A recipe's problems are all there, with their lines.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] recipe::RecipeError),
    /// The dense checkpoint cannot be read, or the pruned one not written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The model cannot be had from the hub.
    #[error(transparent)]
    Hub(#[from] hub::Error),
    /// A text does not give the samples that are asked for.
    #[error(transparent)]
    Calibration(#[from] calibration::Error),
    /// The model cannot be run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The recipe's blocks or rules do not fit the model.
    #[error(transparent)]
    Plan(#[from] plan::Error),
    /// A mask cannot be made.
    #[error(transparent)]
    Prune(#[from] prune::Error),
    /// A task's file cannot be read.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// A task's questions cannot be answered.
    #[error(transparent)]
    Accuracy(#[from] evaluate::Error),
    /// The device cannot be used; what is missing.
    #[error("{0}")]
    #[cfg(feature = "cuda")]
    Device(String),
    /// This build has no CUDA.
    #[error(
        "executor.device is a GPU, but this barber was built without CUDA; build it with \
         `cargo build --release --features cuda`, or set executor.device to \"cpu\""
    )]
    #[cfg(not(feature = "cuda"))]
    NoCuda,
    /// The recipe allows less memory than the run needs.
    #[error(
        "executor.memory is too little: a layer of this model needs about {needed} at a time; \
         raise it, or lower calibration.sequence_length"
    )]
    Memory {
        /// What it needs.
        needed: bytesize::ByteSize,
    },
    /// A task's file has no questions.
    #[error("{}: no questions", .0.display())]
    NoQuestions(PathBuf),
    /// A file of the checkpoints cannot be looked at.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The report or the resolved recipe cannot be written.
    #[error("the report cannot be written: {0}")]
    Report(String),
}

impl Error {
    /// Whether the fault is in what the user wrote, and not in what happened.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Recipe(_) | Self::Plan(_) | Self::Memory { .. } => true,
            #[cfg(not(feature = "cuda"))]
            Self::NoCuda => true,
            _ => false,
        }
    }
}
