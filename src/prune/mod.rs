//! The loop over the decoder layers: initial masks, then the stages that refine them, block by
//! block.
//!
//! A pass holds the weights of one layer at a time. Only the masks and the hidden states of the
//! calibration samples are kept from layer to layer.

mod allocate;
mod group;
mod initial_masks;
mod objective;
mod permute;
pub(crate) mod pipeline;
mod predictions;
pub(crate) mod stage;
mod tally;

pub use self::{
    allocate::{Allocation, By, allocate},
    initial_masks::{InitialMasks, SparseModel, initial_masks},
    permute::permute,
    pipeline::MetricStep,
    stage::{
        Alpha, Compensate, Distill, EndToEnd, ModelState, Rebuild, Reconstruct, Refine, Rounds,
        SavedStage, Shares, Stage, StageState, Step, Swap,
    },
    tally::{Cost, Pruning, Tally},
};

pub use crate::executor::Side;

use std::{iter::zip, ops::Range, path::Path, slice::from_ref};

use barber_metric::Needs;
use serde::{Deserialize, Serialize};

use self::{group::GroupState, initial_masks::Choosing, stage::StageEvent};
use crate::{
    checkpoint::{self, Pruned},
    dtype::Dtype,
    executor::{
        self, ActivationCache, Beside, Caching, FEWEST_ROWS, Loss, Outputs, PartWeights, Probe,
        Recorded, Statistics, Store, Stream, StructureStatistics,
        ops::{Ops, Products},
    },
    family::Part,
    mask::{self, Distribution},
    model::{self, Model},
    plan::{Group, Plan},
    structure::Removal,
};

/// Why a model could not be pruned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A mask could not be computed.
    #[error(transparent)]
    Mask(#[from] mask::Error),
    /// A metric failed.
    #[error("metric `{metric}` on `{tensor}`: {source}")]
    Metric {
        /// The metric's name.
        metric: String,
        /// The tensor name of the matrix to score.
        tensor: String,
        /// The metric's error.
        source: barber_metric::Error,
    },
    /// The ranks that share a run have decided differently.
    #[error(
        "{place}: rank {rank} has found other masks than rank 0; their processors or their memory give \
         other results. Run it on other machines"
    )]
    Apart {
        /// The rank.
        rank: usize,
        /// The place in the run, in words.
        place: String,
    },
    /// The divergence from the dense model's predictions is not finite.
    #[error(
        "the predictions' divergence from the dense model's is {divergence} nats per token; \
         the model's activations overflow f32 on the calibration samples"
    )]
    Divergence {
        /// The divergence, in nats per token.
        divergence: f64,
    },
    /// The output error of a group is not finite.
    #[error(
        "layer {layer}, {group}: the output error is {loss}; \
         the model's activations overflow f32 on the calibration samples"
    )]
    NotFinite {
        /// Index of the decoder layer.
        layer: usize,
        /// Name of the group.
        group: String,
        /// The output error.
        loss: f64,
    },
}

impl From<checkpoint::Error> for Error {
    fn from(error: checkpoint::Error) -> Self {
        Self::Model(error.into())
    }
}

/// The calibration samples, token ids each.
#[derive(Clone, Copy, Debug)]
pub struct Sampled<'a> {
    /// The token ids of each sample, the held-out ones last.
    pub ids: &'a [Vec<u32>],
    /// Number of held-out samples. Statistics exclude them; they judge what a stage decided.
    pub held_out: usize,
}

impl<'a> Sampled<'a> {
    /// The samples that statistics are computed on.
    fn calibration(self) -> &'a [Vec<u32>] {
        &self.ids[..self.ids.len().saturating_sub(self.held_out)]
    }

    /// The samples that judge what a stage decides: the held-out ones, or without these all.
    fn judging(self) -> Range<usize> {
        match self.held_out {
            0 => 0..self.ids.len(),
            _ => self.calibration().len()..self.ids.len(),
        }
    }
}

impl<'a> From<&'a [Vec<u32>]> for Sampled<'a> {
    fn from(ids: &'a [Vec<u32>]) -> Self {
        Self { ids, held_out: 0 }
    }
}

/// The settings of a refinement.
pub struct Refinement<'a> {
    /// The stages, in order.
    pub stages: &'a [Refine],
    /// The metric pipeline that scores weights, for stages that swap by scores.
    pub pipeline: &'a [MetricStep],
    /// The weight β in a group's target output: β times the dense outputs on the dense model's
    /// hidden states, plus 1 − β times the dense outputs on the pruned model's.
    pub blend: f32,
    /// Which model's hidden states the statistics of inputs are computed on.
    pub statistics: Side,
    /// The settings for initial masks, where these are made layer by layer with the refinement.
    pub initial: Option<InitialMasks<'a>>,
    /// The format in which changed weights are stored; `None` for the checkpoint's.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
}

/// What the stages did to one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Index of the decoder layer.
    pub layer: usize,
    /// Name of the group.
    pub group: String,
    /// Report of each stage, in order.
    pub stages: Vec<StageReport>,
}

impl GroupReport {
    /// The group in words: `layer 3's mlp`.
    pub fn place(&self) -> String {
        place(self.layer, &self.group)
    }

    /// The output errors before the first stage and after the last; `None` without stages.
    pub fn errors(&self) -> Option<[Loss; 2]> {
        Some([self.stages.first()?.before, self.stages.last()?.after])
    }
}

/// A group in words: `layer 3's mlp`.
pub(crate) fn place(layer: usize, group: &str) -> String {
    format!("layer {layer}'s {group}")
}

/// What a stage did to one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// Name of the stage.
    pub stage: String,
    /// Mean squared error of the group's output before the stage.
    pub before: Loss,
    /// Mean squared error of the group's output after the stage.
    pub after: Loss,
    /// Whether the changes were kept: a guarded stage is undone where it does not lower the error.
    pub accepted: bool,
    /// Report of each matrix.
    pub matrices: Vec<MatrixReport>,
    /// The distribution of the weights' scores, for a stage that swaps by scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Distribution>,
}

/// What a stage did to one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Tensor name of the matrix.
    pub tensor: String,
    /// Number of pruned weights that the stage kept again.
    pub came_back: usize,
    /// Number of kept weights before the stage.
    #[serde(default)]
    pub kept_before: usize,
    /// Number of kept weights after the stage.
    pub kept: usize,
    /// Number of weights of the matrix.
    pub weights: usize,
}

/// The calibration tokens that the experts of a layer saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertReport {
    /// Index of the decoder layer.
    pub layer: usize,
    /// Start of the experts' tensor names, such as `model.layers.0.mlp.experts`.
    pub experts: String,
    /// Number of tokens of each expert.
    pub tokens: Vec<usize>,
}

impl ExpertReport {
    /// The tokens of the experts of a part, if it has experts and these statistics are of them.
    fn new<D: Ops>(
        model: &Model<'_, D>,
        layer: usize,
        part: Part,
        statistics: &[Statistics],
    ) -> Option<Self> {
        let part = model.decoder.layers[layer].part(part);
        let router = part.router.as_ref().filter(|_| !statistics.is_empty())?;
        let mut tokens = vec![0; part.experts()];
        for (projection, statistics) in zip(&part.projections, statistics) {
            if let Some(expert) = projection.expert {
                tokens[expert] = statistics.rows;
            }
        }
        Some(Self { layer, experts: router.experts.clone(), tokens })
    }

    /// A warning that names the experts with too few tokens for statistics of their own.
    pub fn few(&self) -> Option<String> {
        let few = self.tokens.iter().enumerate().filter(|(_, tokens)| **tokens < FEWEST_ROWS);
        let (numbers, tokens): (Vec<_>, Vec<_>) =
            few.map(|(expert, tokens)| (expert.to_string(), tokens.to_string())).unzip();
        let names = match &numbers[..] {
            [] => return None,
            [one] => format!("`{}.{one}`", self.experts),
            all => format!("`{}.*`: experts {}", self.experts, all.join(", ")),
        };
        Some(format!(
            "{names} saw fewer than {FEWEST_ROWS} calibration tokens ({}): pruned by the mean \
             statistics of the layer's experts; more calibration samples would help",
            tokens.join(", ")
        ))
    }
}

/// The state of a pass through the layers, before one of them.
#[derive(Debug)]
pub struct Pass<D: Ops> {
    /// Index of the next layer.
    pub layer: usize,
    /// The masks and changed weights of the layers before, and of earlier passes.
    pub pruned: Pruned,
    /// The hidden states of the samples at this layer; empty before the first layer.
    pub streams: Vec<Stream<D>>,
}

impl<D: Ops> From<Pruned> for Pass<D> {
    /// A pass at its first layer.
    fn from(pruned: Pruned) -> Self {
        Self { layer: 0, pruned, streams: Vec::new() }
    }
}

/// Watches a pass. A closure gets the events.
pub trait Observer<D: Ops> {
    /// Called for each event.
    fn event(&mut self, event: Event<'_>);

    /// Called after each layer, with the number of `layers` done. A [`Pass`] of these values
    /// continues the run. After the last layer `streams` is empty.
    ///
    /// # Errors
    /// An error ends the pass.
    fn state(
        &mut self,
        layers: usize,
        pruned: &Pruned,
        streams: &[&Stream<D>],
    ) -> Result<(), Error> {
        let _ = (layers, pruned, streams);
        Ok(())
    }

    /// Called after a step of a stage that works on the whole model, with the stage's index among
    /// those. [`refine_model`] continues from the `state`.
    ///
    /// # Errors
    /// An error ends the stage.
    fn step(
        &mut self,
        stage: usize,
        step: usize,
        pruned: &Pruned,
        state: &dyn StageState,
    ) -> Result<(), Error> {
        let _ = (stage, step, pruned, state);
        Ok(())
    }
}

impl<D: Ops, F: FnMut(Event<'_>)> Observer<D> for F {
    fn event(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// An event of a pass.
pub enum Event<'a> {
    /// The statistics of a matrix, by its tensor name, were computed.
    Measured(&'a str, &'a Statistics),
    /// The calibration tokens that the experts of a layer saw were counted.
    Experts(&'a ExpertReport),
    /// All stages of a group are done.
    Group(&'a GroupReport),
    /// The layer of this index is done.
    Layer(usize),
    /// A step of a stage that works on the whole model is done.
    Step(&'a Step),
    /// A stage that continues did work again that it had done before it was saved.
    Repeated(Products),
}

/// Adds the layer and the step to an error of the executor.
fn failed(layer: usize, what: &str) -> impl FnOnce(executor::Error) -> model::Error + use<> {
    model::Error::executor(format!("layer {layer}, {what}"))
}

/// The indices of a layer's pruned matrices in each part.
fn members(plan: &Plan, layer: usize) -> Vec<Vec<usize>> {
    let of = |part: Part| {
        let members = plan.layers[layer].iter().flat_map(|group| &group.members);
        members.filter(|member| member.part == part).map(|member| member.linear).collect()
    };
    Part::ALL.map(of).into()
}

/// The hidden states of the calibration samples at the current layer.
struct Streams<D: Ops> {
    /// The outputs of the pruned layers before.
    sparse: Stream<D>,
    /// The outputs of the dense layers before, where the target output or statistics use them.
    dense: Option<Stream<D>>,
}

impl<D: Ops> Streams<D> {
    /// The sparse stream, then the dense one.
    fn all(&self) -> impl Iterator<Item = &Stream<D>> {
        std::iter::once(&self.sparse).chain(&self.dense)
    }

    /// The stream of a side; the sparse one where there is no dense one.
    fn of(&self, side: Side) -> &Stream<D> {
        match (side, &self.dense) {
            (Side::Dense, Some(dense)) => dense,
            _ => &self.sparse,
        }
    }
}

/// Refines the masks of `from`, block by block. A layer's input is the output of the refined layers
/// before it.
///
/// With [`Refinement::initial`] each layer gets its initial masks when it is reached; the dense
/// forward pass that gives their statistics also serves the first stage. In a layer with a block
/// across parts, all parts get their initial masks first.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples, a metric fails or a mask cannot be
/// computed.
pub fn refine<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    refinement: &Refinement<'_>,
    samples: Sampled<'_>,
    from: impl Into<Pass<D>>,
    observer: &mut dyn Observer<D>,
) -> Result<Pruned, Error> {
    let Pass { layer: first, mut pruned, streams } = from.into();
    if first == plan.layers.len() {
        return Ok(pruned);
    }
    let embed = || model.embed(samples.ids, samples.held_out);
    let dense = refinement.blend > 0.0 || refinement.statistics == Side::Dense;
    let mut given = streams.into_iter();
    let mut stream = || given.next().map_or_else(embed, Ok);
    let mut streams = Streams { sparse: stream()?, dense: dense.then(stream).transpose()? };
    let mut choosing = Choosing::from(plan);
    for (layer, groups) in plan.layers.iter().enumerate().skip(first) {
        let event = &mut |event: Event<'_>| observer.event(event);
        let (removal, members) = (plan.removal.as_ref(), members(plan, layer));
        let refining = Refining { model, layer, groups, refinement, removal, members };
        let mut initial = refinement.initial;
        if let Some(of) = initial
            && (!of.needs().inputs() || refining.across().next().is_some())
        {
            let stream = of.needs().inputs().then_some(streams.of(refinement.statistics));
            of.layer(model, &mut choosing, layer, stream, &mut pruned, event)?;
            initial = None;
        }
        for part in Part::ALL {
            let dense = refining.dense_part(part, initial.as_ref(), &streams)?;
            if let Some(found) = ExpertReport::new(model, layer, part, &dense.statistics) {
                event(Event::Experts(&found));
            }
            if let Some(initial) = initial {
                let found = (&dense.statistics[..], &StructureStatistics::default());
                initial.part(model, &mut choosing, (layer, part), found, &mut pruned)?;
            }
            refining.part(part, &dense, &mut streams, &mut pruned, event)?;
        }
        event(Event::Layer(layer));
        let last = layer + 1 == plan.layers.len();
        let streams: Vec<_> = if last { Vec::new() } else { streams.all().collect() };
        observer.state(layer + 1, &pruned, &streams)?;
    }
    Ok(pruned)
}

/// Refines the masks of the whole model, after its layers, by the `stages` that work on all of it;
/// from the saved state of one of them, if it is given with the stage's index.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples, or the saved state is damaged.
pub fn refine_model<D: Ops>(
    mut state: ModelState<'_, D>,
    stages: &[Refine],
    mut saved: Option<(usize, &mut dyn SavedStage)>,
    observer: &mut dyn Observer<D>,
) -> Result<Pruned, Error> {
    let first = saved.as_ref().map_or(0, |(stage, _)| *stage);
    for (i, stage) in stages.iter().enumerate().skip(first) {
        let saved = saved.take().map(|(_, saved)| saved);
        stage.run_model(&mut state, saved, &mut |event| match event {
            StageEvent::Repeated(products) => {
                observer.event(Event::Repeated(products));
                Ok(())
            }
            StageEvent::Step(step, pruned, state) => {
                observer.event(Event::Step(step));
                observer.step(i, step.step, pruned, state)
            }
        })?;
    }
    Ok(state.pruned)
}

/// The results of a pass through a dense part, for the groups of the part.
struct DensePart<D: Ops> {
    /// Statistics of the part's linear layers.
    statistics: Vec<Statistics>,
    /// Outputs of the part's linear layers on the sparse stream.
    cache: Option<ActivationCache<D>>,
    /// The target output of the part's groups.
    target: Option<Store<D>>,
    /// The part's outputs on the dense stream.
    on_dense: Option<Store<D>>,
}

/// The refinement of one decoder layer.
struct Refining<'a, D: Ops> {
    model: &'a Model<'a, D>,
    layer: usize,
    groups: &'a [Group],
    refinement: &'a Refinement<'a>,
    /// The structures that are removed as a whole, if any are.
    removal: Option<&'a Removal>,
    /// The indices of the pruned matrices in each part.
    members: Vec<Vec<usize>>,
}

impl<D: Ops> Refining<'_, D> {
    /// The groups whose output error spans more than one part.
    fn across(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|group| group.parts.len() > 1)
    }

    /// The dense weights of some parts.
    fn dense(&self, parts: &[Part]) -> Result<Vec<PartWeights<D>>, model::Error> {
        let dense = Pruned::dense();
        parts.iter().map(|part| self.model.part(self.layer, *part, &dense)).collect()
    }

    /// Runs the dense part if anything needs it: statistics of the initial masks or of the first
    /// stage, or a dense stream.
    fn dense_part(
        &self,
        part: Part,
        initial: Option<&InitialMasks<'_>>,
        streams: &Streams<D>,
    ) -> Result<DensePart<D>, Error> {
        let Self { model, layer, refinement, .. } = *self;
        let (executor, members) = (&model.executor, from_ref(&self.members[part as usize]));
        let needs = initial.map_or(Needs::NOTHING, |initial| initial.needs());
        let needs_gram = refinement.stages.first().is_some_and(|stage| stage.needs_gram());
        let gives_target = needs_gram || streams.dense.is_some();
        if !gives_target && initial.is_none() {
            let (statistics, cache, target, on_dense) = (Vec::new(), None, None, None);
            return Ok(DensePart { statistics, cache, target, on_dense });
        }
        let needs = if needs_gram { needs.or(Needs::GRAM) } else { needs };
        let (dense, side) = (self.dense(&[part])?, refinement.statistics);
        let pass = executor::Pass {
            probe: Some(Probe::new(members, needs)),
            ..executor::Pass::new(&dense, &streams.sparse)
        };
        let pass = if gives_target {
            let beside = streams.dense.as_ref().map(|stream| Beside { stream, side });
            executor::Pass { beside, outputs: Outputs::Kept, ..pass }
        } else {
            executor::Pass { cache: Caching::Record(Recorded::All), ..pass }
        };
        let mut found = executor.run(pass).map_err(failed(layer, part.name()))?;
        if let Some(on_dense) = &found.beside {
            let blended = found.outputs.blend(on_dense, refinement.blend, &executor.device);
            blended.map_err(failed(layer, part.name()))?;
        }
        Ok(DensePart {
            statistics: found.statistics.swap_remove(0),
            cache: found.cache,
            target: gives_target.then_some(found.outputs),
            on_dense: found.beside,
        })
    }

    /// Refines the masks of a part's groups, then moves the hidden states through the part. Groups
    /// across parts are refined with the first part.
    fn part(
        &self,
        part: Part,
        dense: &DensePart<D>,
        streams: &mut Streams<D>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let Self { model, layer, refinement, .. } = *self;
        let executor = &model.executor;
        let mut groups: Vec<&Group> =
            self.groups.iter().filter(|group| group.parts == [part]).collect();
        if part == Part::ALL[0] {
            groups.extend(self.across());
        }
        let mut moved = false;
        for (i, group) in groups.iter().enumerate() {
            let own = group.parts == [part];
            let mut state = GroupState {
                model,
                layer,
                group,
                refinement,
                removal: self.removal,
                cache: dense.cache.as_ref().filter(|_| own),
                statistics: if own { &dense.statistics } else { &[] },
                shared_target: dense.target.as_ref().filter(|_| own),
                streams: &mut *streams,
                pruned: &mut *pruned,
                own_target: None,
                loss: None,
                advances: false,
                recorded: None,
            };
            // The stream advances with the output of the last group with its last masks.
            let last = i + 1 == groups.len() && own;
            let (report, advanced) = state.refine(refinement.stages, last, event)?;
            moved = advanced;
            event(Event::Group(&report));
        }
        if !moved {
            let sparse = model.part(layer, part, pruned)?;
            let pass = executor::Pass::advancing(from_ref(&sparse), &mut streams.sparse);
            let moved = executor.run(pass);
            moved.map_err(failed(layer, part.name()))?;
        }
        for (stream, outputs) in zip(&mut streams.dense, &dense.on_dense) {
            let (dense, outputs) = (self.dense(&[part])?, Outputs::Known(outputs));
            let pass = executor::Pass { outputs, ..executor::Pass::advancing(&dense, stream) };
            executor.run(pass).map_err(failed(layer, "dense stream"))?;
        }
        Ok(())
    }
}
