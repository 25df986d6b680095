//! What a run did, for a reader.

use std::fmt;

use bytesize::ByteSize;

use super::{columns::labelled, gains::gains};
use crate::{
    checkpoint::Format,
    executor::Loss,
    prune::StageReport,
    report::{Report, Sizes},
};

/// The summary of a run, as it is printed.
pub(super) struct Summary<'a>(pub(super) &'a Report);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        let share = 100.0 * report.sparsity();
        writeln!(
            f,
            "pruned    {} of {} weights ({share:.2}%)",
            report.pruned_weights, report.prunable_weights
        )?;
        if let (Some(least), Some(most)) = (
            report.allocation.iter().copied().min_by(f64::total_cmp),
            report.allocation.iter().copied().max_by(f64::total_cmp),
        ) {
            let [least, most] = [least, most].map(|share| 100.0 * share);
            writeln!(f, "layers    {least:.1}% to {most:.1}% pruned")?;
        }
        if report.changed_weights > 0 {
            let kept = report.prunable_weights - report.pruned_weights;
            let changed = report.changed_weights;
            writeln!(f, "changed   {changed} of {kept} kept weights: they are not the dense ones")?;
        }
        let stages = report.groups.first().map_or(0, |group| group.stages.len());
        for i in 0..stages {
            let of: Vec<_> = report.groups.iter().filter_map(|group| group.stages.get(i)).collect();
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
            let mut said = format!("{accepted} of {} groups: ", of.len());
            if swaps > 0 {
                let share = 100.0 * swaps as f64 / kept.max(1) as f64;
                said += &format!("{swaps} swaps ({share:.2}% of the kept weights), ");
            }
            said += &format!("output error {:+.1}%", change(|loss| loss.calibration));
            if of[0].after.held_out.is_some() {
                let held_out = change(|loss| loss.held_out.unwrap_or_default());
                said += &format!(", {held_out:+.1}% held out");
            }
            writeln!(f, "{}", labelled(&of[0].stage, &said))?;
        }
        if let Some(gains) = gains(report) {
            writeln!(f, "\n{gains}")?;
        }
        let seconds: Vec<String> = report
            .seconds
            .iter()
            .map(|(phase, seconds)| format!("{phase} {seconds:.1} s"))
            .collect();
        let Sizes { format, dense, output, pruned_matrices, compressed_matrices } = &report.sizes;
        let [output, dense] = [output, dense].map(|size| bytes(size.weight_bytes));
        let mut size = format!("{output} of weights; the dense model has {dense}");
        if *format != Format::Dense {
            let format = format.name();
            size += &format!(" ({format}: {compressed_matrices} of {pruned_matrices} matrices)");
        }
        writeln!(f, "\n{}", labelled("size", &size))?;
        let time = format!("{:.1} s: {}", report.total_seconds(), seconds.join(", "));
        writeln!(f, "{}", labelled("time", &time))?;
        if let Some(peak) = report.peak_memory() {
            writeln!(f, "memory    {} at most, beside the checkpoint's pages", bytes(peak))?;
        }
        write!(f, "written   {}", super::show(&report.output))
    }
}

fn bytes(count: u64) -> String {
    ByteSize(count).display().si().to_string()
}
