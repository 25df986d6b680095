//! The loop over the layers: initial masks, then the stages that refine them, block by block.
//!
//! A pass goes through the decoder layers with one layer's weights at a time; only the hidden
//! states of the calibration samples, and the masks, live from layer to layer.

mod allocate;
mod group;
mod initial_masks;
mod objective;
pub(crate) mod pipeline;
pub(crate) mod stage;
mod tally;

pub use self::{
    allocate::{Allocation, By, allocate},
    initial_masks::{InitialMasks, initial_masks},
    pipeline::MetricStep,
    stage::{Alpha, EndToEnd, ModelState, Rebuild, Reconstruct, Refine, Rounds, Stage, Step, Swap},
    tally::{Cost, Pruning, Tally},
};

pub use crate::executor::Side;

use std::{iter::zip, path::Path, slice::from_ref};

use barber_metric::Needs;
use serde::{Deserialize, Serialize};

use self::group::GroupState;
use crate::{
    checkpoint::{self, Pruned},
    dtype::Dtype,
    executor::{
        self, ActivationCache, Beside, Caching, Loss, Outputs, PartWeights, Probe, Recorded,
        Statistics, Store, Stream, ops::Ops,
    },
    family::Part,
    mask::{self, Distribution},
    model::{self, Model},
    plan::{Group, Plan},
};

/// Why a model could not be pruned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A mask could not be made.
    #[error(transparent)]
    Mask(#[from] mask::Error),
    /// A metric failed.
    #[error("metric `{metric}` on `{tensor}`: {source}")]
    Metric {
        /// Its name.
        metric: String,
        /// The matrix that it was to score.
        tensor: String,
        /// What it says.
        source: barber_metric::Error,
    },
    /// The predictions overflow.
    #[error(
        "the predictions' divergence from the dense model's is {divergence} nats per token; \
         the model's activations overflow f32 on the calibration samples"
    )]
    Divergence {
        /// The divergence.
        divergence: f64,
    },
    /// The activations overflow.
    #[error(
        "layer {layer}, {group}: the output error is {loss}; \
         the model's activations overflow f32 on the calibration samples"
    )]
    NotFinite {
        /// The decoder layer.
        layer: usize,
        /// The group.
        group: String,
        /// Its loss.
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
    /// All of them.
    pub ids: &'a [Vec<u32>],
    /// How many, the last ones, are no part of any statistics: what is decided is judged by them.
    pub held_out: usize,
}

impl<'a> Sampled<'a> {
    /// Those that statistics are of.
    fn calibration(self) -> &'a [Vec<u32>] {
        &self.ids[..self.ids.len().saturating_sub(self.held_out)]
    }
}

impl<'a> From<&'a [Vec<u32>]> for Sampled<'a> {
    fn from(ids: &'a [Vec<u32>]) -> Self {
        Self { ids, held_out: 0 }
    }
}

/// How masks are refined.
pub struct Refinement<'a> {
    /// The stages, in order.
    pub stages: &'a [Refine],
    /// What scores weights, for the stages that swap by scores.
    pub pipeline: &'a [MetricStep],
    /// The weight, β, of the outputs on the dense model's own hidden states in a group's target
    /// output; the rest is the dense outputs on the hidden states of the pruned model.
    pub blend: f32,
    /// Which model's hidden states the statistics of inputs are computed on.
    pub statistics: Side,
    /// The initialiser, where a layer's masks start when the layer is reached.
    pub initial: Option<InitialMasks<'a>>,
    /// The format in which changed weights are stored; as in the checkpoint if there is none.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
}

/// What the stages did to one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The decoder layer.
    pub layer: usize,
    /// The group.
    pub group: String,
    /// Stage by stage.
    pub stages: Vec<StageReport>,
}

impl GroupReport {
    /// Where the group is, as a reader is told: `layer 3's mlp`.
    pub fn place(&self) -> String {
        place(self.layer, &self.group)
    }

    /// The error before the first stage and after the last one.
    pub fn errors(&self) -> Option<[Loss; 2]> {
        Some([self.stages.first()?.before, self.stages.last()?.after])
    }
}

/// Where a group is, as a reader is told.
pub(crate) fn place(layer: usize, group: &str) -> String {
    format!("layer {layer}'s {group}")
}

/// What a stage did to one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// The stage.
    pub stage: String,
    /// Mean squared error of the group's output before it.
    pub before: Loss,
    /// And after it.
    pub after: Loss,
    /// Whether what it did stayed: a guarded stage takes back what does not lower the error.
    pub accepted: bool,
    /// What was done to each matrix.
    pub matrices: Vec<MatrixReport>,
    /// The scores of the group's weights, where the stage swapped weights by such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Distribution>,
}

/// What a stage did to one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Its tensor name.
    pub tensor: String,
    /// How many of its weights came back.
    pub came_back: usize,
    /// How many it kept before.
    #[serde(default)]
    pub kept_before: usize,
    /// How many it keeps.
    pub kept: usize,
    /// How many it has.
    pub weights: usize,
}

/// A pass through the layers, as it is before one of them.
#[derive(Debug)]
pub struct Pass<D: Ops> {
    /// The layer.
    pub layer: usize,
    /// What the layers before it decided, and a pass before this one.
    pub pruned: Pruned,
    /// The hidden states of the samples. None: those before the first layer, if it is that.
    pub streams: Vec<Stream<D>>,
}

impl<D: Ops> From<Pruned> for Pass<D> {
    /// The beginning of a pass.
    fn from(pruned: Pruned) -> Self {
        Self { layer: 0, pruned, streams: Vec::new() }
    }
}

/// Who is told how a pass goes on. A closure is told the events.
pub trait Observer<D: Ops> {
    /// Something happens.
    fn event(&mut self, event: Event<'_>);

    /// The first `layers` layers are done: a [`Pass`] of the same would go on in the same way. After
    /// the last one there are no streams any more.
    ///
    /// # Errors
    /// If the pass is to end with that.
    fn state(
        &mut self,
        layers: usize,
        pruned: &Pruned,
        streams: &[&Stream<D>],
    ) -> Result<(), Error> {
        let _ = (layers, pruned, streams);
        Ok(())
    }
}

impl<D: Ops, F: FnMut(Event<'_>)> Observer<D> for F {
    fn event(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// What happens, as it happens.
pub enum Event<'a> {
    /// What was measured of a matrix of a group.
    Measured(&'a str, &'a Statistics),
    /// A group's stages are done.
    Group(&'a GroupReport),
    /// A layer is done.
    Layer(usize),
    /// A step of a stage that works on the whole model is done.
    Step(&'a Step),
}

/// Says where the executor failed.
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

/// The hidden states of the calibration samples.
struct Streams<D: Ops> {
    /// As the pruned layers so far gave them.
    sparse: Stream<D>,
    /// As the dense ones did, where they are part of the target output.
    dense: Option<Stream<D>>,
}

impl<D: Ops> Streams<D> {
    /// Each of them.
    fn all(&self) -> impl Iterator<Item = &Stream<D>> {
        std::iter::once(&self.sparse).chain(&self.dense)
    }

    /// One of them.
    fn of(&self, side: Side) -> &Stream<D> {
        match (side, &self.dense) {
            (Side::Dense, Some(dense)) => dense,
            _ => &self.sparse,
        }
    }
}

/// Refines masks, block by block, on the hidden states of the refined model, from the masks that there
/// are or from where a pass was left. Without `pruned` masks
/// [`Refinement::initial`] makes those of each layer when it is reached, from the hidden states of the
/// refined layers before it; a dense forward pass that gives its statistics serves the first stage
/// too. A layer with a block across parts gets the initial masks of both parts first.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples, a metric fails or a mask cannot be made.
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
    for (layer, groups) in plan.layers.iter().enumerate().skip(first) {
        let event = &mut |event: Event<'_>| observer.event(event);
        let refining = Refining { model, layer, groups, refinement, members: members(plan, layer) };
        let mut initial = refinement.initial;
        if let Some(of) = initial
            && (!of.needs().inputs() || refining.across().next().is_some())
        {
            let stream = of.needs().inputs().then_some(streams.of(refinement.statistics));
            of.layer(model, plan, layer, stream, &mut pruned)?;
            initial = None;
        }
        for part in Part::ALL {
            let dense = refining.dense_part(part, initial.as_ref(), &streams)?;
            if let Some(initial) = initial {
                initial.part(model, plan, layer, part, &dense.statistics, &mut pruned)?;
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

/// Refines the masks of the whole model by the stages that work on it, once its layers are done.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples.
pub fn refine_model<D: Ops>(
    mut state: ModelState<'_, D>,
    stages: &[Refine],
    observer: &mut dyn Observer<D>,
) -> Result<Pruned, Error> {
    for stage in stages {
        stage.run_model(&mut state, &mut |event| observer.event(event))?;
    }
    Ok(state.pruned)
}

/// What a pass through a dense part left for the part's groups.
struct DensePart<D: Ops> {
    /// Statistics of its linear layers.
    statistics: Vec<Statistics>,
    /// Outputs of its linear layers on the sparse stream.
    cache: Option<ActivationCache<D>>,
    /// The target output of its groups.
    target: Option<Store<D>>,
    /// Its outputs on the dense stream.
    on_dense: Option<Store<D>>,
}

/// The refinement of one decoder layer.
struct Refining<'a, D: Ops> {
    model: &'a Model<'a, D>,
    layer: usize,
    groups: &'a [Group],
    refinement: &'a Refinement<'a>,
    /// The indices of the pruned matrices in each part.
    members: Vec<Vec<usize>>,
}

impl<D: Ops> Refining<'_, D> {
    /// The groups that are judged by more than one part.
    fn across(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|group| group.parts.len() > 1)
    }

    /// The weights of some parts, dense.
    fn dense(&self, parts: &[Part]) -> Result<Vec<PartWeights<D>>, model::Error> {
        let dense = Pruned::dense();
        parts.iter().map(|part| self.model.part(self.layer, *part, &dense)).collect()
    }

    /// Runs a part dense where that is of use: for the statistics that the initial masks and the
    /// first stage need, and where there is a dense stream, for that.
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

    /// Refines the masks of a part's groups and moves the hidden states on through it. Groups
    /// across parts come before the first.
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
            // The last group's output with its last masks is what the stream goes on with.
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
