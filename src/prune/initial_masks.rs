//! The initial masks.

use std::{path::Path, slice::from_ref};

use barber_metric::{Dims, LayerStats, Needs, StructureStats};

use super::{
    Error, Event, ExpertReport, MetricStep, Observer, Pass, Sampled, Side, failed, members,
    pipeline::{self, score},
    predictions,
};
use crate::{
    buffer::recycle,
    checkpoint::{Pruned, Reader},
    dtype::Dtype,
    executor::{self, Probe, Statistics, Stream, StructureStatistics, ops::Ops},
    family::{Part, Projection},
    mask::{self, Amount, Init, Initial, Mask, Scope},
    model::Model,
    plan::{Plan, Rule},
    structure::{Lost, Removal, Scores},
};

/// The settings for initial masks.
#[derive(Clone, Copy)]
pub struct InitialMasks<'a> {
    /// The initialiser.
    pub init: Init,
    /// The metric pipeline, for an initialiser that uses one, and the scope in which weights
    /// compete; `None` for the initialiser's own.
    pub metric: (&'a [MetricStep], Option<Scope>),
    /// The sparse checkpoint whose zeros are the initial masks; `None` for the model's own zeros.
    pub sparse: Option<SparseModel<'a>>,
    /// Which model's hidden states the statistics are computed on.
    pub side: Side,
    /// The format in which changed weights are stored; `None` for the checkpoint's.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
}

/// A sparse checkpoint whose zeros are the initial masks.
#[derive(Clone, Copy)]
pub struct SparseModel<'a> {
    /// The checkpoint.
    pub reader: &'a Reader,
    /// Whether kept weights have its values; if not, they have the dense model's.
    pub retain: bool,
}

/// The plan of initial masks, and what is known so far of the structures that it removes.
pub(super) struct Choosing<'a> {
    plan: &'a Plan,
    /// The scores of structures; `None` where single weights are pruned.
    scores: Option<Scores<'a>>,
    /// The influence of the layers so far, in any order, with their indices.
    influence: Vec<(usize, f32)>,
}

impl<'a> From<&'a Plan> for Choosing<'a> {
    fn from(plan: &'a Plan) -> Self {
        Self { plan, scores: plan.removal.as_ref().map(Scores::new), influence: Vec::new() }
    }
}

/// Chooses the initial masks, layer by layer. A dense forward pass of a layer gives its statistics;
/// its input is the output of the layers before, pruned or dense as `side` says. Metrics that need
/// gradients get those of the dense model's predictions: the layers then go from the last to the
/// first, in one pass that is not saved before its end.
///
/// # Errors
/// [`Error`] if the model cannot be run on the samples or a mask cannot be made.
pub fn initial_masks<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    initial: &InitialMasks<'_>,
    samples: Sampled<'_>,
    from: impl Into<Pass<D>>,
    observer: &mut dyn Observer<D>,
) -> Result<Pruned, Error> {
    let Pass { layer: first, mut pruned, mut streams } = from.into();
    let layers = model.decoder.layers.len();
    // What competes over all layers is chosen after the last one, and nothing is saved before.
    let saves = plan.removal.as_ref().is_none_or(|of| !of.lost.iter().any(Lost::is_of_model));
    // A masked layer or expert is not one that is gone; statistics are of the dense model.
    let leaves_inputs = plan.removal.as_ref().is_none_or(Removal::leaves_inputs);
    let of_samples = Needs { squared_gradient: false, ..initial.needs() }.samples();
    if initial.needs().squared_gradient {
        if first < layers {
            initial.by_gradients(model, plan, samples, &mut pruned, observer)?;
        }
        return Ok(pruned);
    }
    let mut stream = match streams.pop() {
        None if of_samples && first < layers => Some(model.embed(samples.calibration(), 0)?),
        given => given,
    };
    let mut choosing = Choosing::from(plan);
    for layer in first..layers {
        let event = &mut |event: Event<'_>| observer.event(event);
        initial.layer(model, &mut choosing, layer, stream.as_ref(), &mut pruned, event)?;
        if let Some(stream) = &mut stream
            && layer + 1 < layers
        {
            for part in Part::ALL {
                let weights = match initial.side {
                    Side::Sparse if leaves_inputs => model.part(layer, part, &pruned)?,
                    _ => model.part(layer, part, &Pruned::dense())?,
                };
                let moved =
                    model.executor.run(executor::Pass::advancing(from_ref(&weights), stream));
                moved.map_err(failed(layer, part.name()))?;
            }
        }
        observer.event(Event::Layer(layer));
        if saves {
            let streams: Vec<_> = stream.iter().filter(|_| layer + 1 < layers).collect();
            observer.state(layer + 1, &pruned, &streams)?;
        }
    }
    if !saves && first < layers {
        (1..=layers).try_for_each(|layers| observer.state(layers, &pruned, &[]))?;
    }
    Ok(pruned)
}

impl InitialMasks<'_> {
    /// The statistics that the initialiser and its metrics need.
    pub(super) fn needs(&self) -> Needs {
        self.init.needs.or(pipeline::needs(self.metric.0))
    }

    /// Chooses the initial masks of all layers by gradients of the dense model's predictions.
    fn by_gradients<D: Ops>(
        &self,
        model: &Model<'_, D>,
        plan: &Plan,
        samples: Sampled<'_>,
        pruned: &mut Pruned,
        observer: &mut dyn Observer<D>,
    ) -> Result<(), Error> {
        let layers = model.decoder.layers.len();
        let members: Vec<_> = (0..layers).map(|layer| members(plan, layer)).collect();
        let (samples, needs) = (samples.calibration(), self.needs());
        let mut choosing = Choosing::from(plan);
        predictions::statistics(model, samples, &members, needs, &mut |layer, found| {
            let predictions::Found { statistics, structures } = found;
            choosing.influence.extend(structures.influence.map(|found| (layer, found)));
            for part in Part::ALL {
                let place = (layer, part);
                let found = (&statistics[part as usize][..], &structures);
                self.part(model, &mut choosing, place, found, pruned)?;
            }
            observer.event(Event::Layer(layer));
            Ok(())
        })?;
        // The masks of all layers are saved together.
        (1..=layers).try_for_each(|layers| observer.state(layers, pruned, &[]))
    }

    /// Chooses the initial masks of a layer, with the statistics of one dense forward pass on
    /// `stream`.
    pub(super) fn layer<D: Ops>(
        &self,
        model: &Model<'_, D>,
        choosing: &mut Choosing<'_>,
        layer: usize,
        stream: Option<&Stream<D>>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let (mut statistics, mut structures) = (Vec::new(), StructureStatistics::default());
        if let Some(stream) = stream {
            let mut dense = Vec::new();
            for part in Part::ALL {
                dense.push(model.part(layer, part, &Pruned::dense())?);
            }
            let (members, needs) = (members(choosing.plan, layer), self.needs());
            let failed = || failed(layer, "initial masks");
            if needs.inputs() {
                let probe = Some(Probe::new(&members, needs));
                let pass = executor::Pass { probe, ..executor::Pass::new(&dense, stream) };
                statistics = model.executor.run(pass).map_err(failed())?.statistics;
            }
            if needs.structures() {
                let found = model.executor.structure_statistics(&dense, stream, needs);
                structures = found.map_err(failed())?;
            }
            choosing.influence.extend(structures.influence.map(|found| (layer, found)));
        }
        for part in Part::ALL {
            let statistics = statistics.get(part as usize).map_or(&[][..], Vec::as_slice);
            if let Some(found) = ExpertReport::new(model, layer, part, statistics) {
                event(Event::Experts(&found));
            }
            self.part(model, choosing, (layer, part), (statistics, &structures), pruned)?;
        }
        Ok(())
    }

    /// Chooses the initial masks of a part.
    pub(super) fn part<D: Ops>(
        &self,
        model: &Model<'_, D>,
        choosing: &mut Choosing<'_>,
        (layer, part): (usize, Part),
        (statistics, structures): (&[Statistics], &StructureStatistics),
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        if choosing.scores.is_some() {
            let found = (statistics, structures);
            return self.structures(model, choosing, (layer, part), found, pruned);
        }
        let (none, matrices) =
            (Statistics::default(), choosing.plan.matrices(&model.decoder, layer));
        let matrices: Vec<_> = matrices.filter(|(member, _)| member.part == part).collect();
        let takes = self.init.takes;
        let work: Vec<f64> = matrices.iter().map(|(_, of)| takes.work(of.dims)).collect();
        let choose = |i: usize| {
            let (member, linear) = &matrices[i];
            let weight = match self.sparse {
                Some(SparseModel { reader, .. }) => {
                    reader.read(&linear.weight, &[linear.dims.rows, linear.dims.columns])?
                }
                None => model.values(linear)?,
            };
            let stats = statistics.get(member.linear).unwrap_or(&none);
            let mut chosen = self.choose(model.reader, &stats.of(linear, &weight), member.rule)?;
            if self.sparse.is_some_and(|sparse| sparse.retain) {
                chosen.values = self.retained(model, linear, &weight, &chosen.mask)?;
            }
            recycle(weight);
            Ok(chosen)
        };
        let unpack = |i: usize, bytes: &[u8]| {
            let Projection { weight, dims, .. } = matrices[i].1;
            let dtype = Pruned::stored_as(model.reader, weight, self.dtype);
            Chosen::unpacked(bytes, *dims, dtype)
                .unwrap_or_else(|| unreachable!("another rank's mask of `{weight}`"))
        };
        model.executor.ranks.of_items(&work, choose, (Chosen::packed, unpack), |i, chosen| {
            self.set(&matrices[i].1.weight, chosen, pruned)
        })
    }

    /// The values of a sparse model's kept weights and the dense ones of the others, which may come
    /// back; `None` if all are dense.
    fn retained<D: Ops>(
        &self,
        model: &Model<'_, D>,
        linear: &Projection,
        sparse: &[f32],
        mask: &Mask,
    ) -> Result<Option<(Dtype, Vec<u8>)>, Error> {
        let mut values = model.values(linear)?;
        let mut changes = false;
        for (i, (value, own)) in values.iter_mut().zip(sparse).enumerate() {
            if mask.get(i) && value != own {
                (*value, changes) = (*own, true);
            }
        }
        let name = &linear.weight;
        let rounded = changes.then(|| Pruned::rounded(model.reader, name, &values, self.dtype));
        recycle(values);
        Ok(rounded.transpose()?)
    }

    /// Adds the scores of a part's weights to those of the structures that have them, and removes the
    /// structures with the lowest where all that compete have their scores.
    fn structures<D: Ops>(
        &self,
        model: &Model<'_, D>,
        choosing: &mut Choosing<'_>,
        (layer, part): (usize, Part),
        (statistics, structures): (&[Statistics], &StructureStatistics),
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        let Choosing { plan: Plan { removal: Some(removal), .. }, scores: Some(all), influence } =
            choosing
        else {
            return Ok(());
        };
        let none = Statistics::default();
        let projections = model.decoder.layers[layer].projections(part).iter().enumerate();
        let weighs = self.weighs();
        for (i, linear) in projections.filter(|_| weighs) {
            if all.wants(layer, part, i) {
                let weight = model.values(linear)?;
                let stats = statistics.get(i).unwrap_or(&none).of(linear, &weight);
                let stats = LayerStats { whole_rows: removal.has_rows(layer, part, i), ..stats };
                let scores = match self.init.scores {
                    Some(scores) => scores(&stats)?,
                    None => self.score(&stats)?,
                };
                mask::Error::check_numbers(stats.name, stats.dims.columns, &scores)?;
                all.add((layer, part, i), stats.dims, &scores);
                recycle(weight);
            }
        }
        all.end_part((layer, part), &model.decoder, &mut pruned.masks, |lost, scores| {
            influence.sort_by_key(|(layer, _)| *layer);
            let influence: Vec<f32> = influence.iter().map(|(_, found)| *found).collect();
            let stats = StructureStats {
                structure: lost.structure.name,
                layer: (!lost.is_of_model()).then_some(layer),
                influence: (!influence.is_empty()).then_some(&influence),
                contribution: structures.contribution.as_deref(),
            };
            if !weighs {
                scores.fill(1.0);
            }
            pipeline::score_structures(self.metric.0, &stats, scores)
        })
    }

    /// Whether anything scores single weights.
    fn weighs(&self) -> bool {
        let mut metrics = self.metric.0.iter();
        !self.init.metrics || metrics.any(|(_, metric)| metric.structures().is_empty())
    }

    /// The scores of a matrix by the metric pipeline; nothing is pruned yet.
    fn score(&self, stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
        let mask = vec![true; stats.dims.len()];
        score(self.metric.0, &LayerStats { mask: &mask, ..*stats })
    }

    /// Chooses the initial mask of one matrix.
    pub(super) fn matrix(
        &self,
        reader: &Reader,
        stats: &LayerStats<'_>,
        rule: Rule,
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        self.set(stats.name, self.choose(reader, stats, rule)?, pruned)
    }

    /// The initial mask of one matrix.
    fn choose(&self, reader: &Reader, stats: &LayerStats<'_>, rule: Rule) -> Result<Chosen, Error> {
        let amount = rule.count.map_or(Amount::Ratio(rule.ratio), Amount::Exactly);
        let scores = self.init.metrics.then(|| self.score(stats)).transpose()?;
        let metric = scores.as_deref().map(|scores| (scores, self.metric.1));
        let Initial { mask, values, damping } =
            self.init.choose(stats, rule.pattern, amount, metric)?;
        let round = |values: Vec<f32>| Pruned::rounded(reader, stats.name, &values, self.dtype);
        Ok(Chosen { mask, values: values.map(round).transpose()?, damping })
    }

    /// Sets the initial mask of a matrix.
    fn set(&self, name: &str, chosen: Chosen, pruned: &mut Pruned) -> Result<(), Error> {
        let Chosen { mask, values, damping } = chosen;
        if let Some(damping) = damping {
            tracing::warn!(
                "`{name}`: the Hessian is not positive definite; its damping is raised to \
                 {damping} of its mean diagonal. More calibration samples would help"
            );
        }
        if let Some((dtype, values)) = values {
            pruned.store(name, dtype, &values, self.scratch)?;
        }
        pruned.masks.insert(name.into(), mask);
        Ok(())
    }
}

/// An initial mask, with the changed weights as they are stored.
struct Chosen {
    mask: Mask,
    values: Option<(Dtype, Vec<u8>)>,
    damping: Option<f64>,
}

impl Chosen {
    /// The damping, the mask and the weights, as a rank sends them to others.
    fn packed(&self) -> Vec<u8> {
        let mut bytes = self.damping.unwrap_or(f64::NAN).to_le_bytes().to_vec();
        bytes.extend(self.mask.to_bytes());
        bytes.extend(self.values.iter().flat_map(|(_, values)| values));
        bytes
    }

    /// What another rank found of a matrix of this shape, whose weights are stored in this format.
    fn unpacked(bytes: &[u8], dims: Dims, dtype: Dtype) -> Option<Self> {
        let (damping, bytes) = bytes.split_first_chunk()?;
        let damping = Some(f64::from_le_bytes(*damping)).filter(|damping| !damping.is_nan());
        let (mask, values) = bytes.split_at_checked(Mask::bytes(dims))?;
        let mask = Mask::from_bytes(dims, mask)?;
        let values = (!values.is_empty()).then(|| (dtype, values.to_vec()));
        Some(Self { mask, values, damping })
    }
}
