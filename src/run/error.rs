//! Why a run failed.

use std::path::PathBuf;

use crate::{
    calibration,
    checkpoint::{self, Output},
    evaluate, executor, hub, journal, model, permutation, plan, prune, recipe, records, report,
};

/// Why a run failed. For a recipe, all problems with their lines.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] recipe::RecipeError),
    /// The dense checkpoint cannot be read, or the pruned one cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The model cannot be fetched from the hub.
    #[error(transparent)]
    Hub(#[from] hub::Error),
    /// A text cannot be read, or has too little for the samples.
    #[error(transparent)]
    Calibration(#[from] calibration::Error),
    /// The model cannot be run.
    #[error(transparent)]
    Model(model::Error),
    /// The recipe's blocks or rules do not fit the model.
    #[error(transparent)]
    Plan(#[from] plan::Error),
    /// The saved permutations are not the model's.
    #[error(transparent)]
    Permutation(#[from] permutation::Error),
    /// The model cannot be pruned.
    #[error(transparent)]
    Prune(prune::Error),
    /// A hidden state does not fit into `executor.stream_dtype`.
    #[error("{0}; set executor.stream_dtype to \"bf16\" or \"f32\"")]
    Overflow(model::Error),
    /// A task's file cannot be read.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// A task's questions cannot be answered.
    #[error(transparent)]
    Accuracy(#[from] evaluate::Error),
    /// The device cannot be used, for the given reason.
    #[error("{0}; without a driver, or without a GPU, set executor.device to \"cpu\"")]
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
        /// Bytes that the run needs.
        needed: bytesize::ByteSize,
    },
    /// `model.path` and `model.dense` are not the same model.
    #[error(
        "{} is not the dense model of {}: {problem}; correct model.path or model.dense",
        dense.display(),
        sparse.display()
    )]
    Unlike {
        /// Path of the sparse checkpoint.
        sparse: PathBuf,
        /// Path of the dense checkpoint.
        dense: PathBuf,
        /// The difference.
        problem: String,
    },
    /// The sparse checkpoint has its channels in another order.
    #[error(
        "{} was made with `sparsity.permute`, so its zeros do not fit the channels of {}; leave out \
         model.dense",
        sparse.display(),
        dense.display()
    )]
    Permuted {
        /// Path of the sparse checkpoint.
        sparse: PathBuf,
        /// Path of the dense checkpoint.
        dense: PathBuf,
    },
    /// The sparse checkpoint, whose masks are to be refined, prunes nothing.
    #[error(
        "{sparse} has no zeros beyond those of {dense} in the matrices that the recipe prunes: there \
         is no mask to refine; name a sparse checkpoint as model.path, or choose another mask.init"
    )]
    NoZeros {
        /// Name of the sparse checkpoint.
        sparse: String,
        /// Name of the dense checkpoint.
        dense: String,
    },
    /// A task's file has no questions.
    #[error("{}: no questions", .0.display())]
    NoQuestions(PathBuf),
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The state of the run cannot be saved, or is that of another run.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The run was interrupted and can be resumed from its last save.
    #[error(
        "{error}\n{} holds the run as of its last save ({label}): run again with --resume to go on \
         from there",
        dir.display()
    )]
    CutOff {
        /// The error that interrupted the run.
        error: Box<Error>,
        /// Directory of the saved state.
        dir: PathBuf,
        /// The saved place, in words.
        label: String,
    },
    /// Another rank failed.
    #[error("rank {rank}: {problem}")]
    OfRank {
        /// The rank.
        rank: usize,
        /// Its error.
        problem: String,
        /// Whether the recipe or the command line is at fault.
        is_usage: bool,
    },
    /// This rank does not do the run of the first one.
    #[error(
        "it does not do the same run as rank 0: {}; give all ranks one recipe, and the same program, \
         files and processors",
        .0.join("; ")
    )]
    OtherThanFirst(Vec<String>),
    /// A report cannot be read.
    #[error(transparent)]
    NoReport(report::Error),
    /// A directory is not one that a run wrote.
    #[error("{}: {problem}; give a directory that a run of `barber prune` wrote", path.display())]
    NoResult {
        /// Path of the missing or wrong file.
        path: PathBuf,
        /// What is wrong with the file.
        problem: String,
    },
    /// A file of a result has changed.
    #[error(
        "{} is missing or changed since the run wrote it; `barber verify` lists all differences",
        .0.display()
    )]
    NotAsWritten(PathBuf),
    /// A checkpoint is dense already.
    #[error("{} has no compressed or quantised matrices: it is dense already", .0.display())]
    NotCompressed(PathBuf),
    /// The report or the resolved recipe cannot be written.
    #[error("the report cannot be written: {0}")]
    Report(String),
}

impl From<model::Error> for Error {
    fn from(error: model::Error) -> Self {
        match error {
            model::Error::Executor { problem: executor::Error::Overflow { .. }, .. } => {
                Self::Overflow(error)
            }
            error => Self::Model(error),
        }
    }
}

impl From<prune::Error> for Error {
    fn from(error: prune::Error) -> Self {
        match error {
            prune::Error::Model(model) => match model.into() {
                Self::Model(model) => Self::Prune(model.into()),
                overflow => overflow,
            },
            error => Self::Prune(error),
        }
    }
}

impl Error {
    /// Whether the recipe or the command line is at fault: exit status 2, not 1.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Recipe(_) | Self::Plan(_) | Self::Memory { .. } => true,
            Self::Model(model::Error::TooLong { .. }) => true,
            Self::Unlike { .. } | Self::NoZeros { .. } => true,
            #[cfg(not(feature = "cuda"))]
            Self::NoCuda => true,
            Self::OfRank { is_usage, .. } => *is_usage,
            Self::OtherThanFirst(_) => true,
            Self::CutOff { error, .. } => error.is_usage(),
            _ => false,
        }
    }

    /// The error with the saved state that the run left at `output`, if it left one.
    pub(super) fn leaves(self, output: &Output) -> Self {
        match output.left_over() {
            Ok(Some(label)) => {
                let dir = output.scratch().to_owned();
                Self::CutOff { error: Box::new(self), dir, label }
            }
            _ => self,
        }
    }
}
