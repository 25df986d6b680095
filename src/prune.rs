//! The loop over the layers: initial masks, then their rebuild (LLM-Barber, arXiv 2408.10631).
//!
//! Both are passes over the decoder layers with one layer's weights at a time; only the hidden
//! states of the calibration samples, and the masks, live from layer to layer.

use barber_metric::{Dims, LayerStats, Metric, Needs};

use crate::{
    executor::{self, Hidden, PartWeights, Statistics, ops::Ops},
    family::Part,
    mask::{self, Init, Mask, Pattern, Scope, Scored},
    model::{self, Masks, Model},
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
pub struct Start {
    /// The rule.
    pub init: Init,
    /// Where zeros may be.
    pub pattern: Pattern,
    /// The share of weights to prune.
    pub ratio: f64,
}

/// A stage of the metric pipeline and its name.
pub type Stage = (String, Box<dyn Metric>);

/// How the masks are rebuilt.
pub struct Rebuild<'a> {
    /// Where weights compete.
    pub scope: Scope,
    /// Where zeros may be.
    pub pattern: Pattern,
    /// The share of the swaps worth doing that are done, α.
    pub alpha: f64,
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
    start: Start,
    samples: &[Vec<u32>],
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Masks, Error> {
    let needs = start.init.needs().input_square;
    let mut stream = if needs { model.embed(samples)? } else { Vec::new() };
    let mut masks = Masks::new();
    for layer in 0..model.decoder.layers.len() {
        let what = |part: Part| model::Error::device(format!("layer {layer}, {part:?}"));
        let mut dense = Vec::new();
        let mut squares = Vec::new();
        if needs {
            let mut through = stream.clone();
            for part in Part::ALL {
                let weights = model.part(layer, part)?;
                let (sums, outputs) =
                    executor::input_squares(&weights, &through).map_err(what(part))?;
                model.add(&mut through, outputs)?;
                squares.push(sums);
                dense.push(weights);
            }
        }
        for (part, i, linear) in plan.matrices(&model.decoder, layer) {
            let values;
            let weight = match dense.get(part as usize) {
                Some(weights) => weights.linears[i].values(),
                None => {
                    values = model.values(linear)?;
                    &values
                }
            };
            let stats = LayerStats {
                name: &linear.weight,
                dims: linear.dims,
                weight,
                mask: &[],
                squared_gradient: None,
                input_square: squares.get(part as usize).map(|sums| &sums[i][..]),
            };
            let mask = start.init.mask(&stats, start.pattern, start.ratio)?;
            masks.insert(linear.weight.clone(), mask);
        }
        for weights in dense {
            let sparse = model.masked(layer, &weights, &masks);
            let outputs = executor::outputs(&sparse, &stream).map_err(what(weights.part))?;
            model.add(&mut stream, outputs)?;
        }
        event(Event::Layer(layer));
    }
    Ok(masks)
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
    mut masks: Masks,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Masks, Error> {
    let mut stream = model.embed(samples)?;
    for (layer, groups) in plan.layers.iter().enumerate() {
        for part in Part::ALL {
            let dense = model.part(layer, part)?;
            let mut outputs = None;
            for group in groups.iter().filter(|group| group.part == part) {
                outputs = Some(rebuild_group(
                    model, layer, group, &dense, &stream, settings, &mut masks, event,
                )?);
            }
            let outputs = match outputs {
                Some(outputs) => outputs,
                None => executor::outputs(&model.masked(layer, &dense, &masks), &stream)
                    .map_err(model::Error::device(format!("layer {layer}, {part:?}")))?,
            };
            model.add(&mut stream, outputs)?;
        }
        event(Event::Layer(layer));
    }
    Ok(masks)
}

/// Rebuilds the masks of one group; returns the part's outputs with them.
#[expect(clippy::too_many_arguments, reason = "each is a thing of its own")]
fn rebuild_group<D: Ops>(
    model: &Model<'_, D>,
    layer: usize,
    group: &Group,
    dense: &PartWeights<D>,
    stream: &[Hidden<D>],
    settings: &Rebuild<'_>,
    masks: &mut Masks,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<executor::ops::Matrix<D>>, Error> {
    let Group { name, members, .. } = group;
    let failed = || model::Error::device(format!("layer {layer}, {name}"));
    let needs = settings.pipeline.iter().fold(Needs::NOTHING, |n, (_, m)| n.or(m.needs()));
    let sparse = model.masked(layer, dense, masks);
    let measured = executor::measure(dense, &sparse, stream, members, needs).map_err(failed())?;
    if !measured.loss.is_finite() {
        let (group, loss) = (name.clone(), measured.loss);
        return Err(Error::NotFinite { layer, group, loss });
    }

    let linears = model.decoder.layers[layer].linears(group.part);
    let mut scored = Vec::new();
    for &i in members {
        let tensor = &linears[i].weight;
        let dims = linears[i].dims;
        // A matrix of the group always has a mask: the plan that started it is this one.
        let mask = masks.remove(tensor).unwrap_or_else(|| Mask::kept_everywhere(dims));
        let weight = dense.linears[i].values();
        let scores =
            score(settings.pipeline, tensor, dims, weight, &mask, &measured.statistics[i])?;
        scored.push((tensor, scores, mask));
    }
    let mut matrices: Vec<_> = scored
        .iter_mut()
        .map(|(name, scores, mask)| Scored { name: name.as_str(), scores, mask })
        .collect();
    let swaps = mask::rebuild(&mut matrices, settings.scope, settings.pattern, settings.alpha)?;
    drop(matrices);

    let mut reports = Vec::new();
    for ((tensor, _, mask), came_back) in scored.into_iter().zip(swaps) {
        reports.push(MatrixReport {
            tensor: tensor.clone(),
            came_back,
            kept: mask.kept(),
            weights: mask.dims().len(),
        });
        masks.insert(tensor.clone(), mask);
    }
    let outputs = executor::outputs(&model.masked(layer, dense, masks), stream).map_err(failed())?;
    let report = GroupReport {
        layer,
        group: name.clone(),
        error_before: measured.loss,
        error_after: executor::loss(&outputs, &measured.outputs).map_err(failed())?,
        matrices: reports,
    };
    let statistics: Vec<_> = members.iter().map(|&i| &measured.statistics[i]).collect();
    event(Event::Group(&report, &statistics));
    Ok(outputs)
}

/// Runs the metric pipeline on one matrix.
fn score(
    pipeline: &[Stage],
    tensor: &str,
    dims: Dims,
    weight: &[f32],
    mask: &Mask,
    statistics: &Statistics,
) -> Result<Vec<f32>, Error> {
    let stats = LayerStats {
        name: tensor,
        dims,
        weight,
        mask: &mask.to_bools(),
        squared_gradient: statistics.squared_gradient.as_deref(),
        input_square: statistics.input_square.as_deref(),
    };
    let mut scores = vec![1.0; weight.len()];
    for (name, metric) in pipeline {
        metric.score(&stats, &mut scores).map_err(|source| Error::Metric {
            metric: name.clone(),
            tensor: tensor.into(),
            source,
        })?;
    }
    Ok(scores)
}
