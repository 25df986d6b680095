//! Decoder layers on dfdx, generic over the device; gradients come from its tape.
//!
//! The executor knows no files and no recipes: it is given values and gives back hidden states,
//! losses and statistics.

mod forward;
mod inputs;
mod measure;
pub mod ops;
mod store;

use std::{fmt, io, ops::Range, path::Path, sync::Arc};

use self::ops::{Matrix, Ops, Rotation, Sight};
pub use self::{
    forward::{Inner, PartWeights, Watch, forward},
    measure::{Known, Measured, Statistics},
    store::{Storage, Store},
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

/// The hidden states of all samples between two layers.
#[derive(Debug)]
pub struct Stream {
    positions: Vec<Positions>,
    states: Store,
}

impl Stream {
    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.states.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// The states of a sample, [tokens, channels], row-major.
    ///
    /// # Errors
    /// If the scratch file cannot be read.
    pub fn states(&self, sample: usize) -> Result<Vec<f32>, Error> {
        self.states.read(sample..sample + 1)
    }

    /// Runs of samples that go through a layer as one matrix. They depend on the samples alone, and
    /// so does the result.
    fn batches(&self) -> Vec<Range<usize>> {
        let mut batches: Vec<Range<usize>> = Vec::new();
        for (i, positions) in self.positions.iter().enumerate() {
            match batches.last_mut() {
                Some(batch)
                    if positions.continues(&self.positions[batch.start])
                        && (batch.len() + 1) * positions.length <= BATCH =>
                {
                    batch.end = i + 1;
                }
                _ => batches.push(i..i + 1),
            }
        }
        batches
    }
}

/// Tokens that go through a layer as one matrix, unless one sample has more: enough for all threads
/// to have rows of their own.
pub const BATCH: usize = 2048;

/// Samples of one length, one below the other.
struct Batch<D: Ops> {
    /// Which they are.
    range: Range<usize>,
    states: Matrix<D>,
    positions: Positions,
    /// The rows of each.
    samples: Vec<Range<usize>>,
}

impl<D: Ops> Executor<D> {
    /// The hidden states of some samples, [tokens, channels] each, row-major.
    ///
    /// # Errors
    /// If they cannot be stored.
    pub fn stream<E: From<Error>>(
        &self,
        samples: impl ExactSizeIterator<Item = Result<(Vec<f32>, Positions), E>>,
    ) -> Result<Stream, E> {
        let mut states = self.storage.store(samples.len());
        let mut all = Vec::with_capacity(samples.len());
        for (i, sample) in samples.enumerate() {
            let (values, positions) = sample?;
            states.put(i, &values)?;
            all.push(positions);
        }
        Ok(Stream { positions: all, states })
    }

    fn batch(&self, stream: &Stream, range: Range<usize>) -> Result<Batch<D>, Error> {
        let positions = stream.positions[range.start].clone();
        let length = positions.length;
        let samples: Vec<_> = (0..range.len()).map(|i| i * length..(i + 1) * length).collect();
        let states = self.matrix(&stream.states, &range, length)?;
        Ok(Batch { range, states, positions, samples })
    }

    /// The matrices of some samples of `length` tokens, one below the other.
    fn matrix(
        &self,
        store: &Store,
        range: &Range<usize>,
        length: usize,
    ) -> Result<Matrix<D>, Error> {
        let values = store.read(range.clone())?;
        let rows = range.len() * length;
        let width = values.len().checked_div(rows).unwrap_or(0);
        self.device.hold(values, (rows, width)).map_err(Error::device)
    }
}

impl<D: Ops> Batch<D> {
    /// Stores a matrix with the batch's rows, sample by sample.
    fn keep(&self, store: &mut Store, matrix: &Matrix<D>) -> Result<(), Error> {
        let (values, width) = (matrix.to_vec(), matrix.shape().1);
        for (i, rows) in self.range.clone().zip(&self.samples) {
            store.put(i, &values[rows.start * width..rows.end * width])?;
        }
        Ok(())
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
    /// Whether a matrix of sequences with the positions of `first` may go on with this one.
    fn continues(&self, first: &Self) -> bool {
        self.sights.is_none() && first.sights.is_none() && self.length == first.length
    }

    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let rotation = decoder.rope.as_ref().map(|rope| {
            let (cos, sin) = rope.tables(length);
            Rotation { cos: Arc::new(cos), sin: Arc::new(sin), half: rope.head_dim / 2 }
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
            let half = rope.head_dim / 2;
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
