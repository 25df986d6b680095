//! How far a run has come: what it knows, and where it goes on.

use std::{collections::BTreeMap, path::Path, time::Instant};

use serde::{Deserialize, Serialize};

use super::{
    Error, Found,
    checkpointing::{Checkpointing, Phase, Place, Saved},
    phases::Phases,
};
use crate::{
    checkpoint::Pruned,
    executor::{
        Stream,
        ops::{Ops, Products},
    },
    model::Model,
    plan::Plan,
    progress::Bar,
    prune::{self, Event, GroupReport, MatrixReport, Observer, Pass, Sampled, Step},
};

/// What a run has found out so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Notes {
    /// What was measured of the dense model.
    pub(crate) dense: Option<Found>,
    /// Of the initial masks.
    pub(crate) initial: Option<Found>,
    /// Of the refined ones, if there is a refinement.
    pub(crate) refined: Option<Found>,
    /// The fraction of each layer that is pruned, where it is not the same of all.
    pub(crate) allocation: Vec<f64>,
    /// How many weights of a tensor are pruned, where the allocation says so.
    pub(crate) counts: BTreeMap<String, usize>,
    /// The groups that are refined.
    pub(crate) groups: Vec<GroupReport>,
    /// The steps of the stages that work on the whole model.
    #[serde(default)]
    pub(crate) steps: Vec<Step>,
    /// What each phase took.
    pub(crate) phases: Phases,
    /// The matrix products that the masks took.
    pub(crate) products: Products,
}

impl Notes {
    /// The same, once a phase that makes masks has gone on since then.
    fn after(&self, phase: Phase, since: Since) -> Self {
        let mut notes = self.clone();
        let seconds = notes.phases.seconds.entry(phase.to_string()).or_default();
        *seconds += since.instant.elapsed().as_secs_f64();
        notes.products += Products::so_far() - since.products;
        notes
    }
}

/// When a phase was begun, or gone on with.
#[derive(Clone, Copy)]
struct Since {
    instant: Instant,
    products: Products,
}

impl Since {
    fn now() -> Self {
        Self { instant: Instant::now(), products: Products::so_far() }
    }
}

/// How far a run has come.
pub(crate) struct Progress<D: Ops> {
    /// Saves it to disk, if it is saved at all.
    checkpointing: Option<Checkpointing>,
    place: Place,
    /// The pass that it is in. What it has decided so far is what the run has.
    pub(super) pass: Pass<D>,
    /// What it has found out.
    pub(crate) notes: Notes,
}

impl<D: Ops> Progress<D> {
    /// The beginning of a run.
    pub(crate) fn new(checkpointing: Option<Checkpointing>) -> Self {
        let place = Place { phase: Phase::InitialMasks, layers: 0 };
        Self { checkpointing, place, pass: Pass::from(Pruned::default()), notes: Notes::default() }
    }

    /// A run that goes on from its saved state, or begins where there is none.
    pub(crate) fn resumed(
        checkpointing: Checkpointing,
        model: &Model<'_, D>,
        samples: Sampled<'_>,
        scratch: &Path,
    ) -> Result<Self, Error> {
        let saved = checkpointing.saved(model, samples, scratch)?;
        let new = Self::new(Some(checkpointing));
        Ok(match saved {
            Some(Saved { place, pass, notes }) => Self { place, pass, notes, ..new },
            None => new,
        })
    }

    /// Whether nothing is done yet.
    pub(super) fn is_new(&self) -> bool {
        let nothing = self.notes.dense.is_none() && self.pass.layer == 0;
        nothing && self.place.phase == Phase::InitialMasks
    }

    /// Whether all that comes before the refinement is done, and nothing of it.
    pub(super) fn is_begun(&self) -> bool {
        let nothing = self.notes.refined.is_none() && self.pass.layer == 0;
        nothing && self.place.phase == Phase::Refinement && self.notes.groups.is_empty()
    }

    /// Takes what another run has begun with.
    pub(super) fn take(&mut self, notes: Notes, pruned: Pruned) {
        self.notes = notes;
        self.pass = Pass::from(pruned);
        self.enter(Phase::Refinement);
    }

    /// The pass that the run is in.
    pub(super) fn phase(&self) -> Phase {
        self.place.phase
    }

    /// Goes through the layers, or those that are left, with `run`; its products and seconds count,
    /// and its state is kept. What the last pass of the run ends with is kept in any case.
    pub(super) fn go(
        &mut self,
        (model, plan): (&Model<'_, D>, &Plan),
        bar: &dyn Bar,
        ends: bool,
        run: impl FnOnce(Pass<D>, &mut dyn Observer<D>) -> Result<Pruned, prune::Error>,
    ) -> Result<(), Error> {
        let Self { checkpointing, place, pass, notes } = self;
        let from = std::mem::replace(pass, Pass::from(Pruned::default()));
        let since = Since::now();
        let (of, phase) = ((model, plan), place.phase);
        let mut phases = notes.phases.clone();
        let mut passing = Passing { of, checkpointing, phase, ends, notes, bar, since };
        let pruned = phases.run(&phase.to_string(), || run(from, &mut passing));
        notes.phases = phases;
        notes.products += Products::so_far() - since.products;
        place.layers = plan.layers.len();
        *pass = Pass { layer: place.layers, pruned: pruned?, streams: Vec::new() };
        Ok(())
    }

    /// Begins a pass, with what those before it have decided.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.place = Place { phase, layers: 0 };
        self.pass.layer = 0;
    }

    /// Keeps what was found out between two passes, if it is time.
    pub(super) fn keep(&mut self, of: (&Model<'_, D>, &Plan)) -> Result<(), Error> {
        let Self { checkpointing, place, pass, notes } = self;
        // In the middle of a pass, what it goes on with is kept already.
        if let Some(checkpointing) = checkpointing.as_mut().filter(|_| pass.streams.is_empty()) {
            checkpointing.reached(of, *place, (&pass.pruned, &[]), false, || &*notes)?;
        }
        Ok(())
    }
}

/// A pass as it goes on.
struct Passing<'a, D: Ops> {
    of: (&'a Model<'a, D>, &'a Plan),
    checkpointing: &'a mut Option<Checkpointing>,
    phase: Phase,
    ends: bool,
    notes: &'a mut Notes,
    bar: &'a dyn Bar,
    since: Since,
}

impl<D: Ops> Observer<D> for Passing<'_, D> {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Group(report) => {
                for stage in &report.stages {
                    tracing::info!(
                        layer = report.layer,
                        group = report.group,
                        stage = stage.stage,
                        before = stage.before.calibration,
                        after = stage.after.calibration,
                        held_out_before = stage.before.held_out,
                        held_out_after = stage.after.held_out,
                        accepted = stage.accepted,
                        "refined"
                    );
                    for MatrixReport { tensor, came_back, kept, .. } in &stage.matrices {
                        tracing::debug!(stage = stage.stage, came_back, kept, "{tensor}");
                    }
                }
                self.notes.groups.push(report.clone());
            }
            Event::Layer(_) => self.bar.advance(1),
            Event::Measured(..) => {}
            Event::Step(step) => {
                tracing::info!(
                    step = step.step,
                    calibration = step.calibration,
                    held_out = step.held_out,
                    swaps = step.swaps,
                    lambda = step.lambda,
                    "end to end"
                );
                self.notes.steps.push(*step);
                self.bar.advance(1);
            }
        }
    }

    fn state(
        &mut self,
        layers: usize,
        pruned: &Pruned,
        streams: &[&Stream<D>],
    ) -> Result<(), prune::Error> {
        let Self { of, checkpointing, phase, ends, notes, since, .. } = self;
        let Some(checkpointing) = checkpointing else { return Ok(()) };
        let ends = *ends && layers == of.1.layers.len();
        let place = Place { phase: *phase, layers };
        checkpointing.reached(*of, place, (pruned, streams), ends, || notes.after(*phase, *since))
    }
}
