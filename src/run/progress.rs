//! The progress of a run: its place, and its results so far.

use std::{collections::BTreeMap, path::Path, time::Instant};

use serde::{Deserialize, Serialize};

use super::{
    Error, Found,
    checkpointing::{Checkpointing, InStage, Phase, Place, Saved},
    phases::Phases,
    together::agreed,
};
use crate::{
    checkpoint::Pruned,
    executor::{
        Stream,
        ops::{Ops, Products},
    },
    journal::Entries,
    model::Model,
    permutation::PermutedPart,
    plan::Plan,
    progress::Bar,
    prune::{
        self, Event, ExpertReport, GroupReport, MatrixReport, Observer, Pass, Sampled, StageState,
        Step,
    },
};

/// The results of a run so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Notes {
    /// Measurements of the dense model.
    pub(crate) dense: Option<Found>,
    /// Measurements with the initial masks.
    pub(crate) initial: Option<Found>,
    /// Measurements with the refined masks.
    pub(crate) refined: Option<Found>,
    /// What was done to the inner channels of each part; `None` before, or if they are not permuted.
    #[serde(default)]
    pub(crate) permuted: Option<Vec<PermutedPart>>,
    /// The sparsity ratio of each layer; empty for a uniform ratio.
    pub(crate) allocation: Vec<f64>,
    /// Number of weights to prune in each tensor, where the allocation sets it.
    pub(crate) counts: BTreeMap<String, usize>,
    /// The reports of the refined groups.
    pub(crate) groups: Vec<GroupReport>,
    /// The calibration tokens that the experts of each layer saw.
    #[serde(default)]
    pub(crate) experts: Vec<ExpertReport>,
    /// The steps of the stages that work on the whole model.
    #[serde(default)]
    pub(crate) steps: Vec<Step>,
    /// Time and memory of each phase.
    pub(crate) phases: Phases,
    /// Operations and seconds of the matrix products for the masks.
    pub(crate) products: Products,
}

impl Notes {
    /// The notes with the time and products of a phase that makes masks, from `since` until now.
    fn after(&self, phase: Phase, since: Since) -> Self {
        let mut notes = self.clone();
        let seconds = notes.phases.seconds.entry(phase.to_string()).or_default();
        *seconds += since.instant.elapsed().as_secs_f64();
        notes.products += Products::so_far() - since.products;
        notes
    }
}

/// The moment at which a phase began or was resumed.
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

/// The progress of a run.
pub(crate) struct Progress<D: Ops> {
    /// Saves the progress; `None` if it is not saved.
    checkpointing: Option<Checkpointing>,
    place: Place,
    /// The state of the current pass, with the masks and changed weights so far.
    pub(super) pass: Pass<D>,
    /// The stage within which the run was saved, and its state.
    stage: Option<(usize, Entries)>,
    /// The results so far.
    pub(crate) notes: Notes,
}

impl<D: Ops> Progress<D> {
    /// The progress of a run that begins.
    pub(crate) fn new(checkpointing: Option<Checkpointing>) -> Self {
        let place = Place { phase: Phase::InitialMasks, layers: 0 };
        let pass = Pass::from(Pruned::default());
        Self { checkpointing, place, pass, stage: None, notes: Notes::default() }
    }

    /// The saved progress, or that of a run that begins.
    pub(crate) fn resumed(
        checkpointing: Checkpointing,
        model: &Model<'_, D>,
        samples: Sampled<'_>,
        scratch: &Path,
    ) -> Result<Self, Error> {
        let saved = checkpointing.saved(model, samples, scratch)?;
        let new = Self::new(Some(checkpointing));
        Ok(match saved {
            Some(Saved { place, pass, stage, notes }) => Self { place, pass, stage, notes, ..new },
            None => new,
        })
    }

    /// Whether nothing is done yet.
    pub(super) fn is_new(&self) -> bool {
        let nothing = self.notes.dense.is_none() && self.pass.layer == 0;
        nothing && self.place.phase == Phase::InitialMasks
    }

    /// Whether the run is between initial masks and refinement.
    pub(super) fn is_begun(&self) -> bool {
        let nothing = self.notes.refined.is_none() && self.pass.layer == 0;
        nothing && self.place.phase == Phase::Refinement && self.notes.groups.is_empty()
    }

    /// Takes over the notes and initial masks of another run.
    pub(super) fn take(&mut self, notes: Notes, pruned: Pruned) {
        self.notes = notes;
        self.pass = Pass::from(pruned);
        self.enter(Phase::Refinement);
    }

    /// The current pass.
    pub(super) fn phase(&self) -> Phase {
        self.place.phase
    }

    /// Takes the pass through the remaining layers with `run`, counts its products and seconds, and
    /// saves its state when it is time. The end of the last pass is always saved.
    pub(super) fn go(
        &mut self,
        (model, plan): (&Model<'_, D>, &Plan),
        bar: &dyn Bar,
        ends: bool,
        run: impl FnOnce(Pass<D>, &mut dyn Observer<D>) -> Result<Pruned, prune::Error>,
    ) -> Result<(), Error> {
        let Self { checkpointing, place, pass, notes, .. } = self;
        let from = std::mem::replace(pass, Pass::from(Pruned::default()));
        let since = Since::now();
        let (of, phase) = ((model, plan), place.phase);
        let mut phases = notes.phases.clone();
        let mut passing = Passing { of, checkpointing, phase, ends, notes, bar, since };
        let pruned = phases.run(&phase.to_string(), || run(from, &mut passing));
        let since = passing.since;
        notes.phases = phases;
        notes.products += Products::so_far() - since.products;
        place.layers = plan.layers.len();
        *pass = Pass { layer: place.layers, pruned: pruned?, streams: Vec::new() };
        Ok(())
    }

    /// The stage within which the run was saved, and its state.
    pub(super) fn take_stage(&mut self) -> Option<(usize, Entries)> {
        self.stage.take()
    }

    /// Has the next save cover all layers of the plan, whose masks changed together.
    pub(super) fn changed(&mut self, plan: &Plan) {
        if let Some(checkpointing) = &mut self.checkpointing {
            checkpointing.changed(plan);
        }
    }

    /// Begins a pass, with the masks and changed weights so far.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.place = Place { phase, layers: 0 };
        self.pass.layer = 0;
    }

    /// Saves the notes between two passes, if it is time.
    pub(super) fn keep(&mut self, of: (&Model<'_, D>, &Plan)) -> Result<(), Error> {
        let Self { checkpointing, place, pass, notes, .. } = self;
        // In the middle of a pass, the state was saved after the last layer.
        if let Some(checkpointing) = checkpointing.as_mut().filter(|_| pass.streams.is_empty()) {
            checkpointing.reached(of, *place, (&pass.pruned, &[]), false, || &*notes)?;
        }
        Ok(())
    }
}

/// An observer that saves a pass.
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
            // They are in the notes already.
            Event::Repeated(products) => self.since.products += products,
            // Statistics may be computed several times; the first are those of the initial masks.
            Event::Experts(found) => {
                if self.notes.experts.iter().all(|known| known.layer != found.layer) {
                    if let Some(few) = found.few() {
                        tracing::warn!("{few}");
                    }
                    self.notes.experts.push(found.clone());
                }
            }
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
                // Step 0 is the state before the first.
                self.bar.advance(u64::from(step.step > 0));
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
        let (model, plan) = *of;
        agreed(&model.executor.ranks, &format!("layer {}", layers - 1), |add| {
            for (_, linear) in plan.matrices(&model.decoder, layers - 1) {
                if let Some(mask) = pruned.masks.get(&linear.weight) {
                    add(&mask.to_bytes());
                }
            }
        })?;
        let Some(checkpointing) = checkpointing else { return Ok(()) };
        let ends = *ends && layers == of.1.layers.len();
        let place = Place { phase: *phase, layers };
        checkpointing.reached(*of, place, (pruned, streams), ends, || notes.after(*phase, *since))
    }

    fn step(
        &mut self,
        stage: usize,
        step: usize,
        pruned: &Pruned,
        state: &dyn StageState,
    ) -> Result<(), prune::Error> {
        let Self { of, checkpointing, phase, notes, since, .. } = self;
        let Some(checkpointing) = checkpointing else { return Ok(()) };
        let place = (*phase, InStage { stage, step });
        checkpointing.stepped(*of, place, (pruned, state), || notes.after(*phase, *since))
    }
}
