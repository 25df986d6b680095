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
//! A step takes some samples in turn, adds their gradient to a running mean, and makes the swaps that
//! promise most: within rows, or of what goes in one row and comes in another, where a matrix or the
//! model is one pool. The samples of the next step judge them. Where those show a rise, the swaps are
//! undone and λ becomes larger; where they show most of what was promised, it becomes smaller, as
//! Levenberg's and Marquardt's does. The fewer steps are left, the fewer swaps a step makes. The
//! masks with the lowest divergence on the held-out samples are the result.

use std::{collections::BTreeMap, iter::zip, ops::Range, slice::from_ref};

use barber_metric::{Dims, LayerStats};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Described, Error, ModelState, RunModel, SavedStage, Shares, Stage, StageEvent, StageState,
    Step, Watch, Wrong, bytes, numbers, own_rows::OwnRows, wrong_counts,
};
use crate::{
    buffer::recycle,
    checkpoint::{Masks, Pruned},
    choice::word,
    dtype::Dtype,
    executor::{
        self,
        ops::{Ops, Products, transpose},
    },
    family::{Decoder, Projection},
    mask::{self, Ends, Mask, Scope},
    model::Model,
    plan::{Member, Plan, Rule},
    prune::{
        Cost, Pruning, Tally, failed, members,
        objective::{At, Forward, Gradients, MEASURED, Objective, PATIENCE, Passes, Turns, Work},
    },
    random::SplitMix64,
    ranks::{Ranks, Sums, Turn, add},
};

/// End-to-end swaps, and their keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EndToEnd {
    /// Maximum number of steps. The stage ends earlier if the divergence on the held-out samples no
    /// longer falls.
    #[schemars(range(min = 1))]
    pub steps: usize,
    /// Maximum number of swaps of the first step, as a fraction of the number of rows, from 0 to 1.
    /// Later steps make linearly fewer.
    #[schemars(range(min = 0, max = 1))]
    pub fraction: f64,
    /// The weight of earlier steps in the running mean of the gradients, from 0 to below 1.
    #[schemars(range(min = 0, max = 1))]
    pub momentum: f64,
    /// The weight λ of the curvature in the first step. A larger one makes fewer swaps, of smaller
    /// weights. In later steps it follows the samples.
    pub lambda: f64,
    /// Number of calibration tokens of a step: those of some samples, taken in turn. A step takes at
    /// least one sample, and at most half of them.
    #[schemars(range(min = 1))]
    pub tokens: usize,
    /// The weights that compete: all of the `model`, a `group`, a `layer`, a `row` (one output) or a
    /// `column` (one input). `swap` has only `row` and `layer`, `end-to-end` has these and `model`,
    /// `rebuild` has all but `model`.
    #[serde(deserialize_with = "word")]
    pub scope: Scope,
}

impl Default for EndToEnd {
    fn default() -> Self {
        Self {
            steps: 60,
            fraction: 0.05,
            momentum: 0.8,
            lambda: 300.0,
            tokens: 1024,
            scope: Scope::Row,
        }
    }
}

/// First steps, which make no swaps: the means are of too few tokens.
const WARM_UP: usize = 2;
/// Steps, beyond the first ones, from one measurement of the curvature to the next.
const CURVATURE: usize = 10;
/// The fraction of the promised fall that the next samples have to show, for λ to become smaller.
const KEPT: f64 = 0.5;
/// What λ is divided by, until they show less for the first time.
const SEARCH: f64 = 3.0;
/// And later; where they show a rise, λ is multiplied by it.
const TRUST: f64 = 1.5;
/// The norm of a step's gradient of a matrix at most, in those of the steps before.
const BOUND: f64 = 1.5;
/// How far the correlations of inputs are shrunk towards zero: they are of the tokens of one step.
const SHRINKAGE: f32 = 0.2;

impl Stage for EndToEnd {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        if !(self.fraction > 0.0 && self.fraction <= 1.0) {
            let why = format!("must be more than 0 and at most 1, got {}", self.fraction);
            let help = "it is the number of swaps in the first step, as a fraction of the rows";
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
        wrong.extend(wrong_counts([("steps", self.steps), ("tokens", self.tokens)]));
        wrong
    }

    fn describe(&self, _: &Described<'_>) -> String {
        let Self { steps, fraction, momentum, lambda, tokens, scope } = self;
        format!(
            "end-to-end, scope {scope}, at most {steps} steps of {tokens} tokens, fraction \
             {fraction}, momentum {momentum}, lambda {lambda}"
        )
    }

    fn scope(&self) -> Option<Scope> {
        Some(self.scope)
    }

    fn scopes(&self) -> &'static [Scope] {
        &[Scope::Model, Scope::Layer, Scope::Row]
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn count(&self, _: &mut Tally<'_>) {}

    fn model_cost(&self, pruning: &Pruning<'_>, decoder: &Decoder, plan: &Plan) -> Cost {
        let work = Work::new(pruning, decoder, plan, self.tokens);
        // A step goes forward and backward for the divergence, backward again for the curvature, and
        // forward with the masks of the step before. Where these turn out better, it goes forward a
        // third time, which no one knows before.
        let steps = self.steps as f64;
        let curved = (WARM_UP + 1 + self.steps / CURVATURE) as f64;
        let measured = (1 + self.steps.div_ceil(MEASURED)) as f64;
        let swapped = self.steps.saturating_sub(WARM_UP + 1) as f64;
        work.cost(&Passes {
            judged: measured,
            forward: steps + swapped,
            backward: steps,
            inputs: curved.min(steps),
            // The squares of a row's gradient, and its ends.
            gathered: [size_of::<f64>() as f64 + 16.0, 0.0],
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

impl RunModel for EndToEnd {
    const HELP: &'static str = "swaps over the whole model, by the gradient and the curvature of its \
                                predictions' divergence from the dense model's";

    fn run<D: Ops>(
        &self,
        state: &mut ModelState<'_, D>,
        saved: Option<&mut dyn SavedStage>,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        let ModelState { model, plan, samples, ref mut pruned, .. } = *state;
        let calibration = samples.calibration().len();
        if calibration == 0 {
            return Ok(());
        }
        let before = Products::so_far();
        let objective = Objective::new(model, samples)?;
        let judged = samples.judging();
        let members: Vec<_> = (0..plan.layers.len()).map(|layer| members(plan, layer)).collect();
        let mut run = Steps::new(self, model, plan);
        match saved {
            Some(saved) => {
                run.read(pruned, saved)?;
                watch(StageEvent::Repeated(Products::so_far() - before))?;
            }
            None => {
                run.best = (objective.value(pruned, judged.clone())?, pruned.masks.clone());
                let lambda = Some(run.lambda);
                let step = Step { lambda, ..Step::of_values(0, None, Some(run.best.0)) };
                watch(StageEvent::Step(&step, pruned, &run))?;
            }
        }
        let turns = Turns::new(self.tokens, calibration, objective.tokens(0..calibration));
        while run.number < self.steps && run.patience > 0 {
            let taken = turns.samples(run.number);
            run.number += 1;
            let (divergence, kept) = run.step(&objective, &members, pruned, taken)?;
            let held_out = match run.number.is_multiple_of(MEASURED) || run.number == self.steps {
                false => None,
                // No mask has changed.
                true if pruned.masks == run.best.1 => Some(run.best.0),
                true => Some(objective.value(pruned, judged.clone())?),
            };
            match held_out {
                Some(found) if found < run.best.0 => {
                    run.best = (found, pruned.masks.clone());
                    run.patience = PATIENCE;
                }
                Some(_) => run.patience -= 1,
                None => {}
            }
            let step = Step {
                step: run.number,
                calibration: Some(divergence),
                held_out,
                kept,
                swaps: run.last.len(),
                lambda: Some(run.lambda),
            };
            watch(StageEvent::Step(&step, pruned, &run))?;
        }
        pruned.masks = run.best.1;
        Ok(())
    }
}

/// A matrix of the model, and what is known of it.
struct Matrix<'a> {
    /// Index into the running means.
    number: usize,
    linear: &'a Projection,
    member: Member,
    /// Mean of x² over the tokens so far, of each input.
    squares: Mean,
    /// Mean of δ² over the tokens so far, of each output.
    curvature: Mean,
    /// The running mean of its gradients' norms.
    norm: f64,
}

/// A mean of vectors over tokens.
#[derive(Default)]
struct Mean {
    sums: Vec<f32>,
    tokens: usize,
}

impl Mean {
    fn add(&mut self, sums: &[f32]) {
        self.sums.resize(sums.len(), 0.0);
        self.sums.iter_mut().zip(sums).for_each(|(sum, x)| *sum += x);
    }

    fn get(&self) -> Vec<f32> {
        self.sums.iter().map(|sum| sum / self.tokens as f32).collect()
    }
}

/// A weight of the model: its matrix, and its place there, row-major.
type Place = (At, usize);

/// Two weights that change places.
struct Swap {
    /// What it changes of the model of the objective.
    change: f32,
    /// The weight that is pruned, and the one that comes back.
    goes: Place,
    comes: Place,
}

/// Weights that change places beyond their rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pool {
    /// Those of a matrix.
    Matrix(At),
    /// Those of the matrices that an allocation gives their counts.
    Allocated,
    /// Those of the matrices that are pruned to one ratio, by its bits.
    Ratio(u64),
}

/// A weight, and what its going or coming changes of the model of the objective.
type Change = (f32, Place);

/// The weights of a row whose going and coming promise most.
struct Pair {
    goes: Change,
    comes: Change,
    /// What both change beyond that.
    both: f32,
}

/// The changes that promise most so far, at most `most` of each kind: a model has millions of rows.
#[derive(Default)]
struct Candidates {
    most: usize,
    /// Swaps within rows.
    swaps: Vec<Swap>,
    /// What goes and what comes in each pool.
    pools: BTreeMap<Pool, [Vec<Change>; 2]>,
}

impl Candidates {
    /// Adds the pairs of some rows, which change places in a pool, or else in their rows. Rows
    /// without a weight to prune or to bring back have infinite changes; where the model of the
    /// objective has no curvature, they are no numbers.
    fn add(&mut self, pool: Option<Pool>, pairs: Vec<Pair>) {
        let Some(pool) = pool else {
            let swaps = pairs.into_iter().map(|Pair { goes, comes, both }| Swap {
                change: goes.0 + comes.0 + both,
                goes: goes.1,
                comes: comes.1,
            });
            self.swaps.extend(swaps.filter(|swap| swap.change < 0.0));
            return keep_best(&mut self.swaps, self.most, |swap| (swap.change, swap.goes));
        };
        let [go, come] = self.pools.entry(pool).or_default();
        for Pair { goes, comes, .. } in pairs {
            go.extend(Some(goes).filter(|goes| goes.0.is_finite()));
            come.extend(Some(comes).filter(|comes| comes.0.is_finite()));
        }
        for changes in [go, come] {
            keep_best(changes, self.most, |change| *change);
        }
    }

    /// The swaps that lower the model of the objective, those that promise most first.
    fn choose(mut self) -> Vec<Swap> {
        for [go, come] in self.pools.into_values() {
            let swaps = zip(go, come).map(|((cost, goes), (gain, comes))| Swap {
                change: cost + gain,
                goes,
                comes,
            });
            self.swaps.extend(swaps.filter(|swap| swap.change < 0.0));
        }
        keep_best(&mut self.swaps, self.most, |swap| (swap.change, swap.goes));
        self.swaps
    }
}

/// Sorts changes and keeps those that promise most; ties are broken by the places of the weights.
fn keep_best<T>(changes: &mut Vec<T>, most: usize, change: impl Fn(&T) -> Change) {
    changes.sort_by(|a, b| {
        let (a, b) = (change(a), change(b));
        a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
    });
    changes.truncate(most);
}

/// The norm that a gradient counts with, by its own and the usual one, which is 0 as long as there
/// was no gradient.
fn bounded(norm: f64, usual: f64) -> f64 {
    if usual > 0.0 { norm.min(BOUND * usual) } else { norm }
}

/// The gradient of this rank's rows, [rows, columns], and the inputs of its runs, [columns, tokens]
/// each, by the run's index.
type WithInputs = (Vec<f32>, Vec<(usize, Vec<f32>)>);

/// The ends of all rows of a matrix, from those of this rank's.
fn all_ends(ranks: &Ranks, own: Vec<Ends>) -> Vec<Ends> {
    if ranks.size() == 1 {
        return own;
    }
    let bytes = |(column, change): (usize, f32)| {
        (column as u32).to_le_bytes().into_iter().chain(change.to_le_bytes())
    };
    let own = own.iter().flat_map(|Ends { cost, gain }| bytes(*cost).chain(bytes(*gain)));
    let all = ranks.bytes_of_rows(own.collect());
    let words: Vec<u32> = all.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let end = |column: u32, change| (column as usize, f32::from_bits(change));
    let ends = words.as_chunks().0.iter();
    ends.map(|[i, cost, j, gain]| Ends { cost: end(*i, *cost), gain: end(*j, *gain) }).collect()
}

/// What is summed of a matrix over the samples of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum OfStep {
    /// Squares of the inputs.
    Squares,
    /// Squares of the drawn tokens' gradients with respect to outputs.
    Curvature,
    /// Number of tokens with such gradients: an expert sees some.
    Curved,
}

/// The stage as it goes on.
struct Steps<'a, D: Ops> {
    settings: &'a EndToEnd,
    /// Number of steps so far.
    number: usize,
    /// The lowest divergence on the held-out samples so far, and its masks.
    best: (f64, Masks),
    /// Number of measurements without a fall after which the stage ends.
    patience: usize,
    /// λ, and what it is divided by.
    lambda: f64,
    factor: f64,
    /// The swaps of the last step: the samples of the next one judge them.
    last: Vec<Swap>,
    model: &'a Model<'a, D>,
    matrices: BTreeMap<At, Matrix<'a>>,
    /// The running mean of each matrix' gradient.
    momentum: OwnRows<'a, D>,
}

impl<'a, D: Ops> Steps<'a, D> {
    fn new(settings: &'a EndToEnd, model: &'a Model<'a, D>, plan: &'a Plan) -> Self {
        let mut matrices = BTreeMap::new();
        for layer in 0..plan.layers.len() {
            for (member, linear) in plan.matrices(&model.decoder, layer) {
                let (squares, curvature) = (Mean::default(), Mean::default());
                let number = matrices.len();
                let matrix = Matrix { number, linear, member, squares, curvature, norm: 0.0 };
                matrices.insert((layer, member.part as usize, member.linear), matrix);
            }
        }
        let storage = model.executor.storage.half().in_scratch();
        let momentum = OwnRows::new(model, &storage, matrices.len());
        Self {
            settings,
            number: 0,
            best: (f64::INFINITY, Masks::new()),
            patience: PATIENCE,
            lambda: settings.lambda,
            factor: SEARCH,
            last: Vec::new(),
            model,
            matrices,
            momentum,
        }
    }

    /// Makes a step; returns the divergence before it, and what was kept of the last one's promise.
    fn step(
        &mut self,
        objective: &Objective<'_, D>,
        members: &[Vec<Vec<usize>>],
        pruned: &mut Pruned,
        samples: Range<usize>,
    ) -> Result<(f64, Option<f64>), Error> {
        let number = self.number;
        let measures_curvature = number <= WARM_UP + 1 || number.is_multiple_of(CURVATURE);
        let drawn = measures_curvature.then(|| SplitMix64::new(number as u64));
        let (forward, kept) = self.judge(objective, pruned, samples.clone())?;
        let (divergence, tokens) = (forward.divergence, objective.tokens(samples));
        let rows: usize = self.matrices.values().map(|of| of.linear.dims.rows).sum();
        let left = (self.settings.steps + 1 - number) as f64 / self.settings.steps as f64;
        let most = (rows as f64 * self.settings.fraction * left).ceil() as usize;
        let mut candidates = Candidates { most, ..Candidates::default() };
        let masks = &*pruned;
        objective.backward(forward, masks, members, drawn, &mut |at, gradients| {
            self.matrix(masks, at, gradients, tokens, &mut candidates)
        })?;
        if number <= WARM_UP {
            return Ok((divergence, kept));
        }
        self.last = candidates.choose();
        if self.last.is_empty() {
            self.lambda /= self.factor;
        }
        self.apply(pruned, true);
        Ok((divergence, kept))
    }

    /// Goes forward through the model on the samples of a step. They are others than those of the
    /// last step, and judge its swaps: λ follows the fraction of the promised fall that they show, and
    /// where they show a rise, the swaps are undone. Returns that fraction, too.
    fn judge(
        &mut self,
        objective: &Objective<'_, D>,
        pruned: &mut Pruned,
        samples: Range<usize>,
    ) -> Result<(Forward<D>, Option<f64>), Error> {
        let forward = objective.forward(pruned, samples.clone())?;
        if !forward.divergence.is_finite() {
            return Err(Error::Divergence { divergence: forward.divergence });
        }
        if self.last.is_empty() {
            return Ok((forward, None));
        }
        self.apply(pruned, false);
        let fall = objective.value(pruned, samples.clone())? - forward.divergence;
        let promised = -self.last.iter().map(|swap| f64::from(swap.change)).sum::<f64>();
        let kept = fall / promised;
        if kept <= KEPT {
            self.factor = TRUST;
        }
        if kept < 0.0 {
            self.lambda *= TRUST;
            return Ok((objective.forward(pruned, samples)?, Some(kept)));
        }
        if kept > KEPT {
            self.lambda /= self.factor;
        }
        self.apply(pruned, true);
        Ok((forward, Some(kept)))
    }

    /// Makes the swaps of the last step, or undoes them.
    fn apply(&self, pruned: &mut Pruned, swapped: bool) {
        for Swap { goes, comes, .. } in &self.last {
            for ((at, i), kept) in [(goes, !swapped), (comes, swapped)] {
                if let Some(mask) = pruned.masks.get_mut(&self.matrices[at].linear.weight) {
                    mask.set(*i, kept);
                }
            }
        }
    }

    /// The gradient of this rank's rows of a matrix in a step; takes what the step says of the curvature.
    fn gradient(
        &mut self,
        at: At,
        gradients: Gradients<D>,
        tokens: f64,
    ) -> Result<WithInputs, D::Err> {
        let Some(of) = self.matrices.get_mut(&at) else { return Ok((Vec::new(), Vec::new())) };
        let Dims { columns, .. } = of.linear.dims;
        let gradient = gradients.own_rows(self.model, of.linear.dims)?;
        let Gradients { divergence, drawn, chunks } = gradients;
        let (mut sums, mut inputs) = (Sums::new(&self.model.executor.ranks), Vec::new());
        let (mut divergence, mut drawn) =
            (divergence.into_iter().peekable(), drawn.into_iter().flatten().peekable());
        for Turn { runs, .. } in chunks.turns(0..usize::MAX) {
            let mut chunk: BTreeMap<OfStep, Vec<f32>> = BTreeMap::new();
            let mut squares = |of: OfStep, x: &executor::ops::Matrix<D>| {
                let found = D::column_squares(x, from_ref(&(0..x.shape().0)))?.concat();
                match chunk.get_mut(&of) {
                    Some(sum) => add(sum, &found),
                    None => drop(chunk.insert(of, found)),
                }
                Ok::<_, D::Err>(())
            };
            let mut curved = 0;
            while let Some((_, trace)) = drawn.next_if(|(run, _)| runs.contains(run)) {
                squares(OfStep::Curvature, &trace.gradient)?;
                curved += trace.gradient.shape().0;
            }
            while let Some((run, trace)) = divergence.next_if(|(run, _)| runs.contains(run)) {
                let input = trace.input;
                squares(OfStep::Squares, &input)?;
                let x = input.on_host()?;
                let mut by_input = vec![0.0; x.len()];
                transpose(&x, columns, &mut by_input);
                inputs.push((run, by_input));
            }
            if curved > 0 {
                chunk.insert(OfStep::Curved, vec![curved as f32]);
            }
            sums.add(chunk);
        }
        let mut sums = sums.finish();
        // An expert sees some of the tokens; the mean of its inputs is over all.
        let mut means =
            [(OfStep::Squares, &mut of.squares), (OfStep::Curvature, &mut of.curvature)];
        for (place, mean) in &mut means {
            if let Some(sum) = sums.remove(place) {
                mean.add(&sum);
            }
        }
        of.squares.tokens += tokens as usize;
        of.curvature.tokens += sums.get(&OfStep::Curved).map_or(0, |tokens| tokens[0] as usize);
        Ok((gradient, inputs))
    }

    /// Adds a step's gradient of this rank's rows, a sum over `tokens`, to the running mean of a matrix.
    /// A few tokens can have gradients that are larger than all others by far: the norm of what is added
    /// is bounded by those before.
    fn add(
        &mut self,
        at: At,
        mut gradient: Vec<f32>,
        tokens: f64,
    ) -> Result<Vec<f32>, executor::Error> {
        let Some(of) = self.matrices.get_mut(&at) else { return Ok(gradient) };
        let (ranks, momentum) = (&self.model.executor.ranks, self.settings.momentum);
        let (number, dims) = (of.number, of.linear.dims);
        let squares = |row: &[f32]| row.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        let squares: Vec<f64> = gradient.par_chunks(dims.columns).map(squares).collect();
        let squares = ranks.collect(vec![(ranks.rank(), squares)]);
        let norm = squares.iter().flat_map(|(_, of)| of).sum::<f64>().sqrt() / tokens;
        let bounded = bounded(norm, of.norm);
        of.norm =
            if of.norm > 0.0 { momentum * of.norm + (1.0 - momentum) * bounded } else { bounded };
        let own = (1.0 - momentum) / tokens * if norm > 0.0 { bounded / norm } else { 1.0 };
        let (own, momentum) = (own as f32, momentum as f32);
        gradient.par_iter_mut().for_each(|g| *g *= own);
        if self.number > 1 {
            let earlier = self.momentum.get(number, dims)?;
            let both = gradient.par_iter_mut().zip(&earlier);
            both.for_each(|(g, before)| *g += momentum * before);
            recycle(earlier);
        }
        self.momentum.put(number, dims, gradient.clone())?;
        Ok(gradient)
    }

    /// Adds a step's gradient of a matrix to its mean, and its rows' best pairs to the candidates.
    fn matrix(
        &mut self,
        pruned: &Pruned,
        at: At,
        gradients: Gradients<D>,
        tokens: f64,
        candidates: &mut Candidates,
    ) -> Result<(), Error> {
        let failed = || failed(at.0, "gradients");
        let gradient = self.gradient(at, gradients, tokens);
        let (gradient, inputs) = gradient.map_err(|e| failed()(executor::Error::device(e)))?;
        let step = self.number;
        let mut slope = self.add(at, gradient, tokens).map_err(failed())?;
        let of = &self.matrices[&at];
        let (name, columns) = (&of.linear.weight, of.linear.dims.columns);
        let Some(mask) = pruned.masks.get(name).filter(|_| step > WARM_UP) else {
            recycle(slope);
            return Ok(());
        };
        let weight = match pruned.values(name)? {
            Some(changed) => changed,
            None => self.model.values(of.linear)?,
        };
        let (squares, curvature) = (of.squares.get(), of.curvature.get());
        // An expert that has seen no token yet.
        if squares.is_empty() || curvature.is_empty() {
            recycle(weight);
            recycle(slope);
            return Ok(());
        }
        // What is missing of the mean's weights in the first steps.
        let whole = 1.0 / (1.0 - (self.settings.momentum as f32).powi(step as i32));
        let lambda = self.lambda as f32;
        let ranks = &self.model.executor.ranks;
        let own = ranks.own_rows(of.linear.dims.rows, 1);
        let places = own.start * columns..own.end * columns;
        let (dims, of_rows) = (Dims { rows: own.len(), columns }, &curvature[own.clone()]);
        slope.par_chunks_mut(columns).zip(of_rows).for_each(|(slope, s)| {
            let factor = -whole / (lambda * s);
            slope.iter_mut().for_each(|g| *g *= factor);
        });
        let stats = LayerStats { name, dims, weight: &weight[places], ..LayerStats::default() };
        let (mask, pattern) = (mask.of_rows(own), of.member.rule.pattern);
        let ends = mask::row_ends(&stats, &mask, &mut slope, &squares, pattern)?;
        let ends = all_ends(ranks, ends);
        let Rule { pattern, ratio, count, scope } = of.member.rule;
        let pool = match scope.unwrap_or(self.settings.scope) {
            // The tiles of N:M lie in rows.
            _ if pattern.ratio().is_some() => None,
            Scope::Model => Some(count.map_or(Pool::Ratio(ratio.to_bits()), |_| Pool::Allocated)),
            Scope::Layer => Some(Pool::Matrix(at)),
            _ => None,
        };
        let product = |x: &[f32], Ends { cost, gain }: &Ends| {
            let tokens = x.len() / columns;
            let [goes, comes] = [cost.0, gain.0].map(|i| &x[i * tokens..(i + 1) * tokens]);
            zip(goes, comes).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        let products = inputs.iter().map(|(run, x)| {
            (*run, ends.par_iter().map(|ends| product(x, ends)).collect::<Vec<f64>>())
        });
        let products = ranks.collect(products.collect());
        let pair = |(row, Ends { cost, gain }): (usize, &Ends)| {
            let gram: f64 = products.iter().map(|(_, of_run)| of_run[row]).sum();
            let gram = (1.0 - SHRINKAGE) * (gram / tokens) as f32;
            let [goes, comes] = [cost, gain].map(|(i, _)| row * columns + i);
            let factor = 0.5 * lambda * curvature[row];
            Pair {
                goes: (factor * cost.1, (at, goes)),
                comes: (factor * gain.1, (at, comes)),
                both: -2.0 * factor * weight[goes] * weight[comes] * gram,
            }
        };
        candidates.add(pool, ends.par_iter().enumerate().map(pair).collect());
        recycle(weight);
        recycle(slope);
        Ok(())
    }
}

/// The entries are the numbers of the stage, then those of each matrix, its masks and its mean.
impl<D: Ops> StageState for Steps<'_, D> {
    fn write(
        &self,
        pruned: &Pruned,
        add: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { number, best, patience, lambda, factor, last, matrices, momentum, .. } = self;
        add(&bytes([*number as f64, best.0, *patience as f64, *lambda, *factor]))?;
        let place = |((layer, part, linear), i): Place| [layer, part, linear, i].map(|x| x as f64);
        let swaps = last.iter().flat_map(|Swap { change, goes, comes }| {
            [f64::from(*change)].into_iter().chain(place(*goes)).chain(place(*comes))
        });
        add(&bytes(swaps))?;
        for (at, Matrix { number, linear, squares, curvature, norm, .. }) in matrices {
            add(&bytes([*norm, squares.tokens as f64, curvature.tokens as f64]))?;
            for Mean { sums, .. } in [squares, curvature] {
                add(&Dtype::F32.encode(sums))?;
            }
            for masks in [&pruned.masks, &best.1] {
                add(&masks.get(&linear.weight).map(Mask::to_bytes).unwrap_or_default())?;
            }
            let own = momentum.get(*number, linear.dims);
            let own = Dtype::Bf16.encode(&own.map_err(failed(at.0, "gradients"))?);
            add(&self.model.executor.ranks.bytes_of_rows(own))?;
        }
        Ok(())
    }
}

impl<D: Ops> Steps<'_, D> {
    /// Continues from a saved state.
    fn read(&mut self, pruned: &mut Pruned, saved: &mut dyn SavedStage) -> Result<(), Error> {
        let found = numbers(&saved.next()?);
        let [number, best, patience, lambda, factor] = found[..] else {
            return Err(saved.damaged());
        };
        (self.number, self.patience) = (number as usize, patience as usize);
        (self.lambda, self.factor) = (lambda, factor);
        let place = |at: [f64; 4]| {
            let [layer, part, linear, i] = at.map(|x| x as usize);
            ((layer, part, linear), i)
        };
        let swaps = numbers(&saved.next()?);
        let swaps = swaps.as_chunks().0.iter().map(|[change, a, b, c, i, d, e, f, j]| Swap {
            change: *change as f32,
            goes: place([*a, *b, *c, *i]),
            comes: place([*d, *e, *f, *j]),
        });
        self.last = swaps.collect();
        let exists =
            |(at, i): Place| self.matrices.get(&at).is_some_and(|of| i < of.linear.dims.len());
        if !self.last.iter().all(|swap| exists(swap.goes) && exists(swap.comes)) {
            return Err(saved.damaged());
        }
        self.best = (best, Masks::new());
        for (at, of) in &mut self.matrices {
            let dims = of.linear.dims;
            let found = numbers(&saved.next()?);
            let [norm, squares, curvature] = found[..] else { return Err(saved.damaged()) };
            of.norm = norm;
            for (mean, tokens) in [(&mut of.squares, squares), (&mut of.curvature, curvature)] {
                let sums = Dtype::F32.decode(&saved.next()?);
                *mean = Mean { sums, tokens: tokens as usize };
            }
            // Nothing is known before the first step, and of an expert that has seen no token.
            let fits = |count: usize, all: usize| count == 0 || count == all;
            let counts = [of.squares.sums.len(), of.curvature.sums.len()];
            if !fits(counts[0], dims.columns) || !fits(counts[1], dims.rows) {
                return Err(saved.damaged());
            }
            for masks in [&mut pruned.masks, &mut self.best.1] {
                let mask = Mask::from_bytes(dims, &saved.next()?);
                let mask = mask.ok_or_else(|| saved.damaged())?;
                masks.insert(of.linear.weight.clone(), mask);
            }
            let mean = Dtype::Bf16.decode(&saved.next()?);
            if !fits(mean.len(), dims.len()) {
                return Err(saved.damaged());
            }
            if mean.is_empty() {
                continue;
            }
            let kept = self.momentum.put_all(of.number, dims, &mean);
            kept.map_err(failed(at.0, "gradients"))?;
        }
        saved.end()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{checkpoint::Reader, prune::Sampled};

    /// What goes and comes in a row of a matrix of a layer, and what it changes.
    type Row = (Option<Pool>, usize, [(usize, f32); 2]);

    /// The swaps of some rows, in which two weights together change 0.5 less than each alone.
    fn chosen(rows: &[Row], most: usize) -> Vec<(f32, [(usize, usize); 2])> {
        let mut candidates = Candidates { most, ..Candidates::default() };
        for &(pool, layer, changes) in rows {
            let [goes, comes] = changes.map(|(i, change)| (change, ((layer, 0, 0), i)));
            candidates.add(pool, vec![Pair { goes, comes, both: -0.5 }]);
        }
        let place = |((layer, ..), i): Place| (layer, i);
        let swaps = candidates.choose().into_iter();
        swaps.map(|swap| (swap.change, [place(swap.goes), place(swap.comes)])).collect()
    }

    #[test]
    fn weights_change_places_in_their_pools() {
        let pools = |of: [Option<Pool>; 3]| -> [Row; 3] {
            [
                (of[0], 0, [(3, 1.0), (5, -2.0)]),
                (of[1], 0, [(13, 4.0), (15, -9.0)]),
                (of[2], 1, [(7, 2.0), (9, -1.0)]),
            ]
        };
        let rows = pools([None; 3]);
        let expected = [(-5.5, [(0, 13), (0, 15)]), (-1.5, [(0, 3), (0, 5)])];
        assert_eq!(chosen(&rows, 9), expected);
        assert_eq!(chosen(&rows, 1), expected[..1]);
        // What costs least goes for what gains most, until that is no gain.
        let model = pools([Some(Pool::Ratio(1)); 3]);
        for most in [1, 9] {
            assert_eq!(chosen(&model, most), [(-8.0, [(0, 3), (0, 15)])]);
        }
        let [first, second] = [0, 1].map(|layer| Some(Pool::Matrix((layer, 0, 0))));
        assert_eq!(chosen(&pools([first, first, second]), 9), [(-8.0, [(0, 3), (0, 15)])]);
        let allocated = Some(Pool::Allocated);
        assert_eq!(
            chosen(&pools([first, allocated, allocated]), 9),
            [(-7.0, [(1, 7), (0, 15)]), (-1.0, [(0, 3), (0, 5)])]
        );
    }

    /// Rows without a candidate, or without curvature, take nothing from the others of their pool.
    #[test]
    fn changes_that_are_no_numbers_are_left_out() {
        for change in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for pool in [None, Some(Pool::Ratio(1))] {
                let rows =
                    [(pool, 0, [(0, change), (1, f32::NAN)]), (pool, 1, [(2, 1.0), (3, -2.0)])];
                let swaps: Vec<_> = chosen(&rows, 9).into_iter().map(|swap| swap.1).collect();
                assert_eq!(swaps, [[(1, 2), (1, 3)]], "{change}");
            }
        }
    }

    #[test]
    fn a_gradient_is_bounded_by_those_before_if_there_were_any() {
        assert_eq!([bounded(9.0, 2.0), bounded(1.0, 2.0), bounded(9.0, 0.0)], [3.0, 1.0, 9.0]);
    }

    /// What a swap of small weights promises is what it changes of the whole model's objective.
    #[test]
    fn small_swaps_keep_what_they_promise() {
        let reader = Reader::open(Path::new("tests/conformance/tiny-llama")).unwrap();
        let model = Model::new(&reader, Cpu::default()).unwrap();
        let ids: Vec<Vec<u32>> =
            [3, 7].map(|by: u32| (0..12).map(|i| (i * by + 1) % 250).collect()).into();
        let is_small = |name: &str| name.contains("o_proj") || name.contains("down_proj");
        let mut pruned = Pruned::default();
        for linear in model.decoder.projections() {
            let mask = Mask::from_fn(linear.dims, |i| i % 2 == 0);
            pruned.masks.insert(linear.weight.clone(), mask);
            if is_small(&linear.weight) {
                let values = model.values(linear).unwrap();
                let values: Vec<f32> = values.iter().map(|w| 0.05 * w).collect();
                let dir = std::env::temp_dir();
                pruned.change(&reader, &linear.weight, &values, Some(Dtype::F32), &dir).unwrap();
            }
        }
        let rule =
            Rule { pattern: mask::Pattern::UNSTRUCTURED, ratio: 0.5, count: None, scope: None };
        let plan = Plan::new(&model.decoder, &[], |_| Some(rule)).unwrap();
        let members: Vec<_> = (0..plan.layers.len()).map(|layer| members(&plan, layer)).collect();
        let objective = Objective::new(&model, Sampled::from(&ids[..])).unwrap();
        let settings =
            EndToEnd { fraction: 1.0, momentum: 0.0, lambda: 1.0, ..EndToEnd::default() };
        let mut run = Steps::new(&settings, &model, &plan);
        for number in 1..=WARM_UP + 1 {
            run.number = number;
            run.step(&objective, &members, &mut pruned, 0..2).unwrap();
        }
        run.apply(&mut pruned, false);
        let before = objective.value(&pruned, 0..2).unwrap();
        let mut swaps = std::mem::take(&mut run.last);
        swaps.retain(|swap| is_small(&run.matrices[&swap.goes.0].linear.weight));
        assert!(swaps.len() > 100, "{}", swaps.len());
        for swap in swaps.into_iter().take(20) {
            let promised = f64::from(swap.change);
            run.last = vec![swap];
            run.apply(&mut pruned, true);
            let change = objective.value(&pruned, 0..2).unwrap() - before;
            run.apply(&mut pruned, false);
            assert!((change - promised).abs() < 0.2 * promised.abs(), "{change} {promised}");
        }
    }
}
