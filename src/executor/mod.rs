//! Decoder layers on dfdx, generic over the device; gradients come from its tape.
//!
//! The executor knows no files and no recipes: it is given values and gives back hidden states,
//! losses and statistics.

mod device;
mod finite;
mod forward;
mod inputs;
mod known;
mod measure;
pub mod ops;
mod rate;
mod store;
mod survey;

use std::{fmt, io, ops::Range, path::Path, sync::Arc};

#[cfg(feature = "cuda")]
pub use self::device::cuda;
pub(crate) use self::known::{NOTED, kept};
use self::ops::{Matrix, Ops, Rotation, Sight};
pub use self::{
    device::{Device, available_memory},
    forward::{Inner, PartWeights, Watch, forward},
    known::{Changes, Known},
    measure::{Loss, Measured, Statistics},
    rate::rate,
    store::{Storage, Store},
    survey::{Side, Surveyed},
};
use crate::family::Decoder;

/// Why the executor failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The device failed.
    #[error("{0}")]
    Device(String),
    /// The scratch file failed.
    #[error("scratch file in {}: {problem}", .scratch.display())]
    Scratch {
        /// Its directory.
        scratch: std::path::PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An activation is NaN or infinite.
    #[error(
        "the {what} of `{tensor}` is {value} on sample {sample}, at token {token}, channel \
         {channel}: the checkpoint is damaged, or its activations overflow f32"
    )]
    Activation {
        /// Input or output.
        what: &'static str,
        /// Of which weight.
        tensor: String,
        /// The sample, from 0 on.
        sample: usize,
        /// The row, from 0 on.
        token: usize,
        /// The column, from 0 on.
        channel: usize,
        /// The activation.
        value: f32,
    },
    /// A hidden state does not fit the format in which it is to be stored.
    #[error(
        "a hidden state is {value}, too large for {dtype}; \
         set executor.stream_dtype to \"bf16\" or \"f32\""
    )]
    Overflow {
        /// The state.
        value: f32,
        /// The format.
        dtype: &'static str,
    },
}

impl Error {
    fn device(problem: impl fmt::Display) -> Self {
        Self::Device(problem.to_string())
    }

    fn scratch(scratch: &Path, problem: &io::Error) -> Self {
        Self::Scratch { scratch: scratch.to_owned(), problem: problem.to_string() }
    }
}

/// What runs decoder layers: a device, and where samples wait between two layers.
#[derive(Clone, Debug)]
pub struct Executor<D> {
    /// The device.
    pub device: D,
    /// Where samples wait.
    pub storage: Storage,
}

impl<D> From<D> for Executor<D> {
    fn from(device: D) -> Self {
        Self { device, storage: Storage::default() }
    }
}

/// The hidden states of all samples between two layers, in runs that go through a layer as one
/// matrix each. The runs depend on the samples alone, and so does the result.
#[derive(Debug)]
pub struct Stream<D: Ops> {
    runs: Vec<Run>,
    states: Store<D>,
    /// The first samples, which statistics are of; the others are held out.
    calibration: usize,
}

/// Consecutive samples of one length.
#[derive(Clone, Debug)]
struct Run {
    /// Which they are.
    samples: Range<usize>,
    positions: Positions,
}

/// Tokens that go through a layer as one matrix, unless one sample has more: enough for all threads
/// to have rows of their own.
pub const BATCH: usize = 2048;

impl Run {
    /// Whether a sample goes with those that are there.
    fn takes(&self, positions: &Positions) -> bool {
        let alike = |a: &Positions, b: &Positions| {
            a.sights.is_none() && b.sights.is_none() && a.length == b.length
        };
        alike(&self.positions, positions) && (self.samples.len() + 1) * positions.length <= BATCH
    }

    fn tokens(&self) -> usize {
        self.samples.len() * self.positions.length
    }
}

impl<D: Ops> Stream<D> {
    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.runs.last().map_or(0, |run| run.samples.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    fn tokens(&self) -> usize {
        self.runs.iter().map(Run::tokens).sum()
    }

    /// Whether a run's samples are held out.
    fn held_out(&self, run: usize) -> bool {
        self.runs[run].samples.start >= self.calibration
    }

    /// The runs that statistics are of.
    pub(crate) fn calibrating(&self) -> Range<usize> {
        let runs = self.runs.iter().filter(|run| run.samples.start < self.calibration);
        0..runs.count()
    }
}

/// The samples of a run as they go through a layer.
struct Batch<D: Ops> {
    /// Which run it is.
    index: usize,
    states: Matrix<D>,
    positions: Positions,
    /// The rows of each sample.
    samples: Vec<Range<usize>>,
    /// The number of the first one.
    first: usize,
}

impl<D: Ops> Executor<D> {
    /// The stream of some samples' hidden states, [tokens, channels] each, row-major. The last
    /// `held_out` of them are no part of any statistics.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn stream<E: From<Error>>(
        &self,
        samples: impl ExactSizeIterator<Item = Result<(Vec<f32>, Positions), E>>,
        held_out: usize,
    ) -> Result<Stream<D>, E> {
        let calibration = samples.len().saturating_sub(held_out);
        let mut runs: Vec<Run> = Vec::new();
        let mut states = self.storage.store(0);
        let mut values: Vec<f32> = Vec::new();
        let mut put = |values: Vec<f32>, run: &Run| {
            let shape = (run.tokens(), values.len().checked_div(run.tokens()).unwrap_or(0));
            states.push(self.device.hold(values, shape).map_err(Error::device)?)
        };
        for (i, sample) in samples.enumerate() {
            let (mut sample, positions) = sample?;
            match runs.last_mut() {
                Some(run) if i != calibration && run.takes(&positions) => {
                    run.samples.end = i + 1;
                    values.append(&mut sample);
                }
                last => {
                    if let Some(run) = last {
                        put(std::mem::take(&mut values), run)?;
                    }
                    values = sample;
                    runs.push(Run { samples: i..i + 1, positions });
                }
            }
        }
        if let Some(run) = runs.last() {
            put(values, run)?;
        }
        Ok(Stream { runs, states, calibration })
    }

    /// The hidden states of each sample in turn, [tokens, channels], row-major.
    ///
    /// # Errors
    /// Whatever `see` returns, or if the scratch file fails.
    pub fn each_sample<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut see: impl FnMut(usize, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for index in 0..stream.runs.len() {
            let run = &stream.runs[index];
            let states = stream.states.get(index, &self.device)?;
            let states = states.on_host().map_err(Error::device)?;
            let width = states.len() / run.samples.len();
            run.samples.clone().zip(states.chunks(width)).try_for_each(|(i, x)| see(i, x))?;
        }
        Ok(())
    }

    fn batch(&self, stream: &Stream<D>, index: usize) -> Result<Batch<D>, Error> {
        let run = &stream.runs[index];
        let length = run.positions.length;
        Ok(Batch {
            index,
            states: stream.states.get(index, &self.device)?,
            positions: run.positions.clone(),
            samples: (0..run.samples.len()).map(|i| i * length..(i + 1) * length).collect(),
            first: run.samples.start,
        })
    }
}

/// Rows of a matrix of tokens that go on in several ways: each branch sees the root and itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// What the branches have in common.
    pub root: Range<usize>,
    /// How it goes on, each at the position after the root's last.
    pub branches: Vec<Range<usize>>,
}

/// What attention knows of the rows of a matrix: their positions, and which see which.
#[derive(Clone, Debug)]
pub struct Positions {
    length: usize,
    /// Without one, the rows are one sequence.
    sights: Option<Arc<Vec<Sight>>>,
    rotation: Option<Rotation>,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let rotation = decoder.rope.as_ref().map(|rope| {
            let (cos, sin) = rope.tables(length);
            Rotation { cos: Arc::new(cos), sin: Arc::new(sin), half: rope.planes() }
        });
        Self { length, sights: None, rotation }
    }

    /// The positions of trees that fill a matrix of `length` tokens.
    pub fn of_trees(decoder: &Decoder, length: usize, trees: &[Tree]) -> Self {
        let mut sights = vec![Sight::default(); length];
        for Tree { root, branches } in trees {
            for row in root.clone() {
                sights[row] = Sight { root: root.start..root.start, branch: root.start };
            }
            for branch in branches {
                for row in branch.clone() {
                    sights[row] = Sight { root: root.clone(), branch: branch.start };
                }
            }
        }
        let positions = || sights.iter().enumerate().map(|(row, sight)| sight.position(row));
        let rotation = decoder.rope.as_ref().map(|rope| {
            let half = rope.planes();
            let (cos, sin) = rope.tables(positions().max().map_or(0, |last| last + 1));
            let rows = |table: &[f32]| {
                let rows = positions().flat_map(|at| &table[at * half..(at + 1) * half]);
                Arc::new(rows.copied().collect())
            };
            Rotation { cos: rows(&cos), sin: rows(&sin), half }
        });
        Self { length, rotation, sights: Some(Arc::new(sights)) }
    }

    /// The position of each row in its sequence.
    pub fn of_rows(&self) -> Vec<usize> {
        match &self.sights {
            None => (0..self.length).collect(),
            Some(sights) => {
                sights.iter().enumerate().map(|(row, sight)| sight.position(row)).collect()
            }
        }
    }
}
