//! The objective of the whole model: how far its predictions are from the dense model's, and the
//! gradients of that, by a backward pass that goes layer by layer from the end.

use std::{iter::zip, mem::take, ops::Range};

use barber_metric::{Dims, Needs};

use super::{Cost, Error, Pruning, Sampled, failed, members};
use crate::{
    calibration::Extent,
    checkpoint::Pruned,
    evaluate::{Head, LOGITS, hidden},
    executor::{
        Executor, PartShape, PartWeights, Pass, PassShape, Probe, Rows, Storage, Stream, Tokens,
        ops::{Ops, Trace},
    },
    family::{Decoder, Part},
    model::{self, Model},
    plan::Plan,
    random::SplitMix64,
    ranks::{Chunks, Sent, Split, Sums, Turn},
};

/// The mean over tokens of KL(dense ‖ sparse), the divergence of the pruned model's predictions from
/// the dense model's, on some samples.
pub(super) struct Objective<'a, D: Ops> {
    model: &'a Model<'a, D>,
    samples: Sampled<'a>,
    head: Head<'a, D>,
    /// The dense model's hidden states after the last layer.
    dense: Stream<D>,
}

/// What a linear layer's gradients consist of.
///
/// Traces are of this rank's runs of samples, by the run's index.
pub(super) struct Gradients<D: Ops> {
    /// Those of the sum over tokens of the divergence.
    pub(super) divergence: Vec<(usize, Trace<D>)>,
    /// Those of the cross-entropy of tokens that are drawn from the pruned model's own predictions,
    /// if they are wanted: their squares are the diagonal of its Fisher information.
    pub(super) drawn: Option<Vec<(usize, Trace<D>)>>,
    /// The ranks' shares of the runs.
    pub(super) chunks: Chunks,
}

impl<D: Ops> Gradients<D> {
    /// The gradient of the sum over tokens of the divergence, of this rank's [own
    /// rows](crate::ranks::Ranks::own_rows) of a matrix of this size, row-major. All ranks call it
    /// together.
    pub(super) fn own_rows(&self, model: &Model<'_, D>, dims: Dims) -> Result<Vec<f32>, D::Err> {
        let Executor { device, ranks, .. } = &model.executor;
        let mut sums = Sums::of_rows(ranks, dims.columns);
        let mut traces = self.divergence.iter().peekable();
        for Turn { runs, .. } in self.chunks.turns(0..usize::MAX) {
            let mut chunk = None;
            while let Some((_, trace)) = traces.next_if(|(run, _)| runs.contains(run)) {
                let sum = match &mut chunk {
                    Some(sum) => sum,
                    None => chunk.insert(device.nothing(dims.rows, dims.columns)?),
                };
                D::add_product(sum, &trace.gradient, &trace.input)?;
            }
            let chunk = chunk.map(D::sums).transpose()?;
            sums.add(chunk.map(|sum| ((), sum)).into_iter().collect());
        }
        let own = ranks.own_rows(dims.rows, 1).len() * dims.columns;
        Ok(sums.own().remove(&()).unwrap_or_else(|| vec![0.0; own]))
    }
}

/// What a forward pass leaves for the way back.
pub(super) struct Forward<D: Ops> {
    /// The hidden states before each layer, and after the last.
    boundaries: Vec<Stream<D>>,
    last: Stream<D>,
    /// The gradients of the sum over tokens of the divergence, of those after the last, by sample; none
    /// for the samples of other ranks.
    gradients: Vec<Vec<f32>>,
    /// The mean over tokens of the divergence.
    pub(super) divergence: f64,
}

/// Where a linear layer is: the indices of its decoder layer, of its part, and in the part.
pub(super) type At = (usize, usize, usize);

/// Steps of a stage from one measurement on the held-out samples to the next.
pub(super) const MEASURED: usize = 5;
/// Measurements without a fall after which a stage ends.
pub(super) const PATIENCE: usize = 4;

/// The turns in which the steps of a stage take the calibration samples.
#[derive(Clone, Copy)]
pub(super) struct Turns {
    samples: usize,
    /// Number of steps that take all samples once.
    count: usize,
}

impl Turns {
    /// Turns of so many `tokens` at most, of `samples` that have `all` tokens together. A turn has at
    /// least one sample.
    pub(super) fn new(tokens: usize, samples: usize, all: f64) -> Self {
        // The samples of the next step judge a step: they have to be others, where there are any.
        let count = ((all / tokens as f64) as usize).max(2).min(samples).max(1);
        Self { samples, count }
    }

    /// The samples of a step, from 0.
    pub(super) fn samples(self, step: usize) -> Range<usize> {
        let start = |turn| turn * self.samples / self.count;
        let turn = step % self.count;
        start(turn)..start(turn + 1)
    }
}

/// The operations of passes over the whole model, and what a stage that makes them holds.
pub(super) struct Work {
    /// The dense model's, on all samples.
    pub(super) dense: f64,
    /// Forward on the samples that judge.
    pub(super) judged: f64,
    /// Forward on the samples of a step.
    pub(super) forward: f64,
    /// Backward from the divergence, with the gradients of all pruned matrices.
    pub(super) backward: f64,
    /// Backward without gradients of matrices.
    pub(super) inputs: f64,
    /// Numbers of the weights and of the activations of a token, of the largest layer.
    layer: [f64; 2],
    /// Numbers of the head, of the logits at a time, and of the tokens of a step.
    head: f64,
    logits: f64,
    taken: f64,
    /// Number of weights of the pruned matrices, of their inputs and outputs, and of their rows.
    pruned: [f64; 3],
    /// How ranks share all samples, those that judge, and those of a step.
    splits: [Split; 3],
    /// Numbers of the dense model's last hidden states, which each rank gets.
    last: f64,
    /// The hidden states and the masks that wait.
    widths: Rows,
    /// The matrices of a pass through a layer.
    pass: Rows,
}

/// How often a stage makes each pass of its [`Work`], beside the dense model's.
pub(super) struct Passes {
    pub(super) judged: f64,
    pub(super) forward: f64,
    pub(super) backward: f64,
    pub(super) inputs: f64,
    /// Bytes that the ranks gather with each backward pass, for a row and for a weight.
    pub(super) gathered: [f64; 2],
}

impl Work {
    /// The work of a stage whose step takes so many `tokens` at most.
    pub(super) fn new(
        pruning: &Pruning<'_>,
        decoder: &Decoder,
        plan: &Plan,
        tokens: usize,
    ) -> Self {
        let Extent { samples, longest: sequence, .. } = pruning.calibration;
        let [calibration, held_out] = pruning.calibration.parts();
        let judged = if held_out > 0.0 { held_out } else { calibration };
        let taken = calibration / Turns::new(tokens, samples, calibration).count as f64;
        let head = (decoder.vocab_size * decoder.embedding.width) as f64;
        let ranks = pruning.ranks;
        let tokens = |calibration| Tokens { calibration, held_out: 0.0, sequence, ranks };
        let splits = [calibration, judged, taken].map(|of| tokens(of).split());
        // Products with the head: the divergence takes both models' logits, its gradient one more.
        let [of_judged, of_forward, of_inputs] =
            [(judged, 2.0), (taken, 3.0), (taken, 2.0)].map(|of| 2.0 * of.0 * of.1 * head);
        let size = pruning.stream_size as f64 / size_of::<f32>() as f64;
        let mut widths = Rows::default();
        // The dense model's, those that are judged, and a step's with their gradients; those between the
        // layers are in scratch space.
        let [of_judged_states, of_step] = [(judged, splits[1]), (4.0 * taken, splits[2])]
            .map(|(tokens, split)| tokens * split.fraction());
        let states = calibration + held_out + of_judged_states + of_step;
        widths.add(decoder.hidden_size, states * size);
        // The masks with the lowest divergence, or of the weights that change.
        widths.add(1, plan.weights(decoder)[0] as f64 / 32.0);
        let mut work = Self {
            dense: 0.0,
            judged: of_judged,
            forward: of_forward,
            backward: 0.0,
            inputs: of_inputs,
            layer: [0.0; 2],
            head,
            logits: LOGITS.min(sequence * decoder.vocab_size) as f64,
            taken: taken * splits[2].fraction(),
            pruned: [0.0; 3],
            splits,
            last: (calibration + held_out) * decoder.hidden_size as f64,
            widths,
            pass: Rows::default(),
        };
        for (layer, found) in decoder.layers.iter().enumerate() {
            let parts = Part::ALL.map(|part| PartShape::from(found.part(part)));
            let pass =
                |tokens| PassShape { needs_output: true, ..PassShape::new(parts.to_vec(), tokens) };
            let (all, none) = (members(plan, layer), vec![Vec::new(); Part::ALL.len()]);
            let backward = |members, of_pass: &mut Rows| {
                let probe = Some(Probe { members, needs: Needs::NOTHING, gradient: true });
                // The gradient of the layer's input is wanted too.
                let first = found.projections(Part::ALL[0]).split_last().map_or(&[][..], |of| of.1);
                let input: usize = first.iter().map(|of| of.dims.len()).sum();
                let pass = PassShape { probe, ..pass(tokens(taken)) };
                *of_pass = take(of_pass).or(&pass.matrices());
                pass.operations() + 2.0 * taken * input as f64
            };
            let dense = pass(tokens(calibration + held_out));
            work.pass = take(&mut work.pass).or(&dense.matrices());
            work.dense += dense.operations();
            work.judged += pass(tokens(judged)).operations();
            work.forward += pass(tokens(taken)).operations();
            work.backward += backward(&all, &mut work.pass);
            work.inputs += backward(&none, &mut work.pass);
            let projections = || Part::ALL.iter().flat_map(|part| found.projections(*part));
            let weights = projections().map(|of| of.dims.len() as f64).sum();
            let wide = projections().map(|of| (of.dims.rows + of.dims.columns) as f64).sum();
            for dims in plan.matrices(decoder, layer).map(|(_, of)| of.dims) {
                work.pruned[0] += dims.len() as f64;
                work.pruned[1] += (dims.rows + dims.columns) as f64;
                work.pruned[2] += dims.rows as f64;
            }
            work.layer = [work.layer[0].max(weights), work.layer[1].max(wide)];
        }
        work
    }

    /// The cost of a stage with these passes.
    pub(super) fn cost(self, passes: &Passes) -> Cost {
        let Passes { judged, forward, backward, inputs, gathered } = passes;
        let steps = forward * self.forward + backward * self.backward + inputs * self.inputs;
        let work = [self.dense, judged * self.judged, steps];
        let of_first = zip(work, self.splits).map(|(work, split)| work * split.fraction()).sum();
        let mut sent = self.splits[0].copies(self.last);
        let [weights, sides, rows] = self.pruned;
        // Each rank gets the gradients of its own rows alone.
        sent += self.splits[2].shares(weights).times(*backward);
        let bytes = gathered[0] * rows + gathered[1] * weights;
        sent += Sent::gathered(bytes, self.splits[2].ranks).times(*backward);
        // The squares of inputs and of the outputs' gradients.
        sent += self.splits[2].sums(sides).times(*inputs);
        let Self { layer: [weights, activations], head, logits, taken, widths, pass, .. } = self;
        let (waiting, size) = (widths.bytes(), size_of::<f32>() as f64);
        // The gradients of the divergence, and with statistics of inputs those of drawn tokens.
        let gradients = if *inputs > 0.0 { 2.0 } else { 1.0 };
        // Values and gradients of a layer, and the logits of both models with their gradient: one after
        // the other.
        let (traces, logits) = (gradients * taken * activations, 3.0 * logits);
        let most = (pass.bytes() + size * traces).max(size * logits);
        let mut widths = widths.and(&pass);
        widths.add(1, traces + logits);
        // The head is there twice while it is read, before all that.
        let held = (size * (2.0 * weights + head)).max(2.0 * size * head - most);
        let matrices = waiting + most;
        let (operations, gathered) = (work.iter().sum(), 0.0);
        let sweeps = 1.0 + judged + forward + backward;
        Cost { operations, of_first, sent, sweeps, held, gathered, matrices, waiting, widths }
    }
}

impl<'a, D: Ops> Objective<'a, D> {
    /// Runs the dense model on the samples.
    pub(super) fn new(model: &'a Model<'a, D>, samples: Sampled<'a>) -> Result<Self, Error> {
        let stream = model.embed(samples.ids, samples.held_out)?;
        let mut dense = hidden(model, &Pruned::dense(), stream, |_| ())?;
        // The samples of a step may be other ranks' than in the whole stream.
        model.executor.share(&mut dense).map_err(model::Error::from)?;
        Ok(Self { model, samples, head: Head::new(model)?, dense })
    }

    /// The tokens of some samples.
    pub(super) fn tokens(&self, samples: Range<usize>) -> f64 {
        self.samples.ids[samples].iter().map(|ids| ids.len() as f64).sum()
    }

    /// The mean over the tokens of some samples.
    pub(super) fn value(&self, pruned: &Pruned, samples: Range<usize>) -> Result<f64, Error> {
        let stream = self.model.embed(&self.samples.ids[samples.clone()], 0)?;
        let stream = hidden(self.model, pruned, stream, |_| ())?;
        let found = self.model.executor.of_samples(&stream, |i, states| {
            let dense = self.dense(samples.start + i)?;
            Ok::<_, model::Error>(vec![self.head.divergence(states, &dense, None)?])
        })?;
        Ok(found.into_iter().flatten().sum::<f64>() / self.tokens(samples))
    }

    /// Goes forward through the pruned model on some samples, so that it can go back.
    pub(super) fn forward(
        &self,
        pruned: &Pruned,
        samples: Range<usize>,
    ) -> Result<Forward<D>, Error> {
        let executor = &self.model.executor;
        let scratch = executor.storage.in_scratch();
        let (boundaries, last) =
            boundaries(self.model, pruned, &self.samples.ids[samples.clone()], &scratch)?;
        let mut gradients = vec![Vec::new(); samples.len()];
        let found = executor.of_samples(&last, |i, states| {
            let (dense, gradient) = (self.dense(samples.start + i)?, &mut gradients[i]);
            Ok::<_, model::Error>(vec![self.head.divergence(states, &dense, Some(gradient))?])
        })?;
        let sum: f64 = found.into_iter().flatten().sum();
        let divergence = sum / self.tokens(samples);
        Ok(Forward { boundaries, last, gradients, divergence })
    }

    /// Goes back through the pruned model. Shows `see` the gradients of the linear layers, from the
    /// last decoder layer to the first: those of `members`, the indices in each part of each layer.
    /// With `drawn` there are those of drawn tokens too.
    pub(super) fn backward(
        &self,
        forward: Forward<D>,
        pruned: &Pruned,
        members: &[Vec<Vec<usize>>],
        drawn: Option<SplitMix64>,
        see: &mut dyn FnMut(At, Gradients<D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let executor = &self.model.executor;
        let Forward { mut boundaries, last, gradients, .. } = forward;
        let by_run = |gradients: &[_]| {
            let found = executor.by_run(&last, gradients);
            found.map_err(model::Error::executor("output head"))
        };
        let mut divergence = by_run(&gradients)?;
        let drawn = drawn.map(|mut random| {
            let mut drawn = vec![Vec::new(); last.len()];
            // Each token takes one number, those of other ranks' samples too.
            let (width, mut tokens) = (self.model.decoder.hidden_size, 0);
            executor.each_sample(&last, |i, states| {
                let before = last.tokens_before(i);
                (tokens..before).for_each(|_| _ = random.bits());
                drawn[i] = self.head.drawn_gradient(states, &mut random)?;
                tokens = before + states.len() / width;
                Ok::<_, model::Error>(())
            })?;
            let gradients = drawn;
            by_run(&gradients)
        });
        let mut of_drawn = drawn.transpose()?;
        drop((last, gradients));
        for (layer, members) in members.iter().enumerate().rev() {
            let Some(before) = boundaries.pop() else { break };
            let parts = parts(self.model, layer, pruned)?;
            let backward = |gradients: &mut Vec<_>| {
                let traces = executor.backward(&parts, members, &before, gradients);
                traces.map_err(failed(layer, "backward pass"))
            };
            let mut drawn = of_drawn.as_mut().map(backward).transpose()?;
            let divergence = backward(&mut divergence)?;
            for (part, (linears, traces)) in zip(members, divergence).enumerate() {
                for (place, (linear, divergence)) in zip(linears, traces).enumerate() {
                    let drawn = drawn.as_mut().map(|of| take(&mut of[part][place]));
                    let chunks = before.chunks().clone();
                    see((layer, part, *linear), Gradients { divergence, drawn, chunks })?;
                }
            }
        }
        Ok(())
    }

    /// The dense model's hidden states of a sample after the last layer.
    fn dense(&self, sample: usize) -> Result<Vec<f32>, model::Error> {
        Ok(self.model.executor.sample(&self.dense, sample)?)
    }
}

/// The hidden states of samples before each layer, in `storage`, and after the last, so that a backward
/// pass can run the layers again.
pub(super) fn boundaries<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    samples: &[Vec<u32>],
    storage: &Storage,
) -> Result<(Vec<Stream<D>>, Stream<D>), Error> {
    let executor = &model.executor;
    let (mut boundaries, mut last) = (Vec::new(), model.embed(samples, 0)?);
    for layer in 0..model.decoder.layers.len() {
        let failed = || failed(layer, "forward pass");
        boundaries.push(executor.copy(&last, storage).map_err(failed())?);
        let parts = parts(model, layer, pruned)?;
        executor.run(Pass::advancing(&parts, &mut last)).map_err(failed())?;
    }
    Ok((boundaries, last))
}

/// The weights of a layer's parts.
pub(super) fn parts<D: Ops>(
    model: &Model<'_, D>,
    layer: usize,
    pruned: &Pruned,
) -> Result<Vec<PartWeights<D>>, model::Error> {
    Part::ALL.iter().map(|part| model.part(layer, *part, pruned)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{checkpoint::Reader, dtype::Dtype, mask::Mask};

    /// The gradients of the whole model's objective, of kept and pruned entries, in each layer.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for path in ["tests/conformance/tiny-llama", "tests/conformance/tiny-opt"] {
            let reader = Reader::open(Path::new(path)).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            let ids: Vec<Vec<u32>> =
                [3, 7].map(|by: u32| (0..12).map(|i| (i * by + 1) % 250).collect()).into();
            let mut pruned = Pruned::default();
            for linear in model.decoder.projections() {
                let mask = Mask::from_fn(linear.dims, |i| i % 3 != 0);
                pruned.masks.insert(linear.weight.clone(), mask);
            }
            let objective = Objective::new(&model, Sampled::from(&ids[..])).unwrap();
            let layers = &model.decoder.layers;
            let of = |layer: usize, part| 0..layers[layer].projections(part).len();
            let members: Vec<Vec<Vec<usize>>> = (0..layers.len())
                .map(|layer| Part::ALL.map(|part| of(layer, part).collect()).into())
                .collect();
            let mut found = Vec::new();
            let forward = objective.forward(&pruned, 0..2).unwrap();
            let value = objective.value(&pruned, 0..2).unwrap();
            assert!((forward.divergence - value).abs() < 1e-6 * value, "{value}");
            let see = &mut |at, gradients: Gradients<Cpu>| {
                let traces =
                    gradients.divergence.iter().map(|(_, trace)| trace.gradient().unwrap());
                let sum = traces.reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
                found.push((at, sum.unwrap()));
                Ok(())
            };
            objective.backward(forward, &pruned, &members, None, see).unwrap();
            let tokens = objective.tokens(0..2);
            assert_eq!(found.len(), model.decoder.projections().count());
            for ((layer, part, place), gradient) in found {
                let linear = &layers[layer].projections(Part::ALL[part])[place];
                let dense = model.values(linear).unwrap();
                // The largest gradient of a kept entry, and that of a pruned one.
                for rest in [1, 0] {
                    let entries = (0..dense.len()).filter(|i| usize::from(i % 3 != 0) == rest);
                    let size = |i: &usize| gradient[*i].abs();
                    let i = entries.max_by(|a, b| size(a).total_cmp(&size(b))).unwrap();
                    let shifted = |h: f32| {
                        let mut values = dense.clone();
                        values[i] = if rest == 1 { values[i] + h } else { h };
                        let mut shifted = pruned.copy(Path::new(".")).unwrap();
                        shifted.masks.get_mut(&linear.weight).unwrap().set(i, true);
                        let (name, dtype) = (&linear.weight, Some(Dtype::F32));
                        let dir = std::env::temp_dir();
                        shifted.change(&reader, name, &values, dtype, &dir).unwrap();
                        objective.value(&shifted, 0..2).unwrap() * tokens
                    };
                    let h = 4e-3;
                    let slope = (shifted(h) - shifted(-h)) / f64::from(2.0 * h);
                    let error = (slope - f64::from(gradient[i])).abs();
                    let name = &linear.weight;
                    assert!(
                        error < 2e-3 + 0.02 * slope.abs(),
                        "{name} {i}: {slope} {}",
                        gradient[i]
                    );
                }
            }
        }
    }
}
