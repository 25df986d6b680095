//! What the calibration samples tell of one part's weights.

use std::{ops::Range, sync::Arc};

use barber_metric::{Dims, LayerStats, Needs};
use dfdx::{
    tensor::{OwnedTape, Tape},
    tensor_ops::Backward,
};
use rayon::prelude::*;

use super::{
    Batch, Error, Executor, PartWeights, Store, Stream,
    forward::{Watch, forward, inner},
    inputs::{Adding, InputSums},
    known::{Changes, Knowing, Known},
    ops::{InputGradient, Matrix, Ops},
};
use crate::{family::Part, number::or_nan};

/// The statistics of one weight matrix; those that were not asked for are `None`.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Mean over samples of the squared gradient, [rows, columns].
    pub squared_gradient: Option<Vec<f32>>,
    /// Mean over samples of Σ x² over a sample's tokens, `[columns]`.
    pub input_square: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ x xᵀ over a sample's tokens, [columns, columns], symmetric.
    pub gram: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ (x̃ − x) xᵀ over a sample's tokens, [columns, columns], where x̃ is
    /// the input on another stream.
    pub departure: Option<Arc<Vec<f32>>>,
}

impl Statistics {
    /// With the matrix that they are of: its name, its shape and its weights, row-major.
    pub fn of<'a>(&'a self, name: &'a str, dims: Dims, weight: &'a [f32]) -> LayerStats<'a> {
        LayerStats {
            name,
            dims,
            weight,
            mask: &[],
            squared_gradient: self.squared_gradient.as_deref(),
            input_square: self.input_square.as_ref().map(|values| &values[..]),
            gram: self.gram.as_ref().map(|values| &values[..]),
        }
    }
}

/// Mean over samples of the squared error between outputs and their targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Loss {
    /// Of the samples that the statistics are of.
    #[serde(deserialize_with = "or_nan")]
    pub calibration: f64,
    /// Of those that are held out, if there are any.
    pub held_out: Option<f64>,
}

impl Loss {
    /// Whether it is lower than another: on the samples that are held out, if there are any, and
    /// on the others at least not higher.
    pub fn improves(self, on: Self) -> bool {
        match (self.held_out, on.held_out) {
            (Some(own), Some(other)) => own < other && self.calibration <= on.calibration,
            _ => self.calibration < on.calibration,
        }
    }

    /// Adds the loss of a run.
    fn add(&mut self, held_out: bool, loss: f64) {
        if held_out {
            *self.held_out.get_or_insert_default() += loss;
        } else {
            self.calibration += loss;
        }
    }

    /// The mean over a stream's samples, of the sum over them.
    fn mean<D: Ops>(mut self, stream: &Stream<D>) -> Self {
        self.calibration /= stream.calibration as f64;
        let held_out = stream.len() - stream.calibration;
        self.held_out = self.held_out.map(|sum| sum / held_out as f64);
        self
    }
}

/// What [`Executor::measure`] finds.
#[derive(Debug)]
pub struct Measured {
    /// Of the outputs.
    pub loss: Loss,
    /// One per linear layer of each part.
    pub statistics: Vec<Vec<Statistics>>,
}

/// The output of a run of parts: one part's own, without the residual; or the hidden states after
/// several.
pub(super) fn run<D: Ops, T: Tape<f32, D> + 'static>(
    parts: &[PartWeights<D>],
    batch: &Batch<D>,
    tape: T,
    watch: &mut dyn Watch<D>,
) -> Result<Matrix<D, T>, D::Err> {
    let (first, positions) = (&parts[0], &batch.positions);
    let input = first.normalise(batch.states.clone())?.put_tape(tape);
    let output = forward(first, positions, input, InputGradient::Skipped, watch)?;
    if parts.len() == 1 {
        return Ok(output);
    }
    let mut states = first.residual(batch.states.clone(), output)?;
    for part in &parts[1..] {
        let (x, tape) = states.split_tape();
        let input = part.normalise(x.clone().put_tape(tape))?;
        let output = forward(part, positions, input, InputGradient::Wanted, watch)?;
        states = part.residual(x, output)?;
    }
    Ok(states)
}

/// Two that watch: one inputs, the other outputs.
struct Both<'a, D: Ops, O> {
    inputs: Adding<'a, D>,
    outputs: O,
}

impl<D: Ops, O: Watch<D>> Watch<D> for Both<'_, D, O> {
    fn input(&mut self, part: Part, layers: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        self.inputs.input(part, layers.clone(), x)?;
        self.outputs.input(part, layers, x)
    }

    fn output(&mut self, layer: usize, y: &Matrix<D>) {
        self.outputs.output(layer, y);
    }

    fn known(&mut self, layer: usize, x: &Matrix<D>) -> Result<Option<Matrix<D>>, D::Err> {
        self.outputs.known(layer, x)
    }

    fn known_attention(&mut self) -> Option<Matrix<D>> {
        self.outputs.known_attention()
    }
}

impl<D: Ops> Executor<D> {
    /// What `needs` asks for of the inputs of the layers in `members`, a list for each of some
    /// consecutive parts, in a forward pass of these. The last layer's output is nobody's input, and
    /// is not computed.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn inputs(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        members: &[Vec<usize>],
        needs: Needs,
    ) -> Result<Vec<Vec<Statistics>>, Error> {
        let mut sums = sums(parts, members, needs);
        for index in stream.calibrating() {
            let batch = self.batch(stream, index)?;
            let mut watch = Adding::new(&mut sums, &batch.samples);
            let mut run = || {
                let (last, before) = parts.split_last().unwrap_or_else(|| unreachable!("a part"));
                let mut states = batch.states.clone();
                for part in before {
                    let input = part.normalise(states.clone())?;
                    let skipped = InputGradient::Skipped;
                    let output = forward(part, &batch.positions, input, skipped, &mut watch)?;
                    states = part.residual(states, output)?;
                }
                let input = last.normalise(states)?;
                inner(last, &batch.positions, input, InputGradient::Skipped, &mut watch)
            };
            run().map_err(Error::device)?;
            batch.check_inputs(parts, watch.broken)?;
        }
        finish(parts, sums, stream.calibration)
    }

    /// The same of one part, and what its linear layers give, as far as that fits into memory: with
    /// it, [`Executor::measure`] need not compute it again.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn inputs_and_outputs(
        &self,
        part: &PartWeights<D>,
        stream: &Stream<D>,
        members: &[usize],
        needs: Needs,
    ) -> Result<(Vec<Statistics>, Known<D>), Error> {
        let parts = std::slice::from_ref(part);
        let members = &[members.to_vec()];
        let mut notes = self.noting(part, stream);
        let mut sums = sums(parts, members, needs);
        for index in 0..stream.runs.len() {
            let (noted, held_out) = (notes.wants(index), stream.held_out(index));
            if held_out && !noted {
                continue;
            }
            let batch = self.batch(stream, index)?;
            let samples = if held_out { &[][..] } else { &batch.samples };
            let mut inputs = Adding::new(&mut sums, samples);
            if !noted {
                // The last layer's output is nobody's input.
                let input = part.normalise(batch.states.clone());
                let skipped = InputGradient::Skipped;
                input
                    .and_then(|x| inner(part, &batch.positions, x, skipped, &mut inputs))
                    .map_err(Error::device)?;
                batch.check_inputs(parts, inputs.broken)?;
                continue;
            }
            let mut watch = Both { inputs, outputs: notes.of_run(index) };
            run(parts, &batch, Default::default(), &mut watch)
                .map(|_: Matrix<D>| ())
                .map_err(Error::device)?;
            batch.check_inputs(parts, watch.inputs.broken)?;
            notes.add(index, watch.outputs)?;
        }
        let mut statistics = finish(parts, sums, stream.calibration)?;
        Ok((statistics.swap_remove(0), notes.known))
    }

    /// Runs parts on each sample, compares their outputs with the `targets`, and gathers what is
    /// needed of the layers in `members`, a list for each part. The gradients are those of a
    /// sample's mean squared error with respect to the parts' weights; they are squared sample by
    /// sample, then averaged (LLM-Barber, arXiv 2408.10631, where the parts are the dense ones and
    /// the targets the outputs of the sparse ones). Afterwards the outputs stand in the targets'
    /// place.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn measure(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        targets: &mut Store<D>,
        members: &[Vec<usize>],
        needs: Needs,
        known: Option<&Known<D>>,
    ) -> Result<Measured, Error> {
        self.measure_each(parts, stream, members, needs, known, |index, output| {
            let target = targets.get(index, &self.device)?;
            targets.put(index, output)?;
            Ok(target)
        })
    }

    /// The same, which leaves the targets as they are.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn measure_against(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        targets: &Store<D>,
        members: &[Vec<usize>],
        needs: Needs,
    ) -> Result<Measured, Error> {
        let target = |index, _| targets.get(index, &self.device);
        self.measure_each(parts, stream, members, needs, None, target)
    }

    /// Measures a run at a time; `target` is given its outputs, and tells what they are compared
    /// with.
    fn measure_each(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        members: &[Vec<usize>],
        needs: Needs,
        known: Option<&Known<D>>,
        mut target: impl FnMut(usize, Matrix<D>) -> Result<Matrix<D>, Error>,
    ) -> Result<Measured, Error> {
        let mut inputs = sums(parts, members, needs);
        let mut squares: Vec<Vec<Option<D::Sum>>> =
            parts.iter().map(|part| part.linears.iter().map(|_| None).collect()).collect();
        let mut sum = Loss::default();
        for index in 0..stream.runs.len() {
            let (batch, held_out) = (self.batch(stream, index)?, stream.held_out(index));
            let outputs = self.known(known, index)?;
            let samples = if held_out { &[][..] } else { &batch.samples };
            let inputs = Adding::new(&mut inputs, samples);
            let mut watch = Both { inputs, outputs };
            if held_out || !needs.squared_gradient {
                let output = run(parts, &batch, Default::default(), &mut watch);
                let output: Matrix<D> = output.map_err(Error::device)?;
                batch.check_inputs(parts, watch.inputs.broken)?;
                let target = target(index, output.clone())?;
                let loss = D::squared_error(output, &target, &batch.samples);
                sum.add(held_out, f64::from(loss.map_err(Error::device)?.as_vec()[0]));
                continue;
            }
            let traced = parts.iter().zip(members).map(|(part, members)| part.traced(members));
            let traced: Vec<_> = traced.collect();
            let output = run(&traced, &batch, OwnedTape::default(), &mut watch);
            let (output, tape) = output.map_err(Error::device)?.split_tape();
            batch.check_inputs(parts, watch.inputs.broken)?;
            let target = target(index, output.clone())?;
            let backward = || {
                let loss = D::squared_error(output.put_tape(tape), &target, &batch.samples)?;
                sum.add(false, f64::from(loss.as_vec()[0]));
                loss.try_backward()?;
                for (part, squares) in traced.iter().zip(&mut squares) {
                    let mut layers = Vec::new();
                    for (linear, sum) in part.linears.iter().zip(squares) {
                        let Some(trace) = linear.take_trace() else { continue };
                        let sum = match sum {
                            Some(sum) => sum,
                            None => {
                                let empty = self.device.nothing(linear.outputs(), linear.inputs());
                                sum.insert(empty?)
                            }
                        };
                        layers.push((sum, trace));
                    }
                    D::add_squared_gradients(&mut layers, &batch.samples)?;
                }
                Ok(())
            };
            backward().map_err(|e: D::Err| Error::device(e))?;
        }
        let mut statistics = finish(parts, inputs, stream.calibration)?;
        for (statistics, squares) in statistics.iter_mut().zip(squares) {
            for (statistics, squares) in statistics.iter_mut().zip(squares) {
                let samples = stream.calibration as f32;
                let mean = |mut sums: Vec<f32>| {
                    sums.par_iter_mut().for_each(|sum| *sum /= samples);
                    sums
                };
                let squares = squares.map(D::sums).transpose().map_err(Error::device)?;
                statistics.squared_gradient = squares.map(mean);
            }
        }
        Ok(Measured { loss: sum.mean(stream), statistics })
    }

    /// ∂L/∂W of the layers in `members`, [rows, columns] each, a list for each part; L is the sum of
    /// the mean squared errors of the samples of one of a stream's calibration runs.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn gradients(
        &self,
        parts: &[PartWeights<D>],
        (stream, index): (&Stream<D>, usize),
        targets: &Store<D>,
        members: &[Vec<usize>],
    ) -> Result<Vec<Vec<Vec<f32>>>, Error> {
        let (batch, target) = (self.batch(stream, index)?, targets.get(index, &self.device)?);
        let traced = parts.iter().zip(members).map(|(part, members)| part.traced(members));
        let traced: Vec<_> = traced.collect();
        let backward = || {
            let output = run(&traced, &batch, OwnedTape::default(), &mut ())?;
            D::squared_error(output, &target, &batch.samples)?.try_backward()?;
            let mut gradients = Vec::new();
            for (part, members) in traced.iter().zip(members) {
                let mut of_part = Vec::new();
                for &i in members {
                    let linear = &part.linears[i];
                    let mut sum = self.device.nothing(linear.outputs(), linear.inputs())?;
                    if let Some(trace) = linear.take_trace() {
                        D::add_product(&mut sum, &trace.gradient, &trace.input)?;
                    }
                    of_part.push(D::sums(sum)?);
                }
                gradients.push(of_part);
            }
            Ok(gradients)
        };
        backward().map_err(|e: D::Err| Error::device(e))
    }

    /// The outputs of a run of parts on each sample: one part's own, without the residual; or the
    /// hidden states after several.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn outputs(&self, parts: &[PartWeights<D>], stream: &Stream<D>) -> Result<Store<D>, Error> {
        self.known_outputs(parts, stream, None)
    }

    /// The same, where it may be known what the linear layers of a part give.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn known_outputs(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        known: Option<&Known<D>>,
    ) -> Result<Store<D>, Error> {
        let mut outputs = self.storage.store(stream.runs.len());
        for index in 0..stream.runs.len() {
            let batch = self.batch(stream, index)?;
            let mut watch = self.known(known, index)?;
            let output = run(parts, &batch, Default::default(), &mut watch);
            outputs.put(index, output.map_err(Error::device)?)?;
        }
        Ok(outputs)
    }

    /// The outputs of one part, and what its first layers give, for [`Executor::advance`].
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn noted_outputs(
        &self,
        part: &PartWeights<D>,
        stream: &Stream<D>,
    ) -> Result<(Store<D>, Known<D>), Error> {
        let mut notes = self.noting_first(part, stream);
        let mut outputs = self.storage.store(stream.runs.len());
        for index in 0..stream.runs.len() {
            let batch = self.batch(stream, index)?;
            let mut watch = notes.of_run(index);
            let output = run(std::slice::from_ref(part), &batch, Default::default(), &mut watch);
            outputs.put(index, output.map_err(Error::device)?)?;
            notes.add(index, watch)?;
        }
        Ok((outputs, notes.known))
    }

    /// The [`Executor::loss`] of the samples that are held out, if there are any.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn held_out_loss(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        targets: &Store<D>,
    ) -> Result<Option<f64>, Error> {
        let mut sum = Loss::default();
        let runs = stream.calibrating().end..stream.runs.len();
        self.each_output(parts, stream, runs, |batch, output| {
            sum.add(true, self.batch_loss(batch, output, targets)?);
            Ok(())
        })?;
        Ok(sum.mean(stream).held_out)
    }

    /// The mean over samples of the mean squared difference between the parts' outputs and
    /// `targets`.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn loss(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        targets: &Store<D>,
    ) -> Result<Loss, Error> {
        let mut sum = Loss::default();
        self.each_output(parts, stream, 0..stream.runs.len(), |batch, output| {
            sum.add(stream.held_out(batch.index), self.batch_loss(batch, output, targets)?);
            Ok(())
        })?;
        Ok(sum.mean(stream))
    }

    /// The mean over tokens of ‖y − t‖² / ‖t‖² for the parts' outputs y and their `targets` t.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn change(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        targets: &Store<D>,
    ) -> Result<f64, Error> {
        let mut sum = 0.0;
        self.each_output(parts, stream, 0..stream.runs.len(), |batch, output| {
            let (width, y) = (output.shape().1, output.on_host().map_err(Error::device)?);
            let t = targets.get(batch.index, &self.device)?.on_host().map_err(Error::device)?;
            for (y, t) in y.chunks(width).zip(t.chunks(width)) {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = y.iter().zip(t).map(|(y, t)| square(y - t)).sum();
                let whole: f64 = t.iter().map(|t| square(*t)).sum();
                sum += if whole > 0.0 { off / whole } else { 0.0 };
            }
            Ok(())
        })?;
        Ok(sum / stream.tokens().max(1) as f64)
    }

    /// Moves the hidden states on through a part.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn advance(&self, part: &PartWeights<D>, stream: &mut Stream<D>) -> Result<(), Error> {
        self.advance_each(part, stream, |_| Ok(Knowing::default()), |_, _| Ok(()))
    }

    /// The same; returns the [`Executor::loss`] of the part's outputs. Where it is known what the
    /// first layers gave for these states, and what changed of their weights, they are not computed
    /// again.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn advance_towards(
        &self,
        part: &PartWeights<D>,
        stream: &mut Stream<D>,
        targets: &Store<D>,
        mut before: Option<(&mut Known<D>, &Changes<D>)>,
    ) -> Result<Loss, Error> {
        let (mut sum, calibrating) = (Loss::default(), stream.calibrating());
        let knowing = |index: usize| match &mut before {
            Some((known, changes)) => known.corrected(index, &self.device, changes),
            None => Ok(Knowing::default()),
        };
        self.advance_each(part, stream, knowing, |batch, output| {
            let loss = self.batch_loss(batch, output, targets)?;
            sum.add(!calibrating.contains(&batch.index), loss);
            Ok(())
        })?;
        Ok(sum.mean(stream))
    }

    fn advance_each<'a>(
        &self,
        part: &PartWeights<D>,
        stream: &mut Stream<D>,
        mut knowing: impl FnMut(usize) -> Result<Knowing<'a, D>, Error>,
        mut see: impl FnMut(&Batch<D>, Matrix<D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for index in 0..stream.runs.len() {
            let (batch, mut watch) = (self.batch(stream, index)?, knowing(index)?);
            let output = run(std::slice::from_ref(part), &batch, Default::default(), &mut watch);
            let output: Matrix<D> = output.map_err(Error::device)?;
            see(&batch, output.clone())?;
            let states = part.residual(batch.states.clone(), output).map_err(Error::device)?;
            batch.check_states(part, &states)?;
            stream.states.put(index, states)?;
        }
        Ok(())
    }

    /// Moves the hidden states on through a part whose outputs are known.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn advance_by(
        &self,
        part: &PartWeights<D>,
        stream: &mut Stream<D>,
        outputs: &Store<D>,
    ) -> Result<(), Error> {
        for index in 0..stream.runs.len() {
            let batch = self.batch(stream, index)?;
            let output = outputs.get(index, &self.device)?;
            let states = part.residual(batch.states.clone(), output).map_err(Error::device)?;
            batch.check_states(part, &states)?;
            stream.states.put(index, states)?;
        }
        Ok(())
    }

    /// Blends outputs: `targets` becomes (1 − `share`) of itself and `share` of `other`.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn blend(&self, targets: &mut Store<D>, other: &Store<D>, share: f32) -> Result<(), Error> {
        for index in 0..targets.len() {
            let (a, b) = (targets.get(index, &self.device)?, other.get(index, &self.device)?);
            targets.put(index, D::blend(&a, &b, share).map_err(Error::device)?)?;
        }
        Ok(())
    }

    fn each_output(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        runs: Range<usize>,
        mut see: impl FnMut(&Batch<D>, Matrix<D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for index in runs {
            let batch = self.batch(stream, index)?;
            let output = run(parts, &batch, Default::default(), &mut ());
            see(&batch, output.map_err(Error::device)?)?;
        }
        Ok(())
    }

    fn known<'a>(&self, known: Option<&'a Known<D>>, run: usize) -> Result<Knowing<'a, D>, Error> {
        known.map_or_else(|| Ok(Knowing::default()), |known| known.of_run(run, &self.device))
    }

    fn batch_loss(
        &self,
        batch: &Batch<D>,
        output: Matrix<D>,
        targets: &Store<D>,
    ) -> Result<f64, Error> {
        let target = targets.get(batch.index, &self.device)?;
        let loss = D::squared_error(output, &target, &batch.samples).map_err(Error::device)?;
        Ok(f64::from(loss.as_vec()[0]))
    }
}

pub(super) fn sums<D: Ops>(
    parts: &[PartWeights<D>],
    members: &[Vec<usize>],
    needs: Needs,
) -> Vec<InputSums<D>> {
    let parts = parts.iter().zip(members);
    parts.map(|(part, members)| InputSums::new(part.part, members, needs)).collect()
}

pub(super) fn finish<D: Ops>(
    parts: &[PartWeights<D>],
    sums: Vec<InputSums<D>>,
    samples: usize,
) -> Result<Vec<Vec<Statistics>>, Error> {
    let parts = parts.iter().zip(sums);
    let of = |(part, sums): (&PartWeights<D>, InputSums<D>)| {
        let mut statistics = vec![Statistics::default(); part.linears.len()];
        sums.finish(samples, &mut statistics).map_err(Error::device)?;
        Ok(statistics)
    };
    parts.map(of).collect()
}
