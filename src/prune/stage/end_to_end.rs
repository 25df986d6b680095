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

use std::{iter::zip, ops::Range, slice::from_ref};

use barber_metric::{Dims, LayerStats, Needs};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Described, Error, Event, RunModel, Stage, Wrong};
use crate::{
    buffer::recycle,
    calibration::Extent,
    checkpoint::Masks,
    checkpoint::Pruned,
    evaluate::LOGITS,
    executor::{
        PartShape, PassShape, Probe, Rows, Store, Tokens,
        ops::{Ops, Trace, transpose},
    },
    family::{Decoder, Part, Projection},
    mask::{self, Ends},
    model::{self, Model},
    plan::{Member, Plan},
    prune::{
        Cost, Pruning, Sampled, Tally, failed, members,
        objective::{At, Objective, Of},
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
    /// The weight of the gradients of the steps before in the running mean, from 0 to 1.
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
        let mut fraction = |key, value: f64, help| {
            if !(0.0..=1.0).contains(&value) {
                wrong.push(Wrong { key, why: format!("must be from 0 to 1, got {value}"), help });
            }
        };
        fraction("fraction", self.fraction, "it is the fraction of the rows that swap in a step");
        fraction("momentum", self.momentum, "0 takes the gradient of a step alone");
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
        // Forward on the tokens that are judged, and forward and backward on those of a step, for
        // the divergence and for the curvature.
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
            of[2] += forward + backward(&none);
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
        widths.add(1, 2.0 * taken * activations + 3.0 * LOGITS as f64);
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
        model: &Model<'_, D>,
        plan: &Plan,
        samples: Sampled<'_>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let objective = Objective::new(model, samples)?;
        let calibration = samples.calibration().len();
        if calibration == 0 {
            return Ok(());
        }
        // Without held-out samples it is judged by those that it is made of.
        let judged = match samples.held_out {
            0 => 0..calibration,
            _ => calibration..samples.ids.len(),
        };
        let mut run = Steps::new(self, model, plan)?;
        let first = objective.value(pruned, judged.clone())?;
        let mut best: (f64, Masks) = (first, pruned.masks.clone());
        let (held_out, lambda) = (Some(first), self.lambda);
        let step = Step { step: 0, calibration: None, held_out, swaps: 0, lambda };
        event(Event::Step(&step));
        let (mut patience, mut last, mut promised) = (PATIENCE, first, 0.0);
        let mut turns = (0..calibration).step_by(self.samples).cycle();
        for number in 1..=self.steps {
            let start = turns.next().unwrap_or(0);
            let turn = start..calibration.min(start + self.samples);
            let (divergence, swaps) = run.step(&objective, pruned, number, turn)?;
            promised -= swaps.iter().map(|swap| f64::from(swap.change)).sum::<f64>();
            let held_out = if number % MEASURED == 0 || number == self.steps {
                Some(objective.value(pruned, judged.clone())?)
            } else {
                None
            };
            event(Event::Step(&Step {
                step: number,
                calibration: Some(divergence),
                held_out,
                swaps: swaps.len(),
                lambda: run.lambda,
            }));
            let Some(found) = held_out else { continue };
            if last - found >= KEPT * promised {
                run.lambda *= TRUST;
            }
            if found < best.0 {
                best = (found, pruned.masks.clone());
                patience = PATIENCE;
            } else {
                run.lambda *= if promised > 0.0 { DISTRUST } else { 1.0 };
                pruned.masks.clone_from(&best.1);
                patience -= 1;
            }
            if patience == 0 {
                break;
            }
            (last, promised) = (best.0, 0.0);
        }
        pruned.masks = best.1;
        Ok(())
    }
}

/// A matrix of the model, and what is known of it.
struct Matrix<'a> {
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
    fn add(&mut self, sums: &[f32], tokens: usize) {
        self.sums.resize(sums.len(), 0.0);
        self.sums.iter_mut().zip(sums).for_each(|(sum, x)| *sum += x);
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
    /// The matrix, by its number.
    matrix: usize,
    /// The weight that is pruned, and the one that comes back, row-major.
    goes: usize,
    comes: usize,
}

/// The stage as it goes on.
struct Steps<'a, D: Ops> {
    settings: &'a EndToEnd,
    /// λ.
    lambda: f64,
    model: &'a Model<'a, D>,
    /// The indices of the pruned matrices in each part of each layer.
    members: Vec<Vec<Vec<usize>>>,
    matrices: Vec<Matrix<'a>>,
    /// The running mean of each matrix' gradient.
    momentum: Store<D>,
}

impl<'a, D: Ops> Steps<'a, D> {
    fn new(settings: &'a EndToEnd, model: &'a Model<'a, D>, plan: &'a Plan) -> Result<Self, Error> {
        let members: Vec<_> = (0..plan.layers.len()).map(|layer| members(plan, layer)).collect();
        let mut matrices = Vec::new();
        for (layer, of_layer) in members.iter().enumerate() {
            for (part, of_part) in Part::ALL.iter().zip(of_layer) {
                for linear in of_part {
                    let mut all = plan.matrices(&model.decoder, layer);
                    let found = all.find(|(of, _)| (of.part, of.linear) == (*part, *linear));
                    let Some((member, linear)) = found else { continue };
                    let (squares, curvature) = (Mean::default(), Mean::default());
                    matrices.push(Matrix { linear, member, squares, curvature });
                }
            }
        }
        let momentum = model.executor.storage.half().store(matrices.len());
        Ok(Self { settings, lambda: settings.lambda, model, members, matrices, momentum })
    }

    /// The number of a matrix.
    fn number(&self, (layer, part, place): At) -> usize {
        let before = self.members[..layer].iter().flatten().map(Vec::len).sum::<usize>();
        before + self.members[layer][..part].iter().map(Vec::len).sum::<usize>() + place
    }

    /// Makes a step; returns the divergence before it, and the swaps.
    fn step(
        &mut self,
        objective: &Objective<'_, D>,
        pruned: &mut Pruned,
        number: usize,
        samples: Range<usize>,
    ) -> Result<(f64, Vec<Swap>), Error> {
        let members = self.members.clone();
        if number <= WARM_UP + 1 || number.is_multiple_of(CURVATURE) {
            let random = &mut SplitMix64::new(number as u64);
            let of = Of::Drawn(random);
            objective.gradients(pruned, &members, samples.clone(), of, &mut |at, traces| {
                let place = self.number(at);
                let curvature = &mut self.matrices[place].curvature;
                for Trace { gradient, .. } in traces {
                    let tokens = gradient.shape().0;
                    let squares = D::column_squares(&gradient, from_ref(&(0..tokens)));
                    curvature.add(&squares.map_err(device(at.0))?[0], tokens);
                }
                Ok(())
            })?;
        }
        let tokens = objective.tokens(samples.clone());
        let mut swaps: Vec<Swap> = Vec::new();
        let kept = &*pruned;
        let of = Of::Divergence;
        let sum = objective.gradients(kept, &members, samples, of, &mut |at, traces| {
            let matrix = self.number(at);
            swaps.extend(self.matrix(kept, number, at, matrix, &traces, tokens)?);
            Ok(())
        })?;
        if number <= WARM_UP {
            return Ok((sum / tokens, Vec::new()));
        }
        let rows: usize = self.matrices.iter().map(|of| of.linear.dims.rows).sum();
        let most = (rows as f64 * self.settings.fraction).ceil() as usize;
        // Ties are broken by the places of the weights.
        swaps.sort_by(|a, b| {
            let place = |of: &Swap| (of.matrix, of.goes);
            a.change.total_cmp(&b.change).then(place(a).cmp(&place(b)))
        });
        swaps.truncate(most);
        for Swap { matrix, goes, comes, .. } in &swaps {
            if let Some(mask) = pruned.masks.get_mut(&self.matrices[*matrix].linear.weight) {
                mask.set(*goes, false);
                mask.set(*comes, true);
            }
        }
        Ok((sum / tokens, swaps))
    }

    /// Adds a step's gradient of a matrix to its mean; returns the swap of each row that promises to
    /// lower the objective.
    fn matrix(
        &mut self,
        pruned: &Pruned,
        step: usize,
        at: At,
        number: usize,
        traces: &[Trace<D>],
        tokens: f64,
    ) -> Result<Vec<Swap>, Error> {
        let (executor, momentum) = (&self.model.executor, self.settings.momentum as f32);
        let of = &mut self.matrices[number];
        let Dims { rows, columns } = of.linear.dims;
        // [columns, tokens], run by run.
        let mut inputs: Vec<Vec<f32>> = Vec::new();
        let mut gradient = {
            let mut run = || {
                let mut sum = executor.device.nothing(rows, columns)?;
                for Trace { input, gradient } in traces {
                    D::add_product(&mut sum, gradient, input)?;
                    let tokens = input.shape().0;
                    of.squares.add(&D::column_squares(input, from_ref(&(0..tokens)))?[0], tokens);
                    let x = input.on_host()?;
                    let mut by_input = vec![0.0; x.len()];
                    transpose(&x, columns, &mut by_input);
                    inputs.push(by_input);
                }
                D::sums(sum)
            };
            run().map_err(device(at.0))?
        };
        let store = failed(at.0, "gradients");
        let mut mean = || {
            let earlier = if step > 1 {
                let found = self.momentum.get(number, &executor.device)?;
                Some(found.on_host().map_err(crate::executor::Error::device)?)
            } else {
                None
            };
            let own = (1.0 - momentum) / tokens as f32;
            gradient.par_iter_mut().for_each(|g| *g *= own);
            if let Some(earlier) = earlier {
                gradient
                    .par_iter_mut()
                    .zip(&earlier)
                    .for_each(|(g, before)| *g += momentum * before);
                recycle(earlier);
            }
            let held = executor.device.hold(gradient.clone(), (rows, columns));
            self.momentum.put(number, held.map_err(crate::executor::Error::device)?)
        };
        mean().map_err(store)?;
        if step <= WARM_UP {
            return Ok(Vec::new());
        }
        let of = &self.matrices[number];
        let name = &of.linear.weight;
        let Some(mask) = pruned.masks.get(name) else { return Ok(Vec::new()) };
        let weight = match pruned.values(name)? {
            Some(changed) => changed,
            None => self.model.values(of.linear)?,
        };
        let (squares, curvature) = (of.squares.get(), of.curvature.get());
        // What is missing of the mean's weights in the first steps.
        let whole = 1.0 / (1.0 - momentum.powi(step as i32));
        let lambda = self.lambda as f32;
        let mut slope = gradient;
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
            Swap { change: 0.5 * lambda * curvature[row] * change, matrix: number, goes, comes }
        };
        let swaps =
            ends.par_iter().enumerate().map(swap).filter(|swap| swap.change < 0.0).collect();
        recycle(weight);
        recycle(slope);
        Ok(swaps)
    }
}

/// Says where the device failed.
fn device<E: std::fmt::Display>(layer: usize) -> impl FnOnce(E) -> model::Error {
    model::Error::device(format!("layer {layer}"))
}
