//! The loop over the layers: initial masks, then their rebuild (LLM-Barber, arXiv 2408.10631).
//!
//! Both are passes over the decoder layers with one layer's weights at a time; only the hidden
//! states of the calibration samples, and the masks, live from layer to layer.

use std::{path::Path, slice};

use barber_metric::{LayerStats, Metric, Needs};

use crate::{
    checkpoint::{Dtype, Pruned, Reader},
    executor::{self, Hidden, PartWeights, Statistics, ops::Ops},
    family::{Linear, Part},
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
    /// A group was rebuilt; with the statistics of its members, in their order.
    Group(&'a GroupReport, &'a [&'a Statistics]),
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
    let needs = start.init.needs();
    let mut stream = if needs.inputs() { model.embed(samples)? } else { Vec::new() };
    let mut pruned = Pruned::default();
    for layer in 0..model.decoder.layers.len() {
        if !needs.inputs() {
            for (Member { rule, .. }, linear) in plan.matrices(&model.decoder, layer) {
                let weight = model.values(linear)?;
                let stats = Statistics::default();
                let stats = stats.of(&linear.weight, linear.dims, &weight);
                start.matrix(model.reader, &stats, rule, &mut pruned)?;
            }
            event(Event::Layer(layer));
            continue;
        }
        let what = |part: Part| model::Error::device(format!("layer {layer}, {part:?}"));
        let mut dense = Vec::new();
        let mut through = stream.clone();
        for part in Part::ALL {
            let weights = model.part(layer, part)?;
            let matrices =
                || plan.matrices(&model.decoder, layer).filter(|(member, _)| member.part == part);
            let members: Vec<usize> = matrices().map(|(member, _)| member.linear).collect();
            let (statistics, outputs) =
                executor::inputs(&weights, &through, &members, needs).map_err(what(part))?;
            weights.add(&mut through, outputs).map_err(what(part))?;
            for (Member { linear: i, rule, .. }, linear) in matrices() {
                let weight = weights.linears[i].values();
                let stats = statistics[i].of(&linear.weight, linear.dims, weight);
                start.matrix(model.reader, &stats, rule, &mut pruned)?;
            }
            dense.push(weights);
        }
        for weights in dense {
            let sparse = model.pruned(layer, &weights, &pruned)?;
            let outputs = executor::outputs(slice::from_ref(&sparse), &stream);
            let outputs = outputs.map_err(what(weights.part))?;
            sparse.add(&mut stream, outputs).map_err(what(weights.part))?;
        }
        event(Event::Layer(layer));
    }
    Ok(pruned)
}

impl Start<'_> {
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
        let across = || groups.iter().filter(|group| group.parts.len() > 1);
        let mut whole = Vec::new();
        if across().next().is_some() {
            for part in Part::ALL {
                whole.push(model.part(layer, part)?);
            }
        }
        for part in Part::ALL {
            let dense = match whole.get(part as usize) {
                Some(dense) => dense.clone(),
                None => model.part(layer, part)?,
            };
            let dense = slice::from_ref(&dense);
            let mut rebuild = |group: &Group, dense: &[PartWeights<D>], pruned: &mut Pruned| {
                rebuild_group(model, layer, group, dense, &stream, settings, pruned, event)
            };
            let mut outputs = None;
            for group in groups.iter().filter(|group| group.parts == [part]) {
                outputs = Some(rebuild(group, dense, &mut pruned)?);
            }
            if part == Part::ALL[0] {
                for group in across() {
                    rebuild(group, &whole, &mut pruned)?;
                    outputs = None;
                }
            }
            let what = || model::Error::device(format!("layer {layer}, {part:?}"));
            let outputs = match outputs {
                Some(outputs) => outputs,
                None => {
                    let sparse = model.pruned(layer, &dense[0], &pruned)?;
                    executor::outputs(slice::from_ref(&sparse), &stream).map_err(what())?
                }
            };
            dense[0].add(&mut stream, outputs).map_err(what())?;
        }
        event(Event::Layer(layer));
    }
    Ok(pruned)
}

/// Rebuilds the masks of one group; returns the outputs, with them, of the parts that hold it.
#[expect(clippy::too_many_arguments, reason = "each is a thing of its own")]
fn rebuild_group<D: Ops>(
    model: &Model<'_, D>,
    layer: usize,
    group: &Group,
    dense: &[PartWeights<D>],
    stream: &[Hidden<D>],
    settings: &Rebuild<'_>,
    pruned: &mut Pruned,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<executor::ops::Matrix<D>>, Error> {
    let Group { name, members, parts } = group;
    let failed = || model::Error::device(format!("layer {layer}, {name}"));
    let sparse = |pruned: &Pruned| -> Result<Vec<_>, model::Error> {
        dense.iter().map(|part| model.pruned(layer, part, pruned)).collect()
    };
    let needs = settings.pipeline.iter().fold(Needs::NOTHING, |n, (_, m)| n.or(m.needs()));
    let linears = |part: &Part| {
        let members = members.iter().filter(|member| member.part == *part);
        members.map(|member| member.linear).collect()
    };
    let wanted: Vec<Vec<usize>> = parts.iter().map(linears).collect();
    let measured = executor::measure(dense, &sparse(pruned)?, stream, &wanted, needs);
    let measured = measured.map_err(failed())?;
    // Where a member's part is among those measured.
    let place = |member: &Member| parts.iter().position(|part| *part == member.part).unwrap_or(0);
    let statistics: Vec<_> =
        members.iter().map(|member| &measured.statistics[place(member)][member.linear]).collect();
    if !measured.loss.is_finite() {
        let (group, loss) = (name.clone(), measured.loss);
        return Err(Error::NotFinite { layer, group, loss });
    }

    let mut scored = Vec::new();
    for (member, statistics) in members.iter().zip(&statistics) {
        let Linear { weight: tensor, dims, .. } = member.of(&model.decoder.layers[layer]);
        let dims = *dims;
        // A matrix of the group always has a mask: the plan that started it is this one.
        let mask = pruned.masks.remove(tensor).unwrap_or_else(|| Mask::kept_everywhere(dims));
        // What the initialiser made of the weights still gave the target above.
        if !settings.retain {
            pruned.restore(tensor);
        }
        let changed = pruned.values(tensor)?;
        let dense = &dense[place(member)].linears[member.linear];
        let weight = changed.as_deref().unwrap_or_else(|| dense.values());
        let stats = statistics.of(tensor, dims, weight);
        let scores = score(settings.pipeline, &LayerStats { mask: &mask.to_bools(), ..stats })?;
        scored.push((tensor, member.rule, scores, mask));
    }
    let mut swaps = vec![0; scored.len()];
    for (i, Member { rule, .. }) in members.iter().enumerate() {
        // Matrices with one scope and one pattern are rebuilt together, when the first is reached.
        let alike = |of: &Rule| (of.scope, of.pattern) == (rule.scope, rule.pattern);
        if members[..i].iter().any(|member| alike(&member.rule)) {
            continue;
        }
        let (places, mut matrices): (Vec<_>, Vec<_>) = scored
            .iter_mut()
            .enumerate()
            .filter(|(_, (_, of, ..))| alike(of))
            .map(|(i, (name, _, scores, mask))| (i, Scored { name: name.as_str(), scores, mask }))
            .unzip();
        let found = mask::rebuild(&mut matrices, rule.scope, rule.pattern, settings.alpha)?;
        places.into_iter().zip(found).for_each(|(place, found)| swaps[place] = found);
    }

    let mut reports = Vec::new();
    for ((tensor, _, _, mask), came_back) in scored.into_iter().zip(swaps) {
        reports.push(MatrixReport {
            tensor: tensor.clone(),
            came_back,
            kept: mask.kept(),
            weights: mask.dims().len(),
        });
        pruned.masks.insert(tensor.clone(), mask);
    }
    let outputs = executor::outputs(&sparse(pruned)?, stream).map_err(failed())?;
    let report = GroupReport {
        layer,
        group: name.clone(),
        error_before: measured.loss,
        error_after: executor::loss(&outputs, &measured.outputs).map_err(failed())?,
        matrices: reports,
    };
    event(Event::Group(&report, &statistics));
    Ok(outputs)
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
