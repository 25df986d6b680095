//! The errors of checkpoints.

use std::{io, path::Path, path::PathBuf};

use super::quantised::Unread;

/// An error of a checkpoint: what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("there is no checkpoint at {}: the path does not exist", .0.display())]
    Missing(PathBuf),
    #[error("{} is not a directory; give the directory that holds config.json and the weights", .0.display())]
    NotADirectory(PathBuf),
    #[error("{} has no {file}; a checkpoint in the Hugging Face layout has one", dir.display())]
    NoFile { dir: PathBuf, file: &'static str },
    #[error(
        "{} is a link to {}, outside the checkpoint; put the file itself in its place, or give the \
         directory that it is in",
        path.display(), target.display()
    )]
    Outside { path: PathBuf, target: PathBuf },
    #[error("{}: not valid JSON: {problem}", path.display())]
    Json { path: PathBuf, problem: String },
    #[error(
        "{} holds its weights as pickle ({file}), which can run code when it is loaded; convert it \
         to safetensors first: transformers' `from_pretrained` reads it, `save_pretrained` writes them",
        dir.display()
    )]
    Pickle { dir: PathBuf, file: String },
    #[error("{} is {form}, which Barber does not prune; {todo}", path.display())]
    Foreign { path: PathBuf, form: &'static str, todo: &'static str },
    #[error("{} has no weights: neither model.safetensors nor model.safetensors.index.json", .0.display())]
    NoWeights(PathBuf),
    #[error("{}: {problem}", path.display())]
    Index { path: PathBuf, problem: String },
    #[error(
        "{}: truncated or corrupt: the header promises {promised} bytes and the file has {found}; \
         download it again",
        path.display()
    )]
    Truncated { path: PathBuf, promised: u64, found: u64 },
    #[error("{}: corrupt header: {problem}; download it again", path.display())]
    Header { path: PathBuf, problem: String },
    #[error("{}: tensor `{name}` is in the index but not in the file", path.display())]
    NotInShard { path: PathBuf, name: String },
    #[error("the checkpoint at {} has no tensor `{name}`, which its config.json calls for", dir.display())]
    NoTensor { dir: PathBuf, name: String },
    #[error(
        "{}: tensor `{name}` has shape {found:?}, but config.json implies {expected:?}",
        path.display()
    )]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error(
        "{}: tensor `{name}` is stored as {dtype}; Barber reads F64, F32, F16 and BF16",
        path.display()
    )]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error(
        "{}: tensor `{name}` has {value} at {index:?}: the checkpoint is damaged, \
         or was trained to divergence",
        path.display()
    )]
    NotFinite { path: PathBuf, name: String, value: f32, index: Vec<usize> },
    #[error(
        "tensor `{name}`: {value} at position {index} does not fit in {dtype}; use bf16 or f32"
    )]
    Overflow { name: String, value: f32, index: usize, dtype: &'static str },
    #[error(
        "{}: the compressed tensor `{name}` cannot be read: {problem}; download it again",
        path.display()
    )]
    Compressed { path: PathBuf, name: String, problem: String },
    #[error("{}: the quantised tensor `{name}` cannot be read: {problem}", path.display())]
    Quantised { path: PathBuf, name: String, problem: String },
    #[error("the weights at {} are quantised by {what}, which Barber does not read; {todo}", dir.display())]
    Quantisation { dir: PathBuf, what: String, todo: &'static str },
    #[error("{} exists; pass --force to replace it, or choose another output.path", .0.display())]
    Exists(PathBuf),
    #[error(
        "{} is not a checkpoint that a run wrote (it has no barber-report.json), so --force does not \
         replace it; move it away, or choose another output.path",
        .0.display()
    )]
    NoReport(PathBuf),
    #[error(
        "{} holds {entries}, which no run wrote, so --force does not replace it; move it \
         elsewhere, or choose another output.path",
        dir.display()
    )]
    Unlisted { dir: PathBuf, entries: String },
    #[error(
        "{}: {entries} changed since the run wrote it, so --force does not replace it; move it \
         elsewhere, or choose another output.path",
        dir.display()
    )]
    Edited { dir: PathBuf, entries: String },
    #[error(
        "{} {problem}: it is not a directory that a run of Barber works in; move it away, or choose \
         another output.path",
        dir.display()
    )]
    NotPartial { dir: PathBuf, problem: String },
    #[error("the output {} {problem}; choose another output.path", output.display())]
    NoPlace { output: PathBuf, problem: String },
    #[error(
        "the output {} and the model {} overlap: one contains the other; choose another \
         output.path",
        output.display(), model.display()
    )]
    Overlap { output: PathBuf, model: PathBuf },
    #[error(
        "the output {} holds {}, which the run reads; choose another output.path",
        output.display(), input.display()
    )]
    Holds { output: PathBuf, input: PathBuf },
    #[error(
        "{} has weights of the model, and the file of masks would have its name; rename it, in the \
         index too, or leave out output.masks",
        .0.display()
    )]
    MasksTaken(PathBuf),
    #[error("another run, process {process}, writes to {}; wait for it, or choose another output.path", target.display())]
    Busy { target: PathBuf, process: String },
    #[error(
        "{} cannot be seen here, though rank 0 made it; put output.path on a file system that all \
         ranks' machines share",
        dir.display()
    )]
    NotShared { dir: PathBuf },
    #[error(
        "{} holds the state of an interrupted run ({label}); pass --resume to continue it, or \
         --force to start anew",
        dir.display()
    )]
    LeftOver { dir: PathBuf, label: String },
    #[error(transparent)]
    Journal(#[from] crate::journal::Error),
}

impl Error {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// The error of a part of a tensor, whose first position in it is given.
    pub(crate) fn in_part_at(mut self, first: usize) -> Self {
        if let Self::Overflow { index, .. } = &mut self {
            *index += first;
        }
        self
    }

    /// [`Error::io`] for a `map_err`.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::io(path, source)
    }

    pub(super) fn quantisation(dir: &Path, Unread { what, todo }: &Unread) -> Self {
        Self::Quantisation { dir: dir.to_owned(), what: what.clone(), todo }
    }

    pub(super) fn quantised(path: &Path, name: &str, problem: impl Into<String>) -> Self {
        Self::Quantised { path: path.to_owned(), name: name.into(), problem: problem.into() }
    }

    pub(super) fn compressed(path: &Path, name: &str, problem: impl Into<String>) -> Self {
        Self::Compressed { path: path.to_owned(), name: name.into(), problem: problem.into() }
    }
}
