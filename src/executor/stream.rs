//! The hidden states of the samples between two layers.

use std::ops::Range;

use super::{
    Error, Executor, Positions, Storage, Store, Tokens,
    ops::{Matrix, Ops},
};
use crate::ranks::Chunks;

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
    /// The hidden states of this rank's runs.
    pub(super) states: Store<D>,
    /// Number of calibration samples, which come first; the others are held out.
    pub(super) calibration: usize,
    /// The ranks' shares of the runs.
    pub(super) chunks: Chunks,
}

/// Consecutive samples of the same length.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) samples: Range<usize>,
    positions: Positions,
}

/// Maximum number of tokens of a run, unless one sample has more: enough rows for all threads.
pub const BATCH: usize = 2048;
/// Number of runs into which few samples are split, so that several ranks have as much to do.
const RUNS: usize = 8;
/// Number of tokens of a run that are not split any further.
const FEWEST: usize = 512;

/// Maximum number of tokens of a run, unless one sample has more, among so many tokens.
pub(super) fn run_limit(tokens: usize) -> usize {
    (tokens / RUNS).clamp(FEWEST, BATCH)
}

/// Number of runs of so many tokens in samples of this length.
pub(super) fn run_count(tokens: usize, sequence: usize) -> usize {
    let (samples, limit) = (tokens / sequence.max(1), run_limit(tokens));
    samples.div_ceil((limit / sequence.max(1)).max(1))
}

impl Run {
    /// Whether a sample fits into the run of at most so many tokens.
    fn takes(&self, positions: &Positions, limit: usize) -> bool {
        let tokens = (self.samples.len() + 1) * positions.length;
        self.positions.are_alike(positions) && tokens <= limit
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

    /// Number of tokens of the samples before one.
    pub(crate) fn tokens_before(&self, sample: usize) -> usize {
        let within = |run: &Run| {
            let samples = run.samples.start.min(sample)..run.samples.end.min(sample);
            samples.len() * run.positions.length
        };
        self.runs.iter().map(within).sum()
    }

    /// The ranks' shares of the runs.
    pub(crate) fn chunks(&self) -> &Chunks {
        &self.chunks
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
    /// A stream of samples with these positions. `states` gives the hidden states of a sample, [tokens,
    /// channels], row-major; it is called for this rank's samples, in order. Statistics exclude the last
    /// `held_out` samples.
    ///
    /// # Errors
    /// Whatever `states` returns, or if the device runs out of memory or the scratch file fails.
    pub fn stream<E: From<Error>>(
        &self,
        samples: impl ExactSizeIterator<Item = Positions>,
        held_out: usize,
        mut states: impl FnMut(usize) -> Result<Vec<f32>, E>,
    ) -> Result<Stream<D>, E> {
        let calibration = samples.len().saturating_sub(held_out);
        let samples: Vec<Positions> = samples.collect();
        let tokens = |of: &[Positions]| of.iter().map(|of| of.length).sum();
        let (first, last) = samples.split_at(calibration);
        let limits = [first, last].map(|of| run_limit(tokens(of)));
        let mut runs: Vec<Run> = Vec::new();
        for (i, positions) in samples.into_iter().enumerate() {
            let limit = limits[usize::from(i >= calibration)];
            match runs.last_mut() {
                Some(run) if i != calibration && run.takes(&positions, limit) => {
                    run.samples.end = i + 1;
                }
                _ => runs.push(Run { samples: i..i + 1, positions }),
            }
        }
        let of_calibration = runs.iter().filter(|run| run.samples.start < calibration).count();
        let chunks = Chunks::new(of_calibration, runs.len(), &self.ranks);
        let mut stored = self.storage.store(runs.len());
        for index in chunks.own() {
            let (run, mut values) = (&runs[index], Vec::new());
            for sample in run.samples.clone() {
                values.append(&mut states(sample)?);
            }
            let shape = (run.tokens(), values.len().checked_div(run.tokens()).unwrap_or(0));
            stored.put(index, self.device.hold(values, shape).map_err(Error::device)?)?;
        }
        Ok(Stream { runs, states: stored, calibration, chunks })
    }

    /// Calls `see` with the hidden states of each of this rank's samples in turn, [tokens, channels],
    /// row-major.
    ///
    /// # Errors
    /// Whatever `see` returns, or if the scratch file fails.
    pub fn each_sample<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut see: impl FnMut(usize, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for index in stream.chunks.own() {
            let run = &stream.runs[index];
            let states = stream.states.get(index, &self.device)?;
            let states = states.on_host().map_err(Error::device)?;
            let width = states.len() / run.samples.len();
            run.samples.clone().zip(states.chunks(width)).try_for_each(|(i, x)| see(i, x))?;
        }
        Ok(())
    }

    /// What `of` finds of the hidden states of each sample, [tokens, channels], row-major: each rank asks
    /// it for its own samples.
    ///
    /// # Errors
    /// Whatever `of` returns, or if the scratch file fails.
    pub fn of_samples<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut of: impl FnMut(usize, &[f32]) -> Result<Vec<f64>, E>,
    ) -> Result<Vec<Vec<f64>>, E> {
        let mut own = Vec::new();
        self.each_sample(stream, |i, states| {
            own.push((i, of(i, states)?));
            Ok::<_, E>(())
        })?;
        Ok(self.ranks.collect(own).into_iter().map(|(_, found)| found).collect())
    }

    /// Calls `see` on the first rank with the hidden states of each sample in turn, [tokens, channels],
    /// row-major; the other ranks send theirs.
    ///
    /// # Errors
    /// Whatever `see` returns, or if the scratch file fails.
    pub fn each_sample_at_first<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut see: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, run) in stream.runs.iter().enumerate() {
            let states = self.sent(stream, index, |rank| rank == 0)?;
            if self.ranks.is_first() {
                states.chunks(states.len() / run.samples.len()).try_for_each(&mut see)?;
            }
        }
        Ok(())
    }

    /// The hidden states of a run, on the ranks that want them; each rank knows all that do.
    fn sent(
        &self,
        stream: &Stream<D>,
        index: usize,
        wants: impl Fn(usize) -> bool,
    ) -> Result<Vec<f32>, Error> {
        let (size, from) = (self.ranks.size(), stream.chunks.rank_of(index));
        let mut own = Vec::new();
        if stream.chunks.has(index) {
            let states = stream.states.get(index, &self.device)?;
            own = states.on_host().map_err(Error::device)?;
        }
        if size == 1 {
            return Ok(own);
        }
        let count = self.ranks.of_rank(from, own.len());
        let wanted = |rank: usize| if wants(rank) { count } else { 0 };
        let has = stream.chunks.has(index);
        let outgoing: Vec<usize> =
            (0..size).map(|rank| if has { wanted(rank) } else { 0 }).collect();
        let mut incoming = vec![0; size];
        incoming[from] = wanted(self.ranks.rank());
        let copies = outgoing.iter().filter(|count| **count > 0).count();
        Ok(self.ranks.exchange(&own.repeat(copies), &outgoing, &incoming))
    }

    /// Gives each rank the hidden states of all samples.
    ///
    /// # Errors
    /// If the device runs out of memory, or the scratch space fails.
    pub fn share(&self, stream: &mut Stream<D>) -> Result<(), Error> {
        if self.ranks.size() == 1 {
            return Ok(());
        }
        for (index, run) in stream.runs.iter().enumerate() {
            let states = self.sent(stream, index, |_| true)?;
            let shape = (run.tokens(), states.len() / run.tokens().max(1));
            let states = self.device.hold(states, shape).map_err(Error::device)?;
            stream.states.put(index, states)?;
        }
        Ok(())
    }

    /// Stores a matrix for each of this rank's runs of a stream, without rounding: what `values` gives of
    /// the hidden states of each sample in turn, [tokens, channels], row-major.
    ///
    /// # Errors
    /// Whatever `values` returns, or if the device runs out of memory or the scratch space fails.
    pub fn stored<E: From<Error>>(
        &self,
        stream: &Stream<D>,
        mut values: impl FnMut(usize, &[f32]) -> Result<Vec<f32>, E>,
    ) -> Result<Store<D>, E> {
        let mut store = self.storage.exact().store(stream.runs.len());
        let mut found = Vec::new();
        self.each_sample(stream, |i, states| {
            found.append(&mut values(i, states)?);
            let ends = |run: &Run| run.samples.end == i + 1;
            if let Some(run) = stream.runs.iter().position(ends) {
                let (tokens, values) = (stream.runs[run].tokens(), std::mem::take(&mut found));
                let shape = (tokens, values.len() / tokens.max(1));
                store.put(run, self.device.hold(values, shape).map_err(Error::device)?)?;
            }
            Ok::<_, E>(())
        })?;
        Ok(store)
    }

    /// A copy of a stream, in this storage.
    ///
    /// # Errors
    /// If the scratch space fails.
    pub fn copy(&self, stream: &Stream<D>, storage: &Storage) -> Result<Stream<D>, Error> {
        let mut states = storage.store(stream.runs.len());
        for run in stream.chunks.own() {
            states.put(run, stream.states.get(run, &self.device)?)?;
        }
        let (runs, chunks) = (stream.runs.clone(), stream.chunks.clone());
        Ok(Stream { runs, states, calibration: stream.calibration, chunks })
    }

    /// The hidden states of one sample, [tokens, channels], row-major. The rank must have them.
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

    /// A matrix for each of this rank's runs of a stream, with the run's index, from the values of each
    /// of its samples, [tokens, channels].
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn by_run(
        &self,
        stream: &Stream<D>,
        samples: &[Vec<f32>],
    ) -> Result<Vec<(usize, Matrix<D>)>, Error> {
        let matrix = |index: usize| {
            let run = &stream.runs[index];
            let values = samples[run.samples.clone()].concat();
            let shape = (run.tokens(), values.len() / run.tokens());
            let matrix = self.device.hold(values, shape).map_err(Error::device)?;
            Ok((index, matrix))
        };
        stream.chunks.own().map(matrix).collect()
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
