//! The hidden states of the samples between two layers.

use std::ops::Range;

use super::{
    Error, Executor, Positions, Store, Tokens,
    ops::{Matrix, Ops},
};

/// One of the two models: the dense one, or the one pruned so far.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The dense model.
    Dense,
    /// The model pruned so far.
    #[default]
    Sparse,
}

/// The hidden states of all samples between two layers, in runs of samples; a run goes through a
/// layer as one matrix. The runs depend on the samples alone, and so does the result.
#[derive(Debug)]
pub struct Stream<D: Ops> {
    pub(super) runs: Vec<Run>,
    pub(super) states: Store<D>,
    /// Number of calibration samples, which come first; the others are held out.
    pub(super) calibration: usize,
}

/// Consecutive samples of the same length.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) samples: Range<usize>,
    positions: Positions,
}

/// Maximum number of tokens of a run, unless one sample has more: enough rows for all threads.
pub const BATCH: usize = 2048;

impl Run {
    /// Whether a sample fits into the run.
    fn takes(&self, positions: &Positions) -> bool {
        let alike = |a: &Positions, b: &Positions| {
            a.masks.is_none() && b.masks.is_none() && a.length == b.length
        };
        alike(&self.positions, positions) && (self.samples.len() + 1) * positions.length <= BATCH
    }

    pub(super) fn tokens(&self) -> usize {
        self.samples.len() * self.positions.length
    }
}

impl<D: Ops> Stream<D> {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.runs.last().map_or(0, |run| run.samples.end)
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Numbers of calibration samples and of held-out samples.
    pub(super) fn samples(&self) -> [f64; 2] {
        [self.calibration, self.len() - self.calibration].map(|count| count as f64)
    }

    /// Numbers of tokens in some runs.
    pub(super) fn tokens(&self, runs: Range<usize>) -> Tokens {
        let mut tokens = Tokens::default();
        for index in runs {
            let run = &self.runs[index];
            let sum =
                if self.held_out(index) { &mut tokens.held_out } else { &mut tokens.calibration };
            *sum += run.tokens() as f64;
            tokens.sequence = tokens.sequence.max(run.positions.length);
        }
        tokens
    }

    /// Whether a run's samples are held out.
    pub(super) fn held_out(&self, run: usize) -> bool {
        self.runs[run].samples.start >= self.calibration
    }

    /// The runs of calibration samples.
    pub(crate) fn calibration_runs(&self) -> Range<usize> {
        let runs = self.runs.iter().filter(|run| run.samples.start < self.calibration);
        0..runs.count()
    }

    /// The runs of held-out samples.
    pub(crate) fn held_out_runs(&self) -> Range<usize> {
        self.calibration_runs().end..self.runs.len()
    }
}

/// The samples of a run on their way through a layer.
pub(super) struct Batch<D: Ops> {
    pub(super) states: Matrix<D>,
    pub(super) positions: Positions,
    /// The rows of each sample.
    pub(super) samples: Vec<Range<usize>>,
    /// Index of the first sample.
    pub(super) first: usize,
}

impl<D: Ops> Executor<D> {
    /// A stream of samples' hidden states, [tokens, channels] each, row-major. Statistics exclude
    /// the last `held_out` samples.
    ///
    /// # Errors
    /// If the device runs out of memory, or the scratch file fails.
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

    /// Calls `see` with the hidden states of each sample in turn, [tokens, channels], row-major.
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

    /// Stores a matrix for each run of a stream, without rounding: what `values` gives of the hidden
    /// states of each sample in turn, [tokens, channels], row-major.
    ///
    /// # Errors
    /// Whatever `values` returns, or if the device runs out of memory or the scratch space fails.
    pub fn stored<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut values: impl FnMut(usize, &[f32]) -> Result<Vec<f32>, E>,
    ) -> Result<Store<D>, E> {
        let (mut store, mut found) = (self.storage.exact().store(0), Vec::new());
        self.each_sample(stream, |i, states| {
            found.append(&mut values(i, states)?);
            let tokens = stream.runs.iter().find(|run| run.samples.end == i + 1).map(Run::tokens);
            if let Some(tokens) = tokens {
                let values = std::mem::take(&mut found);
                let shape = (tokens, values.len() / tokens.max(1));
                store.push(self.device.hold(values, shape).map_err(Error::device)?)?;
            }
            Ok::<_, E>(())
        })?;
        Ok(store)
    }

    /// A copy of a stream.
    ///
    /// # Errors
    /// If the scratch space fails.
    pub fn copy(&self, stream: &Stream<D>) -> Result<Stream<D>, Error> {
        let mut states = self.storage.store(0);
        for run in 0..stream.runs.len() {
            states.push(stream.states.get(run, &self.device)?)?;
        }
        Ok(Stream { runs: stream.runs.clone(), states, calibration: stream.calibration })
    }

    /// The hidden states of one sample, [tokens, channels], row-major.
    ///
    /// # Errors
    /// If the scratch space fails.
    pub fn sample(&self, stream: &Stream<D>, sample: usize) -> Result<Vec<f32>, Error> {
        let holds = |run: &Run| run.samples.contains(&sample);
        let Some(index) = stream.runs.iter().position(holds) else { return Ok(Vec::new()) };
        let samples = &stream.runs[index].samples;
        let states = stream.states.get(index, &self.device)?.on_host().map_err(Error::device)?;
        let width = states.len() / samples.len();
        let first = (sample - samples.start) * width;
        Ok(states[first..first + width].to_vec())
    }

    /// A matrix for each run of a stream, from the values of each sample, [tokens, channels].
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn by_run(
        &self,
        stream: &Stream<D>,
        samples: &[Vec<f32>],
    ) -> Result<Vec<Matrix<D>>, Error> {
        let run = |run: &Run| {
            let values = samples[run.samples.clone()].concat();
            let shape = (run.tokens(), values.len() / run.tokens());
            self.device.hold(values, shape).map_err(Error::device)
        };
        stream.runs.iter().map(run).collect()
    }

    pub(super) fn batch(&self, stream: &Stream<D>, index: usize) -> Result<Batch<D>, Error> {
        let run = &stream.runs[index];
        let length = run.positions.length;
        Ok(Batch {
            states: stream.states.get(index, &self.device)?,
            positions: run.positions.clone(),
            samples: (0..run.samples.len()).map(|i| i * length..(i + 1) * length).collect(),
            first: run.samples.start,
        })
    }
}
