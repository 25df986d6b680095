//! A pass of hidden states through parts of a decoder layer: one loop over the runs of samples.

use std::ops::Range;

use dfdx::{
    tensor::{NoneTape, OwnedTape, Tape},
    tensor_ops::Backward,
};

use super::{
    ActivationCache, Caching, Error, Executor, Loss, PartShape, PartWeights, PassShape, Probe,
    Side, Statistics, Store, Stream,
    forward::{Hooks, forward_with, inputs},
    loss::relative_error,
    ops::{InputGradient, Matrix, Ops},
    probe::{Gathered, Inputs},
    stream::Batch,
};
use crate::ranks::Turn;

/// A pass through consecutive parts of a decoder layer, and the results that it should give. Runs
/// of samples and outputs that no result needs are not computed.
pub struct Pass<'a, D: Ops> {
    /// The weights of the parts.
    pub parts: &'a [PartWeights<D>],
    /// The hidden states before the parts.
    pub stream: Through<'a, D>,
    /// The dense model's hidden states of the same samples, if they go through the parts, too.
    pub beside: Option<Beside<'a, D>>,
    /// The runs of samples that go through; `None` for all.
    pub runs: Option<Range<usize>>,
    /// The targets that the outputs are compared with.
    pub targets: Targets<'a, D>,
    /// The use of the outputs: for one part its own output, without the residual; for several parts
    /// the hidden states after them.
    pub outputs: Outputs<'a, D>,
    /// The statistics of linear layers.
    pub probe: Option<Probe<'a>>,
    /// The use of the cache.
    pub cache: Caching<'a, D>,
}

impl<'a, D: Ops> Pass<'a, D> {
    /// A pass without results.
    pub fn new(parts: &'a [PartWeights<D>], stream: &'a Stream<D>) -> Self {
        Self::through(parts, Through::Stay(stream))
    }

    /// A pass that advances the stream through the parts.
    pub fn advancing(parts: &'a [PartWeights<D>], stream: &'a mut Stream<D>) -> Self {
        Self::through(parts, Through::Advance(stream))
    }

    /// The shape, from which the cost is counted.
    pub fn shape(&self) -> PassShape<'a> {
        let parts = match self.outputs {
            Outputs::Known(_) => &[],
            _ => self.parts,
        };
        let stream = self.stream.get();
        PassShape {
            parts: parts.iter().map(PartShape::from).collect(),
            tokens: stream.tokens(self.runs.clone().unwrap_or(0..stream.runs.len())),
            beside: self.beside.as_ref().map(|beside| beside.side),
            needs_output: self.needs_output(),
            probe: self.probe,
            cache: self.cache.shape(),
        }
    }

    /// Whether the outputs are kept, or the stream advances.
    fn goes_on(&self) -> bool {
        matches!(self.outputs, Outputs::Kept) || matches!(self.stream, Through::Advance(_))
    }

    /// Whether the outputs of all samples are needed.
    fn needs_output(&self) -> bool {
        self.goes_on() || !matches!(self.targets, Targets::None)
    }

    fn through(parts: &'a [PartWeights<D>], stream: Through<'a, D>) -> Self {
        Self {
            parts,
            stream,
            beside: None,
            runs: None,
            targets: Targets::None,
            outputs: Outputs::Dropped,
            probe: None,
            cache: Caching::Off,
        }
    }
}

/// The stream of a pass.
#[derive(Debug)]
pub enum Through<'a, D: Ops> {
    /// The stream does not change.
    Stay(&'a Stream<D>),
    /// The hidden states after the parts replace those before them.
    Advance(&'a mut Stream<D>),
}

impl<D: Ops> Through<'_, D> {
    fn get(&self) -> &Stream<D> {
        match self {
            Self::Stay(stream) => stream,
            Self::Advance(stream) => stream,
        }
    }
}

/// A dense stream beside a sparse one.
#[derive(Debug)]
pub struct Beside<'a, D: Ops> {
    /// The dense stream.
    pub stream: &'a Stream<D>,
    /// The stream that the statistics of inputs are computed on. With Gram matrices on the sparse
    /// stream, [`Statistics::departure`](super::Statistics::departure) is computed, too.
    pub side: Side,
}

/// The targets that the outputs of a pass are compared with.
#[derive(Debug, Default)]
pub enum Targets<'a, D: Ops> {
    /// No targets.
    #[default]
    None,
    /// Target outputs; the loss is the mean squared error.
    Outputs(&'a Store<D>),
    /// Target outputs, which the pass's outputs replace in the store, returned as
    /// [`Found::outputs`].
    Replaced(Store<D>),
    /// Target outputs t; the loss is the mean over tokens of ‖y − t‖² / ‖t‖² for the outputs y.
    Relative(&'a Store<D>),
}

/// The use of the outputs of a pass.
#[derive(Debug, Default)]
pub enum Outputs<'a, D: Ops> {
    /// The outputs are dropped.
    #[default]
    Dropped,
    /// The outputs are returned as [`Found::outputs`].
    Kept,
    /// The outputs are known, and not computed again.
    Known(&'a Store<D>),
}

/// The results of a pass.
#[derive(Debug)]
pub struct Found<D: Ops> {
    /// The error of the outputs; 0 without targets.
    pub loss: Loss,
    /// The statistics of each linear layer of each part; empty without a probe.
    pub statistics: Vec<Vec<Statistics>>,
    /// The outputs; empty unless they were kept or replaced the targets.
    pub outputs: Store<D>,
    /// The outputs on the dense stream, if there is one and outputs were kept.
    pub beside: Option<Store<D>>,
    /// The outputs of linear layers, if they were recorded.
    pub cache: Option<ActivationCache<D>>,
}

impl<D: Ops> Targets<'_, D> {
    /// The target of a run, if there are targets.
    fn of_run(
        &mut self,
        run: usize,
        output: &Matrix<D>,
        device: &D,
    ) -> Result<Option<Matrix<D>>, Error> {
        match self {
            Self::None => Ok(None),
            Self::Outputs(targets) | Self::Relative(targets) => targets.get(run, device).map(Some),
            Self::Replaced(targets) => {
                let target = targets.get(run, device)?;
                targets.put(run, output.clone())?;
                Ok(Some(target))
            }
        }
    }
}

impl<D: Ops> Executor<D> {
    /// Runs a pass.
    ///
    /// # Errors
    /// If the device runs out of memory, the scratch space fails, or an activation is not
    /// finite.
    pub fn run(&self, pass: Pass<'_, D>) -> Result<Found<D>, Error> {
        let (goes_on, needs_output) = (pass.goes_on(), pass.needs_output());
        let Pass { parts, mut stream, beside, runs, mut targets, outputs, probe, mut cache } = pass;
        let device = &self.device;
        let count = stream.get().runs.len();
        let mut recorder = cache.recorder(self, &parts[0], stream.get());
        let chunks = stream.get().chunks.clone();
        let mut gathered = probe.map(|probe| Gathered::new(parts, probe, &self.ranks));
        let is_backward = probe.is_some_and(|probe| probe.is_backward());
        let keeps = matches!(outputs, Outputs::Kept);
        let mut kept = self.storage.store(if keeps { count } else { 0 });
        let mut kept_beside = beside.as_ref().filter(|_| keeps).map(|_| self.storage.store(count));
        let mut losses = Vec::new();
        let turns = chunks.turns(runs.unwrap_or(0..count));
        let steps = turns.into_iter().flat_map(|Turn { runs, sums }| {
            runs.map(Step::Run).chain(sums.then_some(Step::EndChunk))
        });
        for step in steps {
            let run = match (step, &mut gathered) {
                (Step::Run(run), _) => run,
                (Step::EndChunk, Some(gathered)) => {
                    gathered.end_chunk().map_err(Error::device)?;
                    continue;
                }
                (Step::EndChunk, None) => continue,
            };
            let held_out = stream.get().held_out(run);
            let mut gathering = gathered.as_mut().filter(|_| !held_out);
            let mut recording = recorder.as_ref().and_then(|recorder| recorder.recording(run));
            let needs_output = needs_output || recording.is_some();
            if !needs_output && gathering.is_none() {
                continue;
            }
            let batch = self.batch(stream.get(), run)?;
            let mut dense_inputs = None;
            if let Some(Beside { stream, side }) = &beside {
                let (batch, mut inputs) = (self.batch(stream, run)?, Inputs::default());
                let (gathers, dense) = (gathering.is_some(), *side == Side::Dense);
                let mut gatherer = match gathering.as_deref_mut() {
                    Some(gathered) if dense => Some(gathered.inputs(&batch.samples, None)),
                    _ => None,
                };
                let mut hooks = Hooks::default();
                match &mut gatherer {
                    Some(gatherer) => hooks.hooks.push(gatherer),
                    None if gathers => hooks.hooks.push(&mut inputs),
                    None => {}
                }
                let output = forward_parts(parts, &batch, NoneTape, &mut hooks, needs_output);
                let output = output.map_err(Error::device)?;
                drop(hooks);
                batch.check_inputs(parts, gatherer.and_then(|of| of.broken))?;
                if let (Some(kept), Some(output)) = (&mut kept_beside, output) {
                    kept.put(run, output)?;
                }
                dense_inputs = (!dense).then_some(inputs);
            }
            let gathers_here = beside.is_none() || dense_inputs.is_some();
            let traced = gathering.as_ref().filter(|_| is_backward).map(|of| of.traced(parts));
            let (output, tape) = if let Outputs::Known(known) = outputs {
                (Some(known.get(run, device)?), None)
            } else {
                let inputs = gathering.as_deref_mut().filter(|_| gathers_here);
                let mut inputs = inputs.map(|of| of.inputs(&batch.samples, dense_inputs));
                let mut hooks = Hooks { known: cache.known(run, device)?, ..Hooks::default() };
                hooks.hooks.extend(inputs.as_mut().map(|hook| hook as _));
                hooks.hooks.extend(recording.as_mut().map(|hook| hook as _));
                let found = match &traced {
                    None => forward_parts(parts, &batch, NoneTape, &mut hooks, needs_output)
                        .map(|output| (output, None)),
                    Some(traced) => {
                        let tape = OwnedTape::default();
                        forward_parts(traced, &batch, tape, &mut hooks, needs_output)
                            .map(|output| output.map(Matrix::split_tape).unzip())
                    }
                };
                let found = found.map_err(Error::device)?;
                drop(hooks);
                batch.check_inputs(parts, inputs.and_then(|inputs| inputs.broken))?;
                found
            };
            if let (Some(recorder), Some(recording)) = (&mut recorder, recording) {
                recorder.add(run, recording)?;
            }
            let Some(output) = output else { continue };
            let output = match targets.of_run(run, &output, device)? {
                None => Some(output),
                Some(target) => {
                    let after = goes_on.then(|| output.clone());
                    let loss = if let Targets::Relative(_) = targets {
                        relative_error(&output, &target)?
                    } else {
                        let error = squared_error(output, tape, &target, &batch.samples);
                        error.map_err(Error::device)?
                    };
                    losses.push((run, vec![loss]));
                    if let (Some(gathered), Some(traced)) = (gathering, &traced) {
                        let added = gathered.add_gradients(traced, &batch.samples);
                        added.map_err(Error::device)?;
                    }
                    after
                }
            };
            if let Some(output) = output.as_ref().filter(|_| keeps) {
                kept.put(run, output.clone())?;
            }
            if let (Through::Advance(stream), Some(output)) = (&mut stream, output) {
                let states = match parts {
                    [part] => part.residual(batch.states.clone(), output).map_err(Error::device)?,
                    _ => output,
                };
                batch.check_states(parts, &states)?;
                stream.states.put(run, states)?;
            }
        }
        let stream = stream.get();
        let mut loss = Loss::default();
        for (run, of_run) in self.ranks.collect(losses) {
            of_run.into_iter().for_each(|of_run| loss.add(stream.held_out(run), of_run));
        }
        let statistics = gathered.map(|gathered| gathered.finish(stream.calibration));
        let loss = match targets {
            Targets::Relative(_) => {
                let tokens = stream.tokens(0..count);
                loss.mean([tokens.calibration, tokens.held_out])
            }
            _ => loss.mean(stream.samples()),
        };
        if let Targets::Replaced(outputs) = targets {
            kept = outputs;
        }
        Ok(Found {
            loss,
            statistics: statistics.transpose().map_err(Error::device)?.unwrap_or_default(),
            outputs: kept,
            beside: kept_beside,
            cache: recorder.map(|recorder| recorder.cache),
        })
    }
}

/// A step of a pass.
enum Step {
    /// A run of samples goes through the parts.
    Run(usize),
    /// A chunk of samples has gone through.
    EndChunk,
}

/// The output of consecutive parts: for one part its own output, without the residual; for several
/// parts the hidden states after them. Without `needs_output` the last linear layer does not run.
pub(super) fn forward_parts<D: Ops, T: Tape<f32, D> + 'static>(
    parts: &[PartWeights<D>],
    batch: &Batch<D>,
    tape: T,
    hooks: &mut Hooks<'_, D>,
    needs_output: bool,
) -> Result<Option<Matrix<D, T>>, D::Err> {
    let (positions, mut states) = (&batch.positions, batch.states.clone().put_tape(tape));
    for (i, part) in parts.iter().enumerate() {
        let (x, tape) = states.split_tape();
        // Before the first part there are no weights, so its norm needs no gradient.
        let (input, gradient) = if i == 0 {
            (part.normalise(x.clone())?.put_tape(tape), InputGradient::Skipped)
        } else {
            (part.normalise(x.clone().put_tape(tape))?, InputGradient::Wanted)
        };
        if i + 1 == parts.len() && !needs_output {
            inputs(part, positions, input, gradient, hooks)?;
            return Ok(None);
        }
        let output = forward_with(part, positions, input, gradient, hooks)?;
        if parts.len() == 1 {
            return Ok(Some(output));
        }
        states = part.residual(x, output)?;
    }
    Ok(Some(states))
}

/// The sum of the samples' mean squared errors; with a tape, runs the backward pass from it.
fn squared_error<D: Ops>(
    output: Matrix<D>,
    tape: Option<OwnedTape<f32, D>>,
    target: &Matrix<D>,
    samples: &[Range<usize>],
) -> Result<f64, D::Err> {
    let error = match tape {
        None => D::squared_error(output, target, samples)?.as_vec(),
        Some(tape) => {
            let error = D::squared_error(output.put_tape(tape), target, samples)?;
            let value = error.as_vec();
            error.try_backward()?;
            value
        }
    };
    Ok(f64::from(error[0]))
}
