//! The state of a group while it is refined: target output, output error, statistics of its
//! matrices.

use barber_metric::Needs;

use super::{
    Error, Event, ExpertReport, GroupReport, MatrixReport, Refine, Refinement, StageReport,
    Streams, failed,
};
use crate::{
    buffer::recycle,
    checkpoint::Pruned,
    dtype::Dtype,
    executor::{
        self, ActivationCache, Beside, Caching, Found, Loss, Outputs, PartWeights, Pass, Probe,
        Recorded, Statistics, Store, Targets, ops::Ops,
    },
    family::Projection,
    mask::Mask,
    model::{self, Model},
    plan::{Group, Member},
    structure::Removal,
};

/// A group while its stages run. It holds one set of weights at a time.
pub(super) struct GroupState<'a, D: Ops> {
    pub(super) model: &'a Model<'a, D>,
    pub(super) layer: usize,
    pub(super) group: &'a Group,
    pub(super) refinement: &'a Refinement<'a>,
    /// The structures that are removed as a whole, if any are.
    pub(super) removal: Option<&'a Removal>,
    /// Outputs of the part's dense linear layers on the sparse stream.
    pub(super) cache: Option<&'a ActivationCache<D>>,
    /// Statistics of the part's dense linear layers; empty if none were computed.
    pub(super) statistics: &'a [Statistics],
    /// The target output of the part's groups, if it is known.
    pub(super) shared_target: Option<&'a Store<D>>,
    pub(super) streams: &'a mut Streams<D>,
    pub(super) pruned: &'a mut Pruned,
    /// The target output, computed on first use.
    pub(super) own_target: Option<Store<D>>,
    /// The output error with the current masks and weights, if it is known.
    pub(super) loss: Option<Loss>,
    /// Whether the sparse stream moves on with the result of the stage that runs.
    pub(super) advances: bool,
    /// Outputs of the first layers of the group's part with earlier masks, and these masks.
    pub(super) recorded: Option<(ActivationCache<D>, Masks)>,
}

/// Cost of a changed weight in a sparse product, relative to a weight in a dense product.
const ENTRY: usize = 8;

/// The masks of a group's matrices, saved so that a stage can be undone.
pub(super) type Masks = Vec<Mask>;

impl<D: Ops> GroupState<'_, D> {
    /// Runs the stages. With `advance` the sparse stream moves on with the last one's result;
    /// returns whether it did.
    pub(super) fn refine(
        &mut self,
        stages: &[Refine],
        advance: bool,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(GroupReport, bool), Error> {
        let mut reports = Vec::new();
        let mut advanced = false;
        for (i, stage) in stages.iter().enumerate() {
            let before = self.masks();
            self.advances = advance && i + 1 == stages.len();
            let Some(found) = stage.run(self, event)? else { continue };
            let after = match found.after {
                Some(after) => after,
                None if self.advances => {
                    advanced = true;
                    self.advance()?
                }
                None => self.error()?,
            };
            self.loss = Some(after);
            reports.push(StageReport {
                stage: stage.name().into(),
                before: found.before,
                after,
                accepted: found.accepted,
                matrices: self.changes(&before),
                scores: found.scores,
            });
        }
        let report =
            GroupReport { layer: self.layer, group: self.group.name.clone(), stages: reports };
        Ok((report, advanced))
    }

    /// The weights of the group's parts, pruned as `pruned` says.
    fn weights(&self, pruned: &Pruned) -> Result<Vec<PartWeights<D>>, model::Error> {
        let parts = self.group.parts.iter();
        parts.map(|part| self.model.part(self.layer, *part, pruned)).collect()
    }

    /// The current weights of the group's parts.
    pub(super) fn sparse(&self) -> Result<Vec<PartWeights<D>>, model::Error> {
        self.weights(self.pruned)
    }

    /// The dense weights of the group's parts.
    pub(super) fn dense(&self) -> Result<Vec<PartWeights<D>>, model::Error> {
        self.weights(&Pruned::dense())
    }

    /// The index of a matrix's part among the group's parts.
    pub(super) fn place(&self, member: Member) -> usize {
        self.group.parts.iter().position(|part| *part == member.part).unwrap_or(0)
    }

    pub(super) fn linear(&self, member: Member) -> &Projection {
        member.of(&self.model.decoder.layers[self.layer])
    }

    /// Adds the layer and the group to an error of the executor.
    pub(super) fn failed(&self) -> impl FnOnce(executor::Error) -> model::Error + use<D> {
        failed(self.layer, &self.group.name)
    }

    /// Runs a pass.
    pub(super) fn run(&self, pass: Pass<'_, D>) -> Result<Found<D>, Error> {
        Ok(self.model.executor.run(pass).map_err(self.failed())?)
    }

    /// Computes the target output unless it is known.
    pub(super) fn make_target(&mut self) -> Result<(), Error> {
        if self.shared_target.is_some() || self.own_target.is_some() {
            return Ok(());
        }
        let (dense, streams) = (self.dense()?, &*self.streams);
        let outputs = |stream, cache| {
            let pass = Pass { outputs: Outputs::Kept, cache, ..Pass::new(&dense, stream) };
            Ok::<_, Error>(self.run(pass)?.outputs)
        };
        let mut target = outputs(&streams.sparse, self.caching())?;
        if let Some(stream) = &streams.dense {
            let on_dense = outputs(stream, Caching::Off)?;
            let (blend, device) = (self.refinement.blend, &self.model.executor.device);
            target.blend(&on_dense, blend, device).map_err(self.failed())?;
        }
        self.own_target = Some(target);
        Ok(())
    }

    /// The target output; [`Self::make_target`] comes first.
    pub(super) fn target(&self) -> &Store<D> {
        let made = self.shared_target.or(self.own_target.as_ref());
        made.unwrap_or_else(|| unreachable!("it is made first"))
    }

    /// The output error with the current masks and weights.
    pub(super) fn error(&mut self) -> Result<Loss, Error> {
        if let Some(loss) = self.loss {
            return Ok(loss);
        }
        self.make_target()?;
        let (sparse, targets) = (self.sparse()?, Targets::Outputs(self.target()));
        let pass = Pass { targets, ..Pass::new(&sparse, &self.streams.sparse) };
        let loss = self.finite(self.run(pass)?.loss)?;
        self.loss = Some(loss);
        Ok(loss)
    }

    /// Whether the current output error on the held-out samples is below `before`; true if there
    /// are no held-out samples.
    pub(super) fn lowers_held_out(&mut self, before: Loss) -> Result<bool, Error> {
        let Some(before) = before.held_out else { return Ok(true) };
        self.make_target()?;
        let (sparse, stream) = (self.sparse()?, &self.streams.sparse);
        let (runs, targets) = (Some(stream.held_out_runs()), Targets::Outputs(self.target()));
        let pass = Pass { runs, targets, ..Pass::new(&sparse, stream) };
        let after = self.run(pass)?.loss.held_out;
        Ok(after.is_some_and(|after| after < before))
    }

    /// Whether a dense pass uses cached outputs.
    fn caching(&self) -> Caching<'_, D> {
        self.cache.map_or(Caching::Off, Caching::Use)
    }

    /// The paper's statistics, at the dense weights: gradients of the dense outputs' error towards
    /// the sparse outputs.
    pub(super) fn dense_statistics(&mut self, needs: Needs) -> Result<Vec<Vec<Statistics>>, Error> {
        let sparse = self.sparse()?;
        // The stream advances through one part, whose first layers change little.
        let recorded = self.advances.then_some(Caching::Record(Recorded::First));
        let Found { outputs, cache, .. } = self.run(Pass {
            outputs: Outputs::Kept,
            cache: recorded.unwrap_or_default(),
            ..Pass::new(&sparse, &self.streams.sparse)
        })?;
        drop(sparse);
        if let Some(cache) = cache {
            self.recorded = Some((cache, self.masks()));
        }
        let (dense, members) = (self.dense()?, self.group.linears());
        let found = self.run(Pass {
            targets: Targets::Replaced(outputs),
            probe: Some(Probe::new(&members, needs)),
            cache: self.caching(),
            ..Pass::new(&dense, &self.streams.sparse)
        })?;
        drop(dense);
        // Without a dense stream the dense outputs are the target output. The pass stored them in
        // place of the sparse ones.
        if self.streams.dense.is_none() {
            self.own_target = Some(found.outputs);
            let loss = self.finite(found.loss)?;
            // In half precision the sparse outputs were rounded here; other errors round the
            // targets, and only errors measured alike may be compared.
            if self.model.executor.storage.dtype() == Dtype::F32 {
                self.loss.get_or_insert(loss);
            }
        }
        Ok(found.statistics)
    }

    /// Statistics at the sparse weights: gradients of the sparse outputs' error towards the target.
    pub(super) fn sparse_statistics(
        &mut self,
        needs: Needs,
    ) -> Result<Vec<Vec<Statistics>>, Error> {
        self.make_target()?;
        let (sparse, members) = (self.sparse()?, self.group.linears());
        let found = self.run(Pass {
            targets: Targets::Outputs(self.target()),
            probe: Some(Probe::new(&members, needs)),
            ..Pass::new(&sparse, &self.streams.sparse)
        })?;
        let loss = self.finite(found.loss)?;
        self.loss.get_or_insert(loss);
        Ok(found.statistics)
    }

    /// Calls `run` for each matrix of the group with its statistics, Gram matrix included, in the
    /// dense group.
    pub(super) fn each_matrix(
        &mut self,
        mut run: impl FnMut(&mut Self, Member, &Statistics) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let group = self.group;
        let has_gram = |member: &Member| {
            self.statistics.get(member.linear).is_some_and(|found| found.gram.is_some())
        };
        let gathered;
        let statistics = if group.members.iter().all(has_gram) {
            vec![self.statistics; group.parts.len()]
        } else {
            let (dense, members) = (self.dense()?, group.linears());
            let (streams, side) = (&*self.streams, self.refinement.statistics);
            let found = self.run(Pass {
                beside: streams.dense.as_ref().map(|stream| Beside { stream, side }),
                outputs: Outputs::Kept,
                probe: Some(Probe::new(&members, Needs::GRAM)),
                ..Pass::new(&dense, &streams.sparse)
            });
            gathered = found?.statistics;
            gathered.iter().map(Vec::as_slice).collect()
        };
        for member in &group.members {
            let place = self.place(*member);
            run(self, *member, &statistics[place][member.linear])?;
        }
        Ok(())
    }

    /// Tells how many tokens experts saw, if the statistics of the group's parts are of experts.
    pub(super) fn count_experts(
        &self,
        statistics: &[Vec<Statistics>],
        event: &mut dyn FnMut(Event<'_>),
    ) {
        for (part, statistics) in self.group.parts.iter().zip(statistics) {
            if let Some(found) = ExpertReport::new(self.model, self.layer, *part, statistics) {
                event(Event::Experts(&found));
            }
        }
    }

    /// The loss itself, or an error if it is not finite.
    pub(super) fn finite(&self, loss: Loss) -> Result<Loss, Error> {
        let (layer, group) = (self.layer, self.group.name.clone());
        if !loss.calibration.is_finite() {
            return Err(Error::NotFinite { layer, group, loss: loss.calibration });
        }
        Ok(loss)
    }

    /// Moves the sparse stream on; returns the output error.
    fn advance(&mut self) -> Result<Loss, Error> {
        self.make_target()?;
        let sparse = self.sparse()?;
        let mut recorded = match self.recorded.take() {
            Some((cache, masks)) => Some((cache, self.since(&masks)?)),
            None => None,
        };
        let cache = match &mut recorded {
            Some((cache, changes)) => Caching::Correct(cache, changes),
            None => Caching::Off,
        };
        let targets = self.shared_target.or(self.own_target.as_ref());
        let targets = targets.map_or(Targets::None, Targets::Outputs);
        let pass =
            Pass { targets, cache, ..Pass::advancing(&sparse[..1], &mut self.streams.sparse) };
        let found = self.model.executor.run(pass);
        self.finite(found.map_err(self.failed())?.loss)
    }

    /// The difference between the part's weights with the current masks and with `masks`, for the
    /// matrices where few weights differ.
    fn since(&self, masks: &Masks) -> Result<Vec<Option<D::Entries>>, Error> {
        let part = self.group.parts[0];
        let linears = self.model.decoder.layers[self.layer].projections(part);
        let mut changes = Vec::new();
        for (i, linear) in linears.iter().enumerate() {
            let members = self.group.members.iter().position(|m| (m.part, m.linear) == (part, i));
            let mut entries = Vec::new();
            if let Some(member) = members {
                let (mask, values) = (self.mask(self.group.members[member]), self.values(linear)?);
                for at in mask.differences(&masks[member]) {
                    let value = if mask.get(at) { values[at] } else { -values[at] };
                    entries.push((at / linear.dims.columns, at % linear.dims.columns, value));
                }
                recycle(values);
            }
            let few = entries.len() * ENTRY <= linear.dims.len();
            let dims = (linear.dims.rows, linear.dims.columns);
            let entries = few.then(|| self.model.executor.device.entries(entries, dims));
            let entries = entries.transpose().map_err(executor::Error::device);
            changes.push(entries.map_err(self.failed())?);
        }
        Ok(changes)
    }

    /// The masks of the group's matrices.
    pub(super) fn masks(&self) -> Masks {
        self.group.members.iter().map(|member| self.mask(*member)).collect()
    }

    /// The mask of a matrix. It always exists: initial masks are made by the same plan.
    pub(super) fn mask(&self, member: Member) -> Mask {
        let linear = self.linear(member);
        let mask = self.pruned.masks.get(&linear.weight);
        mask.cloned().unwrap_or_else(|| Mask::kept_everywhere(linear.dims))
    }

    pub(super) fn set(&mut self, masks: &Masks) {
        for (member, mask) in self.group.members.iter().zip(masks) {
            let name = self.linear(*member).weight.clone();
            self.pruned.masks.insert(name, mask.clone());
        }
    }

    /// The current values of a matrix, row-major, those of pruned weights included.
    pub(super) fn values(&self, linear: &Projection) -> Result<Vec<f32>, Error> {
        Ok(match self.pruned.values(&linear.weight)? {
            Some(changed) => changed,
            None => self.model.values(linear)?,
        })
    }

    /// How each matrix's mask differs from the mask in `before`.
    fn changes(&self, before: &Masks) -> Vec<MatrixReport> {
        let of = |(member, before): (&Member, &Mask)| {
            let (linear, mask) = (self.linear(*member), self.mask(*member));
            MatrixReport {
                tensor: linear.weight.clone(),
                came_back: mask.without(before),
                kept_before: before.kept(),
                kept: mask.kept(),
                weights: linear.dims.len(),
            }
        };
        self.group.members.iter().zip(before).map(of).collect()
    }
}
