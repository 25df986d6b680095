//! The summary of a run.

use std::fmt;

use bytesize::ByteSize;

use super::{columns::labelled, gains::gains};
use crate::{
    permutation::PermutedPart,
    prune::{GroupReport, Step},
    report::{Kind, OutputError, Report, Sizes, StructureReport},
};

/// The summary of a run, as it is printed.
pub(super) struct Summary<'a>(pub(super) &'a Report);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        let Report { pruned_weights, prunable_weights, model_weights, .. } = report;
        let fraction = 100.0 * report.sparsity();
        let mut pruned = format!("{pruned_weights} of {prunable_weights} weights ({fraction:.2}%)");
        if let Some(fraction) = report.model_sparsity() {
            let fraction = 100.0 * fraction;
            pruned += &format!("; {fraction:.2}% of the whole model's {model_weights}");
        }
        writeln!(f, "{}", labelled("pruned", &pruned))?;
        if let Some(structures) = StructureReport::in_words(&report.structures) {
            writeln!(f, "{}", labelled("removed", &structures))?;
        }
        if let Some(permuted) = PermutedPart::in_words(&report.permuted) {
            writeln!(f, "{}", labelled("permuted", &permuted))?;
        }
        if let (Some(least), Some(most)) = (
            report.allocation.iter().copied().min_by(f64::total_cmp),
            report.allocation.iter().copied().max_by(f64::total_cmp),
        ) {
            let [least, most] = [least, most].map(|fraction| 100.0 * fraction);
            writeln!(f, "{}", labelled("layers", &format!("{least:.1}% to {most:.1}% pruned")))?;
        }
        if report.changed_weights > 0 {
            let kept = report.prunable_weights - report.pruned_weights;
            let changed = report.changed_weights;
            let changed = format!("{changed} of {kept} kept weights: they are not the dense ones");
            writeln!(f, "{}", labelled("changed", &changed))?;
        }
        if report.changed_biases > 0 {
            let changed =
                format!("{} values that are not the dense model's", report.changed_biases);
            writeln!(f, "{}", labelled("biases", &changed))?;
        }
        let stages = report.groups.first().map_or(0, |group| group.stages.len());
        for i in 0..stages {
            let of: Vec<_> = report.groups.iter().filter_map(|group| group.stages.get(i)).collect();
            let matrices = || of.iter().flat_map(|stage| &stage.matrices);
            let swaps: usize = matrices().map(|matrix| matrix.came_back).sum();
            let kept: usize = matrices().map(|matrix| matrix.kept).sum();
            let accepted = of.iter().filter(|stage| stage.accepted).count();
            let mut said = vec![format!("accepted in {accepted} of {} groups", of.len())];
            let taken_back: Vec<_> = report.taken_back(i).map(GroupReport::place).collect();
            if !taken_back.is_empty() {
                said.push(format!("taken back in {}", some(&taken_back)));
            }
            if swaps > 0 {
                let fraction = 100.0 * swaps as f64 / kept.max(1) as f64;
                said.push(format!("{swaps} swaps ({fraction:.2}% of the kept weights)"));
            }
            said.extend(OutputError::of_stage(&report.groups, i).as_ref().map(error));
            writeln!(f, "{}", labelled(&of[0].stage, &said.join("; ")))?;
        }
        if stages > 1
            && let Some(of) = &report.output_error
        {
            writeln!(f, "{}", labelled("together", &error(of)))?;
        }
        for steps in Step::by_stage(&report.steps).filter_map(steps) {
            writeln!(f, "{}", labelled("steps", &steps))?;
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
        if !format.is_dense() {
            size += &format!(" ({format}: {compressed_matrices} of {pruned_matrices} matrices)");
        }
        writeln!(f, "\n{}", labelled("size", &size))?;
        if let Some(readers) = format.readers().filter(|_| *compressed_matrices > 0) {
            writeln!(f, "{}", labelled("format", &readers))?;
        }
        let time = format!("{:.1} s: {}", report.total_seconds(), seconds.join(", "));
        writeln!(f, "{}", labelled("time", &time))?;
        if let Some(peak) = report.peak_memory() {
            let memory = format!("{} at most, beside the checkpoint's pages", bytes(peak));
            writeln!(f, "{}", labelled("memory", &memory))?;
        }
        f.write_str(&labelled("written", &super::show(&report.output)))
    }
}

/// The steps of a stage over the whole model in a line; `None` without such steps.
fn steps(steps: &[Step]) -> Option<String> {
    let held_out: Vec<f64> = steps.iter().filter_map(|step| step.held_out).collect();
    let (first, best) = (held_out.first()?, held_out.iter().copied().reduce(f64::min)?);
    let (made, tried) = (steps.len() - 1, steps.iter().map(|step| step.swaps).sum::<usize>());
    let made = match Step::are_swaps(steps) {
        true => {
            format!("{made} over the whole model, {} swaps of {tried} tried", Step::lasting(steps))
        }
        false => format!("{made} over the whole model, which change kept weights"),
    };
    Some(format!(
        "{made}; divergence from the dense model's predictions {first:.4} to {best:.4} nats per \
         token held out"
    ))
}

/// The change of the groups' output errors in a line.
fn error(of: &OutputError) -> String {
    let [mean, worst] = [of.mean, of.worst].map(|quotient| Kind::Factor.show(quotient));
    let mut said = format!(
        "output error {mean} (mean of the groups), at worst {worst} ({})",
        of.worst_place()
    );
    if let Some(held_out) = of.held_out {
        said += &format!(", {} held out", Kind::Factor.show(held_out));
    }
    said
}

/// The first few names, and the number of the others.
fn some(names: &[String]) -> String {
    const MOST: usize = 4;
    let shown = names[..names.len().min(MOST)].join(", ");
    match names.len().saturating_sub(MOST) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn bytes(count: u64) -> String {
    ByteSize(count).display().si().to_string()
}
