//! One group at work: what it is to give, and by how much it misses that.

use super::{
    Error, Event, GroupReport, MatrixReport, Refine, Refinement, StageReport, Streams, failed,
};
use crate::{
    buffer::recycle,
    checkpoint::Pruned,
    executor::{
        self, ActivationCache, Caching, Loss, Outputs, PartWeights, Pass, Statistics, Store,
        Targets, ops::Ops,
    },
    family::Linear,
    mask::{Distribution, Mask},
    model::{self, Model},
    plan::{Group, Member},
};

/// A group while its stages run. One set of weights at a time is held.
pub(super) struct Grouped<'a, D: Ops> {
    pub(super) model: &'a Model<'a, D>,
    pub(super) layer: usize,
    pub(super) group: &'a Group,
    pub(super) refinement: &'a Refinement<'a>,
    /// What the part's dense linear layers give on the sparse stream.
    pub(super) known: Option<&'a ActivationCache<D>>,
    /// Of the part's dense linear layers, if they were gathered.
    pub(super) statistics: &'a [Statistics],
    /// What the groups of the part are to give, if it is known.
    pub(super) shared: Option<&'a Store<D>>,
    pub(super) streams: &'a mut Streams<D>,
    pub(super) pruned: &'a mut Pruned,
    /// What the group is to give; made when it is first needed.
    pub(super) targets: Option<Store<D>>,
    /// By how much the group as it is misses that, if it is known.
    pub(super) loss: Option<Loss>,
    /// Whether the sparse stream moves on with the result of the stage that runs.
    pub(super) advances: bool,
    /// What the first layers of the group's part gave with masks that it had, and these.
    pub(super) before: Option<(ActivationCache<D>, Masks)>,
}

/// What a changed weight costs more than one of a whole matrix.
const ENTRY: usize = 8;

/// The masks of a group's matrices, to go back to.
pub(super) type Masks = Vec<Mask>;

impl<D: Ops> Grouped<'_, D> {
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
            let found = stage.run(self, event)?;
            let after = match found.after {
                Some(after) => after,
                None if self.advances => {
                    advanced = true;
                    self.advance()?
                }
                None => self.measured()?,
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

    /// The weights of the group's parts, as `pruned` has them.
    fn weights(&self, pruned: &Pruned) -> Result<Vec<PartWeights<D>>, model::Error> {
        let parts = self.group.parts.iter();
        parts.map(|part| self.model.part(self.layer, *part, pruned)).collect()
    }

    /// The same, as they are.
    pub(super) fn sparse(&self) -> Result<Vec<PartWeights<D>>, model::Error> {
        self.weights(self.pruned)
    }

    /// The same, dense.
    pub(super) fn dense(&self) -> Result<Vec<PartWeights<D>>, model::Error> {
        self.weights(&Pruned::default())
    }

    /// Where a matrix's part is among the group's.
    pub(super) fn place(&self, member: Member) -> usize {
        self.group.parts.iter().position(|part| *part == member.part).unwrap_or(0)
    }

    pub(super) fn linear(&self, member: Member) -> &Linear {
        member.of(&self.model.decoder.layers[self.layer])
    }

    /// Says where the executor failed.
    pub(super) fn failed(&self) -> impl FnOnce(executor::Error) -> model::Error + use<D> {
        failed(self.layer, &self.group.name)
    }

    /// Makes what the group is to give, unless it is there.
    pub(super) fn aim(&mut self) -> Result<(), Error> {
        if self.shared.is_some() || self.targets.is_some() {
            return Ok(());
        }
        let executor = &self.model.executor;
        let (dense, streams) = (self.dense()?, &*self.streams);
        let outputs = |stream, cache| {
            let pass = Pass { outputs: Outputs::Kept, cache, ..Pass::new(&dense, stream) };
            Ok::<_, Error>(executor.run(pass).map_err(self.failed())?.outputs)
        };
        let known = self.known.map_or(Caching::Off, Caching::Use);
        let mut targets = outputs(&streams.sparse, known)?;
        if let Some(stream) = &streams.dense {
            let on_dense = outputs(stream, Caching::Off)?;
            let blended = targets.blend(&on_dense, self.refinement.blend, &executor.device);
            blended.map_err(self.failed())?;
        }
        self.targets = Some(targets);
        Ok(())
    }

    /// What the group is to give, once it is made.
    pub(super) fn aimed(&self) -> &Store<D> {
        let made = self.shared.or(self.targets.as_ref());
        made.unwrap_or_else(|| unreachable!("a stage aims first"))
    }

    /// By how much the group as it is misses its targets.
    pub(super) fn measured(&mut self) -> Result<Loss, Error> {
        if let Some(loss) = self.loss {
            return Ok(loss);
        }
        self.aim()?;
        let (sparse, targets) = (self.sparse()?, Targets::Outputs(self.aimed()));
        let pass = Pass { targets, ..Pass::new(&sparse, &self.streams.sparse) };
        let found = self.model.executor.run(pass).map_err(self.failed())?;
        let loss = self.finite(found.loss)?;
        self.loss = Some(loss);
        Ok(loss)
    }

    /// Whether the group as it is misses its targets by less than `before` on the samples that are
    /// held out; true where none are.
    pub(super) fn lowers_held_out(&mut self, before: Loss) -> Result<bool, Error> {
        let Some(before) = before.held_out else { return Ok(true) };
        self.aim()?;
        let (sparse, stream) = (self.sparse()?, &self.streams.sparse);
        let (runs, targets) = (Some(stream.held_out_runs()), Targets::Outputs(self.aimed()));
        let found = self.model.executor.run(Pass { runs, targets, ..Pass::new(&sparse, stream) });
        let after = found.map_err(self.failed())?.loss.held_out;
        Ok(after.is_some_and(|after| after < before))
    }

    /// A loss, if it is a finite number.
    pub(super) fn finite(&self, loss: Loss) -> Result<Loss, Error> {
        let (layer, group) = (self.layer, self.group.name.clone());
        if !loss.calibration.is_finite() {
            return Err(Error::NotFinite { layer, group, loss: loss.calibration });
        }
        Ok(loss)
    }

    /// Moves the sparse stream on; returns by how much the group misses its targets.
    fn advance(&mut self) -> Result<Loss, Error> {
        self.aim()?;
        let sparse = self.sparse()?;
        let mut before = match self.before.take() {
            Some((known, masks)) => Some((known, self.since(&masks)?)),
            None => None,
        };
        let cache = match &mut before {
            Some((cache, changes)) => Caching::Correct(cache, changes),
            None => Caching::Off,
        };
        let targets = self.shared.or(self.targets.as_ref());
        let targets = targets.map_or(Targets::None, Targets::Outputs);
        let pass =
            Pass { targets, cache, ..Pass::advancing(&sparse[..1], &mut self.streams.sparse) };
        let found = self.model.executor.run(pass);
        self.finite(found.map_err(self.failed())?.loss)
    }

    /// What the weights of the part's layers are more than with these masks.
    fn since(&self, masks: &Masks) -> Result<Vec<Option<D::Entries>>, Error> {
        let part = self.group.parts[0];
        let linears = self.model.decoder.layers[self.layer].linears(part);
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

    /// A matrix of the group always has a mask: the plan that started it is this one.
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

    /// The present values of a matrix, row-major; those of pruned weights too.
    pub(super) fn values(&self, linear: &Linear) -> Result<Vec<f32>, Error> {
        Ok(match self.pruned.values(&linear.weight)? {
            Some(changed) => changed,
            None => self.model.values(linear)?,
        })
    }

    /// What has become of the masks.
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

/// What a stage found.
pub(super) struct Ran {
    /// The error before it.
    pub(super) before: Loss,
    /// And after it, if it was measured.
    pub(super) after: Option<Loss>,
    pub(super) accepted: bool,
    /// The scores of the weights, by what became of them.
    pub(super) scores: Option<Distribution>,
}
