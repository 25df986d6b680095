//! Distillation: new values for the kept weights of the whole model, which learns the dense model's
//! predictions.
//!
//! The objective is that of end-to-end swaps, the mean over tokens of KL(dense ‖ sparse), and so are
//! its gradients. A step takes some samples in turn and moves each kept weight down its gradient by
//! Adam (arXiv 1412.6980); the size of the steps falls linearly to zero. The next forward pass sees the
//! weights in the format that they are written in, while what is below its precision adds up. The
//! values with the lowest divergence on the held-out samples are the result: with few calibration
//! tokens, later ones fit these and nothing else.

use std::{collections::BTreeMap, path::Path};

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Described, Error, ModelState, RunModel, SavedStage, Shares, Stage, StageEvent, StageState,
    Step, Watch, Wrong, bytes, numbers, own_rows::OwnRows, wrong_counts, wrong_step_size,
};
use crate::{
    buffer::recycle,
    checkpoint::Pruned,
    dtype::Dtype,
    executor::{
        self,
        ops::{Ops, Products},
    },
    family::{Decoder, Projection},
    mask::Mask,
    model::Model,
    plan::Plan,
    prune::{
        Cost, Pruning, Tally, failed, members,
        objective::{At, Gradients, MEASURED, Objective, PATIENCE, Passes, Turns, Work},
    },
};

/// Distillation, and its keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Distill {
    /// Maximum number of steps. The stage ends earlier if the divergence on the held-out samples no
    /// longer falls.
    #[schemars(range(min = 1))]
    pub steps: usize,
    /// Size of the first step, as a fraction of the root mean square of the matrix's weights.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub step_size: f64,
    /// Number of calibration tokens of a step: those of some samples, taken in turn. A step takes at
    /// least one sample, and at most half of them.
    #[schemars(range(min = 1))]
    pub tokens: usize,
}

impl Default for Distill {
    fn default() -> Self {
        Self { steps: 60, step_size: 0.0002, tokens: 1024 }
    }
}

/// The decays of Adam's running means of the gradients and of their squares: there are few steps.
const DECAYS: [f32; 2] = [0.9, 0.95];

impl Stage for Distill {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        let counts = wrong_counts([("steps", self.steps), ("tokens", self.tokens)]);
        counts.chain(wrong_step_size("step_size", self.step_size, "0.0002 is usual")).collect()
    }

    fn describe(&self, _: &Described<'_>) -> String {
        let Self { steps, step_size, tokens } = self;
        format!(
            "distill, at most {steps} steps of {tokens} tokens, step size {step_size}: kept weights change"
        )
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn count(&self, _: &mut Tally<'_>) {}

    fn model_cost(&self, pruning: &Pruning<'_>, decoder: &Decoder, plan: &Plan) -> Cost {
        let work = Work::new(pruning, decoder, plan, self.tokens);
        let measured = (1 + self.steps.div_ceil(MEASURED)) as f64;
        let steps = self.steps as f64;
        // Each rank sends the new weights of its rows.
        let gathered = [0.0, pruning.weight_size as f64];
        work.cost(&Passes {
            judged: measured,
            forward: steps,
            backward: steps,
            inputs: 0.0,
            gathered,
        })
    }

    // The stage's cost has what ranks send.
    fn shares(&self) -> Option<Shares> {
        Some(Shares::Rows(0.0))
    }

    fn choices(&self) -> usize {
        self.steps
    }
}

impl RunModel for Distill {
    const HELP: &'static str = "new values for the kept weights, by the gradient of the predictions' \
                                divergence from the dense model's";

    fn run<D: Ops>(
        &self,
        state: &mut ModelState<'_, D>,
        saved: Option<&mut dyn SavedStage>,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        let ModelState { model, plan, samples, dtype, scratch, ref mut pruned } = *state;
        let calibration = samples.calibration().len();
        if calibration == 0 {
            return Ok(());
        }
        let before = Products::so_far();
        let objective = Objective::new(model, samples)?;
        let judged = samples.judging();
        let members: Vec<_> = (0..plan.layers.len()).map(|layer| members(plan, layer)).collect();
        let mut run = Steps::new(self, model, plan, (dtype, scratch));
        match saved {
            Some(saved) => {
                run.read(pruned, saved)?;
                watch(StageEvent::Repeated(Products::so_far() - before))?;
            }
            None => {
                run.begin(pruned)?;
                run.lowest = objective.value(pruned, judged.clone())?;
                let step = Step::of_values(0, None, Some(run.lowest));
                watch(StageEvent::Step(&step, pruned, &run))?;
            }
        }
        let turns = Turns::new(self.tokens, calibration, objective.tokens(0..calibration));
        while run.number < self.steps && run.patience > 0 {
            let taken = turns.samples(run.number);
            run.number += 1;
            let forward = objective.forward(pruned, taken.clone())?;
            let divergence = forward.divergence;
            if !divergence.is_finite() {
                return Err(Error::Divergence { divergence });
            }
            let tokens = objective.tokens(taken);
            objective.backward(forward, pruned, &members, None, &mut |at, gradients| {
                run.matrix(at, gradients, tokens as f32)
            })?;
            run.round(pruned)?;
            let measured = run.number.is_multiple_of(MEASURED) || run.number == self.steps;
            let held_out = measured.then(|| objective.value(pruned, judged.clone())).transpose()?;
            match held_out {
                Some(found) if found < run.lowest => {
                    (run.lowest, run.patience) = (found, PATIENCE);
                    run.keep(pruned)?;
                }
                Some(_) => run.patience -= 1,
                None => {}
            }
            let step = Step::of_values(run.number, Some(divergence), held_out);
            watch(StageEvent::Step(&step, pruned, &run))?;
        }
        run.put_back(pruned)
    }
}

/// A matrix of the model whose kept weights change.
struct Matrix<'a> {
    /// Index into the stores.
    number: usize,
    linear: &'a Projection,
    /// The weights that change: the others keep their values.
    free: Mask,
    /// Size of the first step.
    rate: f32,
}

/// The stage as it goes on.
struct Steps<'a, D: Ops> {
    settings: &'a Distill,
    model: &'a Model<'a, D>,
    /// The format of the result's weights, and the directory of the scratch file that has them.
    dtype: Option<Dtype>,
    scratch: &'a Path,
    /// Number of steps so far.
    number: usize,
    /// The lowest divergence on the held-out samples so far, and the weights that had it.
    lowest: f64,
    best: Pruned,
    /// Number of measurements without a fall after which the stage ends.
    patience: usize,
    matrices: BTreeMap<At, Matrix<'a>>,
    /// The weights, and the running means of their gradients and of the squares of these.
    values: OwnRows<'a, D>,
    means: [OwnRows<'a, D>; 2],
}

impl<'a, D: Ops> Steps<'a, D> {
    fn new(
        settings: &'a Distill,
        model: &'a Model<'a, D>,
        plan: &'a Plan,
        (dtype, scratch): (Option<Dtype>, &'a Path),
    ) -> Self {
        let mut matrices = BTreeMap::new();
        for layer in 0..plan.layers.len() {
            for (member, linear) in plan.matrices(&model.decoder, layer) {
                let (number, free) = (matrices.len(), Mask::kept_everywhere(linear.dims));
                let matrix = Matrix { number, linear, free, rate: 0.0 };
                matrices.insert((layer, member.part as usize, member.linear), matrix);
            }
        }
        let storage = model.executor.storage.in_scratch();
        let (values, means) = (storage.exact(), [storage.half(), storage.half()]);
        let of_rows = |storage| OwnRows::new(model, &storage, matrices.len());
        let (values, means) = (of_rows(values), means.map(of_rows));
        Self {
            settings,
            model,
            dtype,
            scratch,
            number: 0,
            lowest: f64::INFINITY,
            best: Pruned::default(),
            patience: PATIENCE,
            matrices,
            values,
            means,
        }
    }

    /// Begins with the present weights.
    fn begin(&mut self, pruned: &Pruned) -> Result<(), Error> {
        let model = self.model;
        for (at, of) in &mut self.matrices {
            let dense = model.values(of.linear)?;
            let values = match pruned.values(&of.linear.weight)? {
                Some(changed) => changed,
                None => dense.clone(),
            };
            of.frees(pruned.masks.get(&of.linear.weight), &dense, self.settings.step_size);
            recycle(dense);
            let put = self.values.put_all(of.number, of.linear.dims, &values);
            put.map_err(failed(at.0, "weights"))?;
            recycle(values);
        }
        self.keep(pruned)
    }

    /// Moves the weights of a matrix down the gradient of a step of so many tokens.
    fn matrix(&mut self, at: At, gradients: Gradients<D>, tokens: f32) -> Result<(), Error> {
        let Some(of) = self.matrices.get(&at) else { return Ok(()) };
        let (layer, dims) = (at.0, of.linear.dims);
        let gradient = gradients.own_rows(self.model, dims);
        let gradient =
            gradient.map_err(|e| failed(layer, "gradients")(executor::Error::device(e)))?;
        let get =
            |store: &OwnRows<'_, D>| store.get(of.number, dims).map_err(failed(layer, "gradients"));
        let mut values = get(&self.values)?;
        let mut means = match self.number {
            1 => [vec![0.0; values.len()], vec![0.0; values.len()]],
            _ => [get(&self.means[0])?, get(&self.means[1])?],
        };
        let [mean, square] = &mut means;
        let left = (self.settings.steps + 1 - self.number) as f32 / self.settings.steps as f32;
        let rate = of.rate * left;
        let fixes = DECAYS.map(|decay| 1.0 - decay.powi(self.number as i32));
        let (free, first) = (&of.free, self.values.weights(dims).start);
        let each = values.par_iter_mut().zip(mean.par_iter_mut().zip(square.par_iter_mut()));
        each.zip(&gradient).enumerate().for_each(|(i, ((w, (mean, square)), g))| {
            let g = g / tokens;
            *mean = DECAYS[0] * *mean + (1.0 - DECAYS[0]) * g;
            *square = DECAYS[1] * *square + (1.0 - DECAYS[1]) * g * g;
            if free.get(first + i) {
                // Smaller gradients have squares below the smallest normal f32.
                let scale = (*square / fixes[1]).sqrt() + f32::MIN_POSITIVE.sqrt();
                *w -= rate * (*mean / fixes[0]) / scale;
            }
        });
        recycle(gradient);
        let number = of.number;
        let put = self.values.put(number, dims, values);
        put.map_err(failed(layer, "weights"))?;
        for (store, values) in self.means.iter_mut().zip(means) {
            store.put(number, dims, values).map_err(failed(layer, "weights"))?;
        }
        Ok(())
    }

    /// Rounds the weights to the format of the result, with which the model goes on.
    fn round(&self, pruned: &mut Pruned) -> Result<(), Error> {
        let Model { reader, executor, .. } = self.model;
        for (at, of) in &self.matrices {
            let Projection { weight: name, dims, .. } = of.linear;
            let values = self.values.get(of.number, *dims).map_err(failed(at.0, "weights"))?;
            let rounded = Pruned::rounded(reader, name, &values, self.dtype);
            let first = self.values.weights(*dims).start;
            let (dtype, own) = rounded.map_err(|e| e.in_part_at(first))?;
            pruned.overwrite(name, dtype, &executor.ranks.bytes_of_rows(own), self.scratch)?;
            recycle(values);
        }
        Ok(())
    }

    /// Keeps the present weights as the best.
    fn keep(&mut self, pruned: &Pruned) -> Result<(), Error> {
        for of in self.matrices.values() {
            let name = &of.linear.weight;
            if let Some((dtype, bytes)) = pruned.bytes(name)? {
                self.best.overwrite(name, dtype, &bytes, self.scratch)?;
            }
        }
        Ok(())
    }

    /// Ends with the best weights.
    fn put_back(&self, pruned: &mut Pruned) -> Result<(), Error> {
        for of in self.matrices.values() {
            let name = &of.linear.weight;
            match self.best.bytes(name)? {
                Some((dtype, bytes)) => pruned.overwrite(name, dtype, &bytes, self.scratch)?,
                None => drop(pruned.restore(name)),
            }
        }
        Ok(())
    }

    /// Continues from a saved state.
    fn read(&mut self, pruned: &mut Pruned, saved: &mut dyn SavedStage) -> Result<(), Error> {
        let found = numbers(&saved.next()?);
        let [number, lowest, patience] = found[..] else { return Err(saved.damaged()) };
        (self.number, self.lowest, self.patience) = (number as usize, lowest, patience as usize);
        let model = self.model;
        for (at, of) in &mut self.matrices {
            let (name, dims) = (&of.linear.weight, of.linear.dims);
            let mask = Mask::from_bytes(dims, &saved.next()?).ok_or_else(|| saved.damaged())?;
            let dense = model.values(of.linear)?;
            let best = saved.next()?;
            match format_of(&saved.next()?) {
                Some(dtype) if best.len() == dtype.size() * dims.len() => {
                    self.best.overwrite(name, dtype, &best, self.scratch)?;
                }
                None if best.is_empty() => {}
                _ => return Err(saved.damaged()),
            }
            let mut stores = [None, None, None];
            for (found, dtype) in stores.iter_mut().zip([Dtype::F32, Dtype::Bf16, Dtype::Bf16]) {
                let values = dtype.decode(&saved.next()?);
                // There are no means before the first step.
                let none = self.number == 0 && dtype == Dtype::Bf16 && values.is_empty();
                if values.len() != dims.len() && !none {
                    return Err(saved.damaged());
                }
                *found = (!none).then_some(values);
            }
            of.frees(Some(&mask), &dense, self.settings.step_size);
            pruned.masks.insert(name.clone(), mask);
            let to = [&mut self.values].into_iter().chain(&mut self.means);
            for (store, values) in to.zip(stores) {
                if let Some(values) = values {
                    let put = store.put_all(of.number, dims, &values);
                    put.map_err(failed(at.0, "weights"))?;
                }
            }
        }
        saved.end()?;
        self.round(pruned)
    }
}

/// The entries are the numbers of the stage, then those of each matrix: its mask, its best weights and
/// their format, its weights and their means.
impl<D: Ops> StageState for Steps<'_, D> {
    fn write(
        &self,
        pruned: &Pruned,
        add: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        add(&bytes([self.number as f64, self.lowest, self.patience as f64]))?;
        let ranks = &self.model.executor.ranks;
        for (at, of) in &self.matrices {
            let Projection { weight: name, dims, .. } = of.linear;
            add(&pruned.masks.get(name).map(Mask::to_bytes).unwrap_or_default())?;
            let best = self.best.bytes(name)?;
            let (format, best) =
                best.map_or(("", Vec::new()), |(dtype, best)| (dtype.torch(), best));
            add(&best)?;
            add(format.as_bytes())?;
            let [mean, square] = &self.means;
            for (store, dtype) in
                [(&self.values, Dtype::F32), (mean, Dtype::Bf16), (square, Dtype::Bf16)]
            {
                let own = store.get(of.number, *dims).map_err(failed(at.0, "weights"))?;
                add(&ranks.bytes_of_rows(dtype.encode(&own)))?;
            }
        }
        Ok(())
    }
}

/// The format that a saved state names.
fn format_of(name: &[u8]) -> Option<Dtype> {
    std::str::from_utf8(name).ok().and_then(Dtype::named)
}

impl Matrix<'_> {
    /// Sets the weights that change and the size of the first step. Weights that are zero in the
    /// checkpoint stay zero.
    fn frees(&mut self, mask: Option<&Mask>, dense: &[f32], rate: f64) {
        self.free = Mask::from_fn(self.linear.dims, |i| {
            dense[i] != 0.0 && mask.is_none_or(|mask| mask.get(i))
        });
        let square: f64 = dense.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
        self.rate = (rate * (square / dense.len().max(1) as f64).sqrt()) as f32;
    }
}
