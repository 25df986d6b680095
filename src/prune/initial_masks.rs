//! The initial masks.

use std::{path::Path, slice::from_ref};

use barber_metric::{LayerStats, Needs};

use super::{
    Error, Event, ExpertReport, MetricStep, Observer, Pass, Sampled, Side, failed, members,
    pipeline::{self, score},
    predictions,
};
use crate::{
    buffer::recycle,
    checkpoint::{Pruned, Reader},
    dtype::Dtype,
    executor::{self, Probe, Statistics, Stream, ops::Ops},
    family::Part,
    mask::{self, Amount, Init, Initial, Scope},
    model::Model,
    plan::{Plan, Rule},
    structure::Removal,
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
    pub zeros: Option<&'a Reader>,
    /// Which model's hidden states the statistics are computed on.
    pub side: Side,
    /// The format in which changed weights are stored; `None` for the checkpoint's.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
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
    if initial.needs().squared_gradient {
        if first < layers {
            initial.by_gradients(model, plan, samples, &mut pruned, observer)?;
        }
        return Ok(pruned);
    }
    let mut stream = match streams.pop() {
        None if initial.needs().inputs() && first < layers => {
            Some(model.embed(samples.calibration(), 0)?)
        }
        given => given,
    };
    for layer in first..layers {
        let event = &mut |event: Event<'_>| observer.event(event);
        initial.layer(model, plan, layer, stream.as_ref(), &mut pruned, event)?;
        if let Some(stream) = &mut stream
            && layer + 1 < layers
        {
            for part in Part::ALL {
                let weights = match initial.side {
                    Side::Sparse => model.part(layer, part, &pruned)?,
                    Side::Dense => model.part(layer, part, &Pruned::dense())?,
                };
                let moved =
                    model.executor.run(executor::Pass::advancing(from_ref(&weights), stream));
                moved.map_err(failed(layer, part.name()))?;
            }
        }
        observer.event(Event::Layer(layer));
        let streams: Vec<_> = stream.iter().filter(|_| layer + 1 < layers).collect();
        observer.state(layer + 1, &pruned, &streams)?;
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
        predictions::statistics(model, samples, &members, needs, &mut |layer, statistics| {
            for part in Part::ALL {
                self.part(model, plan, layer, part, &statistics[part as usize], pruned)?;
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
        plan: &Plan,
        layer: usize,
        stream: Option<&Stream<D>>,
        pruned: &mut Pruned,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Error> {
        let mut statistics = Vec::new();
        if let Some(stream) = stream {
            let mut dense = Vec::new();
            for part in Part::ALL {
                dense.push(model.part(layer, part, &Pruned::dense())?);
            }
            let members = members(plan, layer);
            let probe = Some(Probe::new(&members, self.needs()));
            let pass = executor::Pass { probe, ..executor::Pass::new(&dense, stream) };
            let found = model.executor.run(pass);
            statistics = found.map_err(failed(layer, "initial masks"))?.statistics;
        }
        for part in Part::ALL {
            let statistics = statistics.get(part as usize).map_or(&[][..], Vec::as_slice);
            if let Some(found) = ExpertReport::new(model, layer, part, statistics) {
                event(Event::Experts(&found));
            }
            self.part(model, plan, layer, part, statistics, pruned)?;
        }
        Ok(())
    }

    /// Chooses the initial masks of a part.
    pub(super) fn part<D: Ops>(
        &self,
        model: &Model<'_, D>,
        plan: &Plan,
        layer: usize,
        part: Part,
        statistics: &[Statistics],
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        if let Some(removal) = plan.removal.as_ref().filter(|removal| removal.part == part) {
            return self.structures(model, removal, layer, statistics, pruned);
        }
        let none = Statistics::default();
        for (member, linear) in plan.matrices(&model.decoder, layer) {
            if member.part == part {
                let weight = match self.zeros {
                    Some(sparse) => {
                        sparse.read(&linear.weight, &[linear.dims.rows, linear.dims.columns])?
                    }
                    None => model.values(linear)?,
                };
                let stats = statistics.get(member.linear).unwrap_or(&none);
                let stats = stats.of(&linear.weight, linear.dims, &weight);
                self.matrix(model.reader, &stats, member.rule, pruned)?;
                recycle(weight);
            }
        }
        Ok(())
    }

    /// Chooses the structures of a layer that are removed: those with the lowest sums of their
    /// weights' scores.
    fn structures<D: Ops>(
        &self,
        model: &Model<'_, D>,
        removal: &Removal,
        layer: usize,
        statistics: &[Statistics],
        pruned: &mut Pruned,
    ) -> Result<(), Error> {
        let none = Statistics::default();
        let mut sums = vec![0.0; removal.of];
        let projections = model.decoder.layers[layer].projections(removal.part);
        for (i, linear) in projections.iter().enumerate().filter(|(i, _)| removal.has(layer, *i)) {
            let (name, dims, weight) = (&linear.weight, linear.dims, model.values(linear)?);
            let stats = statistics.get(i).unwrap_or(&none).of(name, dims, &weight);
            let scores = match self.init.scores {
                Some(scores) => scores(&stats)?,
                None => self.score(&stats)?,
            };
            mask::Error::check_numbers(name, dims.columns, &scores)?;
            removal.add(layer, (i, dims), &scores, &mut sums);
            recycle(weight);
        }
        pruned.masks.extend(removal.masks(&model.decoder, layer, &removal.keep(&sums)));
        Ok(())
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
        let name = stats.name;
        let amount = rule.count.map_or(Amount::Ratio(rule.ratio), Amount::Exactly);
        let scores = self.init.metrics.then(|| self.score(stats)).transpose()?;
        let metric = scores.as_deref().map(|scores| (scores, self.metric.1));
        let Initial { mask, values, damping } =
            self.init.choose(stats, rule.pattern, amount, metric)?;
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
