//! The loop over the layers: initial masks, then their rebuild (LLM-Barber, arXiv 2408.10631).
//!
//! Both are passes over the decoder layers with one layer's weights at a time; only the hidden
//! states of the calibration samples, and the masks, live from layer to layer.

use std::{iter::zip, path::Path};

use barber_metric::{LayerStats, Metric, Needs};

use crate::{
    checkpoint::{Dtype, Pruned, Reader},
    executor::{Known, PartWeights, Statistics, Stream, ops::Ops},
    family::Part,
    mask::{self, Init, Initial, Mask, Scored},
    model::{self, Model},
    plan::{Group, Member, Plan, Rule},
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

impl From<crate::checkpoint::Error> for Error {
    fn from(error: crate::checkpoint::Error) -> Self {
        Self::Model(error.into())
    }
}

/// How the masks start.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// The initialiser.
    pub init: Init,
    /// The format in which changed weights are stored; as in the checkpoint if there is none.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
}

/// A stage of the metric pipeline and its name.
pub type Stage = (String, Box<dyn Metric>);

/// How the masks are rebuilt.
pub struct Rebuild<'a> {
    /// The share of the swaps worth doing that are done, α.
    pub alpha: f64,
    /// Whether kept weights that the initialiser changed stay so; otherwise they are dense again.
    pub retain: bool,
    /// What scores the weights.
    pub pipeline: &'a [Stage],
}

/// What a rebuild did to one group.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct GroupReport {
    /// The decoder layer.
    pub layer: usize,
    /// The group.
    pub group: String,
    /// Mean squared output error before the rebuild, averaged over samples.
    pub error_before: f64,
    /// And after it.
    pub error_after: f64,
    /// What was done to each matrix.
    pub matrices: Vec<MatrixReport>,
}

/// What a rebuild did to one matrix.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MatrixReport {
    /// Its tensor name.
    pub tensor: String,
    /// How many of its weights came back.
    pub came_back: usize,
    /// How many it keeps.
    pub kept: usize,
    /// How many it has.
    pub weights: usize,
}

/// What happens, as it happens.
pub enum Event<'a> {
    /// What was measured of a matrix of a group, at the dense weights.
    Measured(&'a str, &'a Statistics),
    /// A group was rebuilt.
    Group(&'a GroupReport),
    /// A layer is done.
    Layer(usize),
}

/// Chooses the initial masks. The statistics of a layer come from the hidden states that the
/// already pruned layers before it produce; all of a layer's from one forward pass of it, dense.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples or a mask cannot be made.
pub fn start<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    start: &Start<'_>,
    samples: &[Vec<u32>],
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Pruned, Error> {
    let mut stream = if start.init.needs().inputs() { Some(model.embed(samples)?) } else { None };
    let mut pruned = Pruned::default();
    let layers = model.decoder.layers.len();
    for layer in 0..layers {
        start.layer(model, plan, layer, stream.as_ref(), &mut pruned)?;
        if let Some(stream) = &mut stream
            && layer + 1 < layers
        {
            for part in Part::ALL {
                let sparse = model.part(layer, part, &pruned)?;
                let moved = model.executor.advance(&sparse, stream, None);
                moved.map_err(failed(layer, part.name()))?;
            }
        }
        event(Event::Layer(layer));
    }
    Ok(pruned)
}

/// Says where the executor failed.
fn failed<E: std::fmt::Display>(layer: usize, what: &str) -> impl FnOnce(E) -> model::Error {
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

impl Start<'_> {
    /// Chooses the initial masks of a layer, with the statistics that one dense forward pass of it
    /// gives.
    fn layer<D: Ops>(
        &self,
        model: &Model<'_, D>,
        plan: &Plan,
        layer: usize,
        stream: Option<&Stream<D>>,
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        let mut statistics = Vec::new();
        if let Some(stream) = stream {
            let mut dense = Vec::new();
            for part in Part::ALL {
                dense.push(model.part(layer, part, &Pruned::default())?);
            }
            let members = members(plan, layer);
            let found = model.executor.inputs(&dense, stream, &members, self.init.needs());
            statistics = found.map_err(failed(layer, "initial masks"))?;
        }
        for part in Part::ALL {
            let statistics = statistics.get(part as usize).map_or(&[][..], Vec::as_slice);
            self.part(model, plan, layer, part, statistics, pruned)?;
        }
        Ok(())
    }

    /// Chooses the initial masks of a part.
    fn part<D: Ops>(
        &self,
        model: &Model<'_, D>,
        plan: &Plan,
        layer: usize,
        part: Part,
        statistics: &[Statistics],
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        let none = Statistics::default();
        for (member, linear) in plan.matrices(&model.decoder, layer) {
            if member.part == part {
                let weight = model.values(linear)?;
                let stats = statistics.get(member.linear).unwrap_or(&none);
                let stats = stats.of(&linear.weight, linear.dims, &weight);
                self.matrix(model.reader, &stats, member.rule, pruned)?;
            }
        }
        Ok(())
    }

    /// Chooses the initial mask of one matrix.
    fn matrix(
        &self,
        reader: &Reader,
        stats: &LayerStats<'_>,
        rule: Rule,
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        let name = stats.name;
        let Initial { mask, values, damping } = self.init.start(stats, rule.pattern, rule.ratio)?;
        if let Some(damping) = damping {
            tracing::warn!(
                "`{name}`: the Hessian is not positive definite; its damping is raised to \
                 {damping} of its mean diagonal. More calibration samples would help"
            );
        }
        if let Some(values) = values {
            pruned.change(reader, name, &values, self.dtype, self.scratch)?;
        }
        pruned.masks.insert(name.into(), mask);
        Ok(())
    }
}

/// Rebuilds the masks, block by block, on the hidden states of the rebuilt model.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples, a metric fails or a mask cannot be made.
pub fn rebuild<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    settings: &Rebuild<'_>,
    samples: &[Vec<u32>],
    mut pruned: Pruned,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Pruned, Error> {
    let mut stream = model.embed(samples)?;
    for (layer, groups) in plan.layers.iter().enumerate() {
        let rebuilding = Rebuilding { model, layer, groups, settings };
        for part in Part::ALL {
            rebuilding.part(part, None, &mut stream, &mut pruned, event)?;
        }
        event(Event::Layer(layer));
    }
    Ok(pruned)
}

/// Chooses and rebuilds the masks in one pass: the statistics of the initial masks come from the
/// hidden states of the rebuilt model, and the dense forward pass that gives them serves the rebuild
/// too. A layer with a block across parts gets the initial masks of both first.
///
/// # Errors
/// As [`start`] and [`rebuild`].
pub fn start_and_rebuild<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    start: &Start<'_>,
    settings: &Rebuild<'_>,
    samples: &[Vec<u32>],
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Pruned, Error> {
    let needs = start.init.needs();
    let mut stream = model.embed(samples)?;
    let mut pruned = Pruned::default();
    for (layer, groups) in plan.layers.iter().enumerate() {
        let rebuilding = Rebuilding { model, layer, groups, settings };
        let whole = !needs.inputs() || rebuilding.across().next().is_some();
        if whole {
            start.layer(model, plan, layer, needs.inputs().then_some(&stream), &mut pruned)?;
        }
        for part in Part::ALL {
            let mut known = None;
            if !whole {
                let dense = model.part(layer, part, &Pruned::default())?;
                let members = &members(plan, layer)[part as usize];
                let found = model.executor.inputs_and_outputs(&dense, &stream, members, needs);
                let (statistics, outputs) = found.map_err(failed(layer, part.name()))?;
                start.part(model, plan, layer, part, &statistics, &mut pruned)?;
                known = outputs;
            }
            rebuilding.part(part, known.as_ref(), &mut stream, &mut pruned, event)?;
        }
        event(Event::Layer(layer));
    }
    Ok(pruned)
}

/// The rebuild of one decoder layer.
struct Rebuilding<'a, D: Ops> {
    model: &'a Model<'a, D>,
    layer: usize,
    groups: &'a [Group],
    settings: &'a Rebuild<'a>,
}

impl<D: Ops> Rebuilding<'_, D> {
    /// The groups that are judged by more than one part.
    fn across(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|group| group.parts.len() > 1)
    }

    /// Rebuilds the masks of a part's groups and moves the hidden states on through it. Groups
    /// across parts come before the first.
    fn part(
        &self,
        part: Part,
        known: Option<&Known<D>>,
        stream: &mut Stream<D>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let mut groups: Vec<&Group> =
            self.groups.iter().filter(|group| group.parts == [part]).collect();
        if part == Part::ALL[0] {
            groups.extend(self.across());
        }
        let mut moved = false;
        for (i, group) in groups.iter().enumerate() {
            // The last group's output with its new masks is what the stream goes on with.
            moved = i + 1 == groups.len() && group.parts == [part];
            self.group(group, known, moved, stream, pruned, event)?;
        }
        if !moved {
            let sparse = self.model.part(self.layer, part, pruned)?;
            let moved = self.model.executor.advance(&sparse, stream, None);
            moved.map_err(failed(self.layer, part.name()))?;
        }
        Ok(())
    }

    /// Rebuilds the masks of one group. One set of weights at a time is held: the sparse ones give
    /// the target, the dense ones the gradients, the sparse ones with the new masks the output.
    fn group(
        &self,
        group: &Group,
        known: Option<&Known<D>>,
        advance: bool,
        stream: &mut Stream<D>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let Self { model, layer, settings, .. } = *self;
        let Group { name, members, parts } = group;
        let executor = &model.executor;
        let weights = |pruned: &Pruned| -> Result<Vec<PartWeights<D>>, model::Error> {
            parts.iter().map(|part| model.part(layer, *part, pruned)).collect()
        };
        let outputs = executor.outputs(&weights(pruned)?, stream);
        let mut outputs = outputs.map_err(failed(layer, name))?;
        let needs = settings.pipeline.iter().fold(Needs::NOTHING, |n, (_, m)| n.or(m.needs()));
        let linears = |part: &Part| {
            let members = members.iter().filter(|member| member.part == *part);
            members.map(|member| member.linear).collect()
        };
        let wanted: Vec<Vec<usize>> = parts.iter().map(linears).collect();
        let dense = weights(&Pruned::default())?;
        let measured = executor.measure(&dense, stream, &mut outputs, &wanted, needs, known);
        let mut measured = measured.map_err(failed(layer, name))?;
        drop(dense);
        if !measured.loss.is_finite() {
            let (group, loss) = (name.clone(), measured.loss);
            return Err(Error::NotFinite { layer, group, loss });
        }

        let mut scored = Vec::new();
        for member in members {
            let linear = member.of(&model.decoder.layers[layer]);
            let (tensor, dims) = (&linear.weight, linear.dims);
            // Where the member's part is among those measured.
            let place = parts.iter().position(|part| *part == member.part).unwrap_or(0);
            // Statistics are as large as the weights: each goes when its matrix has scores.
            let statistics = std::mem::take(&mut measured.statistics[place][member.linear]);
            event(Event::Measured(tensor, &statistics));
            // A matrix of the group always has a mask: the plan that started it is this one.
            let mask = pruned.masks.remove(tensor).unwrap_or_else(|| Mask::kept_everywhere(dims));
            // What the initialiser made of the weights still gave the target above.
            if !settings.retain {
                pruned.restore(tensor);
            }
            let weight = match pruned.values(tensor)? {
                Some(changed) => changed,
                None => model.values(linear)?,
            };
            let stats = statistics.of(tensor, dims, &weight);
            let scores = score(settings.pipeline, &LayerStats { mask: &mask.to_bools(), ..stats })?;
            scored.push((tensor, member.rule, scores, mask));
        }
        let mut swaps = vec![0; scored.len()];
        for (i, Member { rule, .. }) in members.iter().enumerate() {
            // Matrices with one scope and one pattern are rebuilt together, when the first is
            // reached.
            let alike = |of: &Rule| (of.scope, of.pattern) == (rule.scope, rule.pattern);
            if members[..i].iter().any(|member| alike(&member.rule)) {
                continue;
            }
            let (places, mut matrices): (Vec<_>, Vec<_>) = scored
                .iter_mut()
                .enumerate()
                .filter(|(_, (_, of, ..))| alike(of))
                .map(|(i, (name, _, scores, mask))| {
                    (i, Scored { name: name.as_str(), scores, mask })
                })
                .unzip();
            let found = mask::rebuild(&mut matrices, rule.scope, rule.pattern, settings.alpha)?;
            zip(places, found).for_each(|(place, found)| swaps[place] = found);
        }

        let mut reports = Vec::new();
        for ((tensor, _, _, mask), came_back) in zip(scored, swaps) {
            reports.push(MatrixReport {
                tensor: tensor.clone(),
                came_back,
                kept: mask.kept(),
                weights: mask.dims().len(),
            });
            pruned.masks.insert(tensor.clone(), mask);
        }
        let sparse = weights(pruned)?;
        let error = if advance {
            let moved = executor.advance(&sparse[0], stream, Some(&outputs));
            moved.map(Option::unwrap_or_default)
        } else {
            executor.loss(&sparse, stream, &outputs)
        };
        let report = GroupReport {
            layer,
            group: name.clone(),
            error_before: measured.loss,
            error_after: error.map_err(failed(layer, name))?,
            matrices: reports,
        };
        event(Event::Group(&report));
        Ok(())
    }
}

/// Runs the metric pipeline on one matrix.
fn score(pipeline: &[Stage], stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    let mut scores = vec![1.0; stats.weight.len()];
    for (name, metric) in pipeline {
        metric.score(stats, &mut scores).map_err(|source| Error::Metric {
            metric: name.clone(),
            tensor: stats.name.into(),
            source,
        })?;
    }
    Ok(scores)
}
