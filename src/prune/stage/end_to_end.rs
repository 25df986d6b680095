//! End-to-end swaps: masks that know the whole model.
//!
//! The objective J is the divergence of the pruned model's predictions from the dense model's, the
//! mean over tokens of KL(dense ‖ sparse). For a change D of a matrix whose present values are V,
//!
//! J(V + D) ≈ J(V) + tr(gᵀD) + ½ λ Σ_o s_o D_o G D_oᵀ,
//!
//! with the gradient g = ∂J/∂V, of kept and pruned entries alike; G = mean of x xᵀ over the tokens,
//! x being the input; s_o the mean of δ_o², δ being the gradient with respect to the output of the
//! cross-entropy of tokens drawn from the model's own predictions (K-FAC, arXiv 1503.05671, with its
//! other factor's diagonal); and the damping λ, which pays for what matrices change together. In row
//! o, pruning i and bringing back j changes the model of J by
//!
//! −w_i g_i + w_j g_j + ½ λ s_o (w_i² G_ii + w_j² G_jj) − λ s_o w_i w_j G_ij.
//!
//! A step takes some samples in turn, adds their gradient to a running mean, and makes the swaps of
//! the fraction of all rows that promise most. λ follows how much of what was promised is kept on
//! held-out samples, as Levenberg and Marquardt's does; where their divergence rises, the masks go
//! back to the best ones.

use std::{collections::BTreeMap, iter::zip, ops::Range, slice::from_ref};

use barber_metric::{Dims, LayerStats, Needs};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Described, Error, Event, ModelState, RunModel, Stage, Wrong};
use crate::{
    buffer::recycle,
    calibration::Extent,
    checkpoint::Pruned,
    evaluate::LOGITS,
    executor::{
        self, PartShape, PassShape, Probe, Rows, Store, Tokens,
        ops::{Ops, Trace, transpose},
    },
    family::{Decoder, Part, Projection},
    mask::{self, Ends},
    model::Model,
    plan::{Member, Plan},
    prune::{
        Cost, Pruning, Tally, failed, members,
        objective::{At, Gradients, Objective},
    },
    random::SplitMix64,
};

/// End-to-end swaps, and their keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EndToEnd {
    /// How many steps to make at most. It stops earlier when the divergence on the held-out samples
    /// no longer falls.
    #[schemars(range(min = 1))]
    pub steps: usize,
    /// The fraction of all rows that swap two weights in a step, from 0 to 1.
    #[schemars(range(min = 0, max = 1))]
    pub fraction: f64,
    /// The weight of the gradients of the steps before in the running mean, at least 0 and below 1.
    #[schemars(range(min = 0, max = 1))]
    pub momentum: f64,
    /// How much the curvature counts in the first steps, λ. More of it makes fewer swaps, of smaller
    /// weights; later steps have as much as the held-out samples ask for.
    pub lambda: f64,
    /// How many calibration samples a step takes.
    #[schemars(range(min = 1))]
    pub samples: usize,
}

impl Default for EndToEnd {
    fn default() -> Self {
        Self { steps: 60, fraction: 0.02, momentum: 0.8, lambda: 50.0, samples: 4 }
    }
}

/// A step of the whole model's swaps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number, from 1 on; 0 is the beginning.
    pub step: usize,
    /// The divergence on the samples of the step, before its swaps, in nats per token.
    pub calibration: Option<f64>,
    /// The divergence on the held-out samples after it, where it was measured.
    pub held_out: Option<f64>,
    /// The swaps that it made.
    pub swaps: usize,
    /// λ.
    pub lambda: f64,
}

/// Steps from one measurement on the held-out samples to the next.
const MEASURED: usize = 5;
/// Measurements without a fall after which the stage ends.
const PATIENCE: usize = 4;
/// First steps, which make no swaps: the means are of too few tokens.
const WARM_UP: usize = 2;
/// Steps, beyond the first ones, from one measurement of the curvature to the next.
const CURVATURE: usize = 10;
/// The fraction of the promised fall that the held-out samples have to show, for λ to become smaller.
const KEPT: f64 = 0.5;
/// What λ is multiplied by where they show it, and where they show a rise.
const TRUST: f64 = 0.5;
const DISTRUST: f64 = 3.0;
/// How far the correlations of inputs are shrunk towards zero: they are of the tokens of one step.
const SHRINKAGE: f32 = 0.2;

impl Stage for EndToEnd {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        if !(self.fraction > 0.0 && self.fraction <= 1.0) {
            let why = format!("must be more than 0 and at most 1, got {}", self.fraction);
            let help = "it is the fraction of the rows that swap in a step";
            wrong.push(Wrong { key: "fraction", why, help });
        }
        if !(0.0..1.0).contains(&self.momentum) {
            let why = format!("must be at least 0 and below 1, got {}", self.momentum);
            let help = "0 takes the gradient of a step alone";
            wrong.push(Wrong { key: "momentum", why, help });
        }
        if !(self.lambda > 0.0 && self.lambda.is_finite()) {
            let why = format!("must be more than 0, got {}", self.lambda);
            wrong.push(Wrong { key: "lambda", why, help: "leave it out for the default" });
        }
        for (key, count) in [("steps", self.steps), ("samples", self.samples)] {
            if count == 0 {
                let why = "must be at least 1, got 0".to_owned();
                wrong.push(Wrong { key, why, help: "leave it out for the default" });
            }
        }
        wrong
    }

    fn describe(&self, _: &Described<'_>) -> String {
        let Self { steps, fraction, momentum, lambda, samples } = self;
        format!(
            "end-to-end, at most {steps} steps of {samples} samples, {fraction} of the rows swap in \
             each, momentum {momentum}, lambda {lambda}"
        )
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn count(&self, _: &mut Tally<'_>) {}

    fn model_cost(&self, pruning: &Pruning<'_>, decoder: &Decoder, plan: &Plan) -> Cost {
        let Extent { samples, longest: sequence, .. } = pruning.calibration;
        let [calibration, held_out] = pruning.calibration.parts();
        let judged = if held_out > 0.0 { held_out } else { calibration };
        let taken = calibration * self.samples.min(samples) as f64 / samples.max(1) as f64;
        let head = (decoder.vocab_size * decoder.embedding.width) as f64;
        let tokens = |calibration| Tokens { calibration, held_out: 0.0, sequence };
        // Forward on the tokens that are judged; forward and backward on those of a step, for the
        // divergence; and backward again for the curvature.
        let mut of =
            [2.0 * judged * 2.0 * head, 2.0 * taken * 3.0 * head, 2.0 * taken * 2.0 * head];
        let (mut dense, mut weights, mut activations) = (0.0, 0.0_f64, 0.0_f64);
        for (layer, found) in decoder.layers.iter().enumerate() {
            let parts = Part::ALL.map(|part| PartShape::from(found.part(part)));
            let pass =
                |tokens| PassShape { needs_output: true, ..PassShape::new(parts.to_vec(), tokens) };
            let (all, none) = (members(plan, layer), vec![Vec::new(); Part::ALL.len()]);
            let backward = |members| {
                let probe = Some(Probe { members, needs: Needs::NOTHING, gradient: true });
                // The gradient of the layer's input is wanted too.
                let first = found.projections(Part::ALL[0]).split_last().map_or(&[][..], |of| of.1);
                let input: usize = first.iter().map(|of| of.dims.len()).sum();
                PassShape { probe, ..pass(tokens(taken)) }.operations() + 2.0 * taken * input as f64
            };
            let forward = pass(tokens(taken)).operations();
            dense += pass(tokens(calibration + held_out)).operations();
            of[0] += pass(tokens(judged)).operations();
            of[1] += forward + backward(&all);
            of[2] += backward(&none);
            let projections = || Part::ALL.iter().flat_map(|part| found.projections(*part));
            weights = weights.max(projections().map(|of| of.dims.len() as f64).sum());
            let wide = projections().map(|of| (of.dims.rows + of.dims.columns) as f64).sum();
            activations = activations.max(wide);
        }
        let steps = self.steps as f64;
        let curved = (WARM_UP + 1 + self.steps / CURVATURE) as f64;
        let measured = (1 + self.steps.div_ceil(MEASURED)) as f64;
        let operations = dense + measured * of[0] + steps * of[1] + curved.min(steps) * of[2];
        let layers = decoder.layers.len() as f64;
        let size = pruning.stream_size as f64 / size_of::<f32>() as f64;
        let mut widths = Rows::default();
        widths.add(decoder.hidden_size, (layers * taken + calibration + held_out) * size);
        // The running mean, in half precision.
        widths.add(1, plan.weights(decoder)[0] as f64 / 2.0);
        let waiting = widths.bytes();
        // Values and gradients of a layer, and the logits of both models with their gradient.
        let logits = LOGITS.min(sequence * decoder.vocab_size) as f64;
        widths.add(1, 2.0 * taken * activations + 3.0 * logits);
        let held = 2.0 * size_of::<f32>() as f64 * (weights + head);
        let matrices = widths.bytes();
        Cost { operations, held, gathered: 0.0, matrices, waiting, widths }
    }
}

impl RunModel for EndToEnd {
    const HELP: &'static str = "swaps over the whole model, by the gradient and the curvature of its \
                                predictions' divergence from the dense model's";

    fn run<D: Ops>(
        &self,
        state: &mut ModelState<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let ModelState { model, plan, samples, ref mut pruned } = *state;
        let calibration = samples.calibration().len();
        if calibration == 0 {
            return Ok(());
        }
        // Without held-out samples it is judged by those that it is made of.
        let judged = match samples.held_out {
            0 => 0..calibration,
            _ => calibration..samples.ids.len(),
        };
        let objective = Objective::new(model, samples)?;
        let members: Vec<_> = (0..plan.layers.len()).map(|layer| members(plan, layer)).collect();
        let mut run = Steps::new(self, model, plan, &members);
        let first = objective.value(pruned, judged.clone())?;
        let mut best = (first, pruned.masks.clone());
        let (held_out, lambda) = (Some(first), self.lambda);
        event(Event::Step(&Step { step: 0, calibration: None, held_out, swaps: 0, lambda }));
        let (mut patience, mut promised) = (PATIENCE, 0.0);
        let taken = self.samples.min(calibration);
        let mut turns = (0..calibration).step_by(taken).cycle();
        for number in 1..=self.steps {
            let start = turns.next().unwrap_or(0);
            let turn = start..calibration.min(start + taken);
            let (divergence, swaps) = run.step(&objective, &members, pruned, number, turn)?;
            promised -= swaps.iter().map(|swap| f64::from(swap.change)).sum::<f64>();
            let held_out = match number {
                _ if number % MEASURED != 0 && number != self.steps => None,
                // No mask has changed.
                _ if promised == 0.0 => Some(best.0),
                _ => Some(objective.value(pruned, judged.clone())?),
            };
            event(Event::Step(&Step {
                step: number,
                calibration: Some(divergence),
                held_out,
                swaps: swaps.len(),
                lambda: run.lambda,
            }));
            let Some(found) = held_out else { continue };
            if best.0 - found >= KEPT * promised {
                run.lambda *= TRUST;
            }
            if found < best.0 {
                best = (found, pruned.masks.clone());
                patience = PATIENCE;
            } else {
                if promised > 0.0 {
                    run.lambda *= DISTRUST;
                    pruned.masks.clone_from(&best.1);
                }
                patience -= 1;
            }
            if patience == 0 {
                break;
            }
            promised = 0.0;
        }
        pruned.masks = best.1;
        Ok(())
    }
}

/// A matrix of the model, and what is known of it.
struct Matrix<'a> {
    /// Its number, in the order of the model.
    number: usize,
    linear: &'a Projection,
    member: Member,
    /// Mean of x² over the tokens so far, of each input.
    squares: Mean,
    /// Mean of δ² over the tokens so far, of each output.
    curvature: Mean,
}

/// A mean of vectors over tokens.
#[derive(Default)]
struct Mean {
    sums: Vec<f32>,
    tokens: usize,
}

impl Mean {
    fn add(&mut self, (sums, tokens): (Vec<f32>, usize)) {
        self.sums.resize(sums.len(), 0.0);
        self.sums.iter_mut().zip(&sums).for_each(|(sum, x)| *sum += x);
        self.tokens += tokens;
    }

    fn get(&self) -> Vec<f32> {
        self.sums.iter().map(|sum| sum / self.tokens as f32).collect()
    }
}

/// The swap of two weights of a row.
struct Swap {
    /// What it changes of the model of the objective.
    change: f32,
    /// The matrix.
    at: At,
    /// The weight that is pruned, and the one that comes back, row-major.
    goes: usize,
    comes: usize,
}

/// A gradient, [rows, columns], and the inputs that it is of, [columns, tokens] run by run.
type WithInputs = (Vec<f32>, Vec<Vec<f32>>);

/// The stage as it goes on.
struct Steps<'a, D: Ops> {
    settings: &'a EndToEnd,
    /// λ.
    lambda: f64,
    model: &'a Model<'a, D>,
    matrices: BTreeMap<At, Matrix<'a>>,
    /// The running mean of each matrix' gradient, by its number.
    momentum: Store<D>,
}

impl<'a, D: Ops> Steps<'a, D> {
    fn new(
        settings: &'a EndToEnd,
        model: &'a Model<'a, D>,
        plan: &'a Plan,
        members: &[Vec<Vec<usize>>],
    ) -> Self {
        let mut matrices = BTreeMap::new();
        for (layer, parts) in members.iter().enumerate() {
            for (member, linear) in plan.matrices(&model.decoder, layer) {
                let part = member.part as usize;
                let place = parts[part].iter().position(|of| *of == member.linear);
                let Some(place) = place else { continue };
                let (squares, curvature) = (Mean::default(), Mean::default());
                let matrix = Matrix { number: 0, linear, member, squares, curvature };
                matrices.insert((layer, part, place), matrix);
            }
        }
        for (number, matrix) in matrices.values_mut().enumerate() {
            matrix.number = number;
        }
        let momentum = model.executor.storage.half().store(matrices.len());
        Self { settings, lambda: settings.lambda, model, matrices, momentum }
    }

    /// Makes a step; returns the divergence before it, and the swaps.
    fn step(
        &mut self,
        objective: &Objective<'_, D>,
        members: &[Vec<Vec<usize>>],
        pruned: &mut Pruned,
        number: usize,
        samples: Range<usize>,
    ) -> Result<(f64, Vec<Swap>), Error> {
        let measures_curvature = number <= WARM_UP + 1 || number.is_multiple_of(CURVATURE);
        let drawn = measures_curvature.then(|| SplitMix64::new(number as u64));
        let tokens = objective.tokens(samples.clone());
        let mut swaps: Vec<Swap> = Vec::new();
        let masks = &*pruned;
        let sum = objective.gradients(masks, members, samples, drawn, &mut |at, gradients| {
            swaps.extend(self.matrix(masks, number, at, gradients, tokens)?);
            Ok(())
        })?;
        let divergence = sum / tokens;
        if !divergence.is_finite() {
            return Err(Error::Divergence { divergence });
        }
        if number <= WARM_UP {
            return Ok((divergence, Vec::new()));
        }
        let rows: usize = self.matrices.values().map(|of| of.linear.dims.rows).sum();
        let most = (rows as f64 * self.settings.fraction).ceil() as usize;
        // Ties are broken by the places of the weights.
        swaps.sort_by(|a, b| {
            let place = |of: &Swap| (of.at, of.goes);
            a.change.total_cmp(&b.change).then(place(a).cmp(&place(b)))
        });
        swaps.truncate(most);
        for Swap { at, goes, comes, .. } in &swaps {
            if let Some(mask) = pruned.masks.get_mut(&self.matrices[at].linear.weight) {
                mask.set(*goes, false);
                mask.set(*comes, true);
            }
        }
        Ok((divergence, swaps))
    }

    /// The gradient of a matrix in a step; takes what it says of the curvature.
    fn gradient(
        &mut self,
        at: At,
        Gradients { divergence, drawn }: Gradients<D>,
    ) -> Result<WithInputs, D::Err> {
        let Some(of) = self.matrices.get_mut(&at) else { return Ok((Vec::new(), Vec::new())) };
        let squares = |x: &executor::ops::Matrix<D>| {
            let tokens = x.shape().0;
            Ok::<_, D::Err>((D::column_squares(x, from_ref(&(0..tokens)))?.concat(), tokens))
        };
        for Trace { gradient, .. } in drawn.into_iter().flatten() {
            of.curvature.add(squares(&gradient)?);
        }
        let Dims { rows, columns } = of.linear.dims;
        let mut sum = self.model.executor.device.nothing(rows, columns)?;
        let mut inputs = Vec::new();
        for Trace { input, gradient } in divergence {
            D::add_product(&mut sum, &gradient, &input)?;
            of.squares.add(squares(&input)?);
            let x = input.on_host()?;
            let mut by_input = vec![0.0; x.len()];
            transpose(&x, columns, &mut by_input);
            inputs.push(by_input);
        }
        Ok((D::sums(sum)?, inputs))
    }

    /// Adds a step's gradient, a sum over `tokens`, to the running mean of a matrix.
    fn add(
        &mut self,
        number: usize,
        mut gradient: Vec<f32>,
        (rows, columns): (usize, usize),
        (step, tokens): (usize, f64),
    ) -> Result<Vec<f32>, executor::Error> {
        let (device, momentum) = (&self.model.executor.device, self.settings.momentum as f32);
        let own = (1.0 - momentum) / tokens as f32;
        gradient.par_iter_mut().for_each(|g| *g *= own);
        if step > 1 {
            let earlier = self.momentum.get(number, device)?;
            let earlier = earlier.on_host().map_err(executor::Error::device)?;
            let both = gradient.par_iter_mut().zip(&earlier);
            both.for_each(|(g, before)| *g += momentum * before);
            recycle(earlier);
        }
        let held = device.hold(gradient.clone(), (rows, columns));
        self.momentum.put(number, held.map_err(executor::Error::device)?)?;
        Ok(gradient)
    }

    /// Adds a step's gradient of a matrix to its mean; returns the swap of each row that promises to
    /// lower the objective.
    fn matrix(
        &mut self,
        pruned: &Pruned,
        step: usize,
        at: At,
        gradients: Gradients<D>,
        tokens: f64,
    ) -> Result<Vec<Swap>, Error> {
        let failed = || failed(at.0, "gradients");
        let gradient = self.gradient(at, gradients);
        let (gradient, inputs) = gradient.map_err(|e| failed()(executor::Error::device(e)))?;
        let of = &self.matrices[&at];
        let Dims { rows, columns } = of.linear.dims;
        let (number, shape) = (of.number, (rows, columns));
        let mut slope = self.add(number, gradient, shape, (step, tokens)).map_err(failed())?;
        let of = &self.matrices[&at];
        let name = &of.linear.weight;
        let Some(mask) = pruned.masks.get(name).filter(|_| step > WARM_UP) else {
            recycle(slope);
            return Ok(Vec::new());
        };
        let weight = match pruned.values(name)? {
            Some(changed) => changed,
            None => self.model.values(of.linear)?,
        };
        let (squares, curvature) = (of.squares.get(), of.curvature.get());
        // What is missing of the mean's weights in the first steps.
        let whole = 1.0 / (1.0 - (self.settings.momentum as f32).powi(step as i32));
        let lambda = self.lambda as f32;
        slope.par_chunks_mut(columns).zip(&curvature).for_each(|(slope, s)| {
            let factor = -whole / (lambda * s);
            slope.iter_mut().for_each(|g| *g *= factor);
        });
        let stats =
            LayerStats { name, dims: of.linear.dims, weight: &weight, ..LayerStats::default() };
        let ends = mask::row_ends(&stats, mask, &mut slope, &squares, of.member.rule.pattern)?;
        let tokens: usize = inputs.iter().map(|x| x.len() / columns).sum();
        let swap = |(row, Ends { cost, gain }): (usize, &Ends)| {
            let of = |x: &[f32]| {
                let tokens = x.len() / columns;
                let [goes, comes] = [cost.0, gain.0].map(|i| &x[i * tokens..(i + 1) * tokens]);
                zip(goes, comes).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            };
            let gram: f64 = inputs.iter().map(|x| of(x)).sum();
            let gram = (1.0 - SHRINKAGE) * (gram / tokens as f64) as f32;
            let (goes, comes) = (row * columns + cost.0, row * columns + gain.0);
            let change = cost.1 + gain.1 - 2.0 * weight[goes] * weight[comes] * gram;
            Swap { change: 0.5 * lambda * curvature[row] * change, at, goes, comes }
        };
        let swaps =
            ends.par_iter().enumerate().map(swap).filter(|swap| swap.change < 0.0).collect();
        recycle(weight);
        recycle(slope);
        Ok(swaps)
    }
}
