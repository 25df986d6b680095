//! What a run did, for a reader and for a machine.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::evaluate::Shown;
use crate::{
    evaluate::{Accuracy, Perplexity},
    executor::Loss,
    prune::{GroupReport, StageReport},
};

/// What a run did; `barber-report.json` in the output directory, and what `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    /// The version that ran.
    pub(super) barber: &'static str,
    /// The checkpoint that it wrote.
    pub(super) output: PathBuf,
    /// How many weights were subject to pruning.
    pub(super) prunable_weights: usize,
    /// How many of them are pruned.
    pub(super) pruned_weights: usize,
    /// How many of the kept ones are not the dense model's.
    pub(super) changed_weights: usize,
    /// The share of each layer that is pruned, where it is not the same of all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) allocation: Vec<f64>,
    /// The perplexities, text by text.
    pub(super) perplexity: Vec<TextReport>,
    /// The accuracies, task by task.
    pub(super) tasks: Vec<TaskReport>,
    /// The refined groups, in their order.
    pub(super) groups: Vec<GroupReport>,
    /// Seconds that each phase took.
    pub(super) seconds: BTreeMap<&'static str, f64>,
    /// Floating-point operations of the matrix products that the masks took, attention's included; on
    /// a GPU they are not counted.
    pub(super) operations: u64,
    /// Those that the masks need, by the linear layers' shapes.
    pub(super) least_operations: f64,
    /// SHA-256 of what the run read.
    pub(super) inputs: BTreeMap<PathBuf, String>,
}

/// The perplexities on one text.
#[derive(Debug, Serialize)]
pub(super) struct TextReport {
    /// The text.
    pub(super) text: String,
    #[serde(flatten)]
    pub(super) found: Stages<Perplexity>,
}

/// The accuracies on one task.
#[derive(Debug, Serialize)]
pub(super) struct TaskReport {
    /// The task.
    pub(super) task: &'static str,
    #[serde(flatten)]
    pub(super) found: Stages<Accuracy>,
}

/// What was measured of the model on its way.
#[derive(Debug, Serialize)]
pub(super) struct Stages<T> {
    /// Of the dense model.
    pub(super) dense: T,
    /// With the initial masks.
    pub(super) initial: Option<T>,
    /// Refined.
    pub(super) refined: Option<T>,
}

impl<T> Stages<T> {
    /// Those that there are, with their names.
    fn named(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let pruned = [("pruned, initial mask", &self.initial), ("pruned, refined", &self.refined)];
        let pruned = pruned.into_iter().filter_map(|(name, found)| Some((name, found.as_ref()?)));
        std::iter::once(("dense", &self.dense)).chain(pruned)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100.0 * self.pruned_weights as f64 / self.prunable_weights.max(1) as f64;
        writeln!(
            f,
            "pruned    {} of {} weights ({share:.2}%)",
            self.pruned_weights, self.prunable_weights
        )?;
        if let (Some(least), Some(most)) = (
            self.allocation.iter().copied().min_by(f64::total_cmp),
            self.allocation.iter().copied().max_by(f64::total_cmp),
        ) {
            let [least, most] = [least, most].map(|share| 100.0 * share);
            writeln!(f, "layers    {least:.1}% to {most:.1}% pruned")?;
        }
        if self.changed_weights > 0 {
            let kept = self.prunable_weights - self.pruned_weights;
            let changed = self.changed_weights;
            writeln!(f, "changed   {changed} of {kept} kept weights: they are not the dense ones")?;
        }
        let stages = self.groups.first().map_or(0, |group| group.stages.len());
        for i in 0..stages {
            let of: Vec<_> = self.groups.iter().filter_map(|group| group.stages.get(i)).collect();
            let matrices = || of.iter().flat_map(|stage| &stage.matrices);
            let swaps: usize = matrices().map(|matrix| matrix.came_back).sum();
            let kept: usize = matrices().map(|matrix| matrix.kept).sum();
            let change = |error: fn(&Loss) -> f64| {
                let sum = |loss: fn(&StageReport) -> &Loss| -> f64 {
                    of.iter().map(|stage| error(loss(stage))).sum()
                };
                100.0 * (sum(|stage| &stage.after) / sum(|stage| &stage.before) - 1.0)
            };
            let accepted = of.iter().filter(|stage| stage.accepted).count();
            write!(f, "{:9} {accepted} of {} groups: ", of[0].stage, of.len())?;
            if swaps > 0 {
                let share = 100.0 * swaps as f64 / kept.max(1) as f64;
                write!(f, "{swaps} swaps ({share:.2}% of the kept weights), ")?;
            }
            write!(f, "output error {:+.1}%", change(|loss| loss.calibration))?;
            if of[0].after.held_out.is_some() {
                write!(f, ", {:+.1}% held out", change(|loss| loss.held_out.unwrap_or_default()))?;
            }
            writeln!(f)?;
        }
        for report in &self.perplexity {
            writeln!(
                f,
                "\nperplexity on {} (lower is better)",
                super::show(Path::new(&report.text))
            )?;
            for (name, found) in report.found.named() {
                let factor = found.perplexity / report.found.dense.perplexity;
                writeln!(f, "  {name:22} {:10.4}   {factor:6.2} × dense", found.perplexity)?;
            }
        }
        for report in &self.tasks {
            writeln!(f, "\naccuracy on {} (higher is better)", report.task)?;
            for (name, found) in report.found.named() {
                writeln!(f, "  {name:22} {}", Shown(found))?;
            }
        }
        let seconds: Vec<String> =
            self.seconds.iter().map(|(phase, seconds)| format!("{phase} {seconds:.1} s")).collect();
        writeln!(f, "\ntime      {}", seconds.join(", "))?;
        write!(f, "written   {}", super::show(&self.output))
    }
}
