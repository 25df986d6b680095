//! Bounds of a report that Barber reads: sums must not overflow, and a page must be able to show
//! all.

use std::collections::BTreeSet;

use super::{Report, section};
use crate::mask::Histogram;

/// Maximum number of decoder layers. Large models have about 130.
const LAYERS: usize = 1024;
/// Maximum number of matrices, and of groups. A large mixture of experts has about 80,000.
const MATRICES: usize = 1 << 17;
/// Maximum number of experts of a layer.
const EXPERTS: usize = 1 << 12;
/// Maximum number of distinct group names, and of kinds of matrices.
const NAMES: usize = 128;
/// Maximum number of texts.
const TEXTS: usize = 1 << 12;
/// Maximum number of stages of a group, of tasks, and of phases.
const FEW: usize = 256;
/// Maximum length of a name in bytes.
const NAME: usize = 1024;
/// Maximum number of weights of a matrix, and of scores in a bin.
const WEIGHTS: usize = 1 << 40;

/// Checks that a report is within the bounds.
///
/// # Errors
/// If a bound is exceeded; the error names what exceeds it.
pub(super) fn check(report: &Report) -> Result<(), String> {
    let most = |what: &str, found: usize, most: usize| match found <= most {
        true => Ok(()),
        false => Err(format!("{found} {what}; a report has at most {most}")),
    };
    most("matrices", report.matrices.len(), MATRICES)?;
    most("groups", report.groups.len(), MATRICES)?;
    most("texts", report.perplexity.len(), TEXTS)?;
    most("tasks", report.tasks.len(), FEW)?;
    most("phases", report.seconds.len().max(report.memory.len()), FEW)?;
    most("weights", report.prunable_weights.max(report.pruned_weights), WEIGHTS << 17)?;
    most("layers with experts", report.experts.len(), LAYERS)?;
    for layer in &report.experts {
        most("as the number of a layer", layer.layer, LAYERS - 1)?;
        most("bytes of a name", layer.experts.len(), NAME)?;
        most("experts of a layer", layer.tokens.len(), EXPERTS)?;
    }
    most("kinds of structures", report.structures.len(), FEW)?;
    for structures in &report.structures {
        most("layers with fewer structures", structures.removed.len(), LAYERS)?;
        most("structures of a layer", structures.of.max(structures.lost), WEIGHTS)?;
    }
    let mut names = BTreeSet::new();
    let mut kinds = BTreeSet::new();
    for matrix in &report.matrices {
        most("as the number of a layer", matrix.layer, LAYERS - 1)?;
        most("bytes of a name", matrix.tensor.len().max(matrix.group.len()), NAME)?;
        most("weights of a matrix", matrix.weights(), WEIGHTS)?;
        most("kept weights of a matrix", matrix.kept.max(matrix.initial), matrix.weights())?;
        names.insert(&matrix.group);
    }
    let mut matrices = 0;
    for group in &report.groups {
        most("as the number of a layer", group.layer, LAYERS - 1)?;
        most("bytes of a name", group.group.len(), NAME)?;
        most("stages of a group", group.stages.len(), FEW)?;
        names.insert(&group.group);
        for stage in &group.stages {
            matrices += stage.matrices.len();
            for matrix in &stage.matrices {
                most("bytes of a name", matrix.tensor.len(), NAME)?;
                most("weights of a matrix", matrix.weights.max(matrix.came_back), WEIGHTS)?;
                let kept = matrix.kept.max(matrix.kept_before);
                most("kept weights of a matrix", kept, matrix.weights)?;
                kinds.insert(section::kind(&matrix.tensor, group.layer));
            }
            let scores = stage.scores.iter();
            let mut scores = scores.flat_map(|of| [&of.kept, &of.came_back, &of.went, &of.pruned]);
            scores.try_for_each(histogram)?;
        }
    }
    most("matrices of stages", matrices, MATRICES * 16)?;
    most("names of groups", names.len(), NAMES)?;
    most("kinds of matrices", kinds.len(), NAMES)
}

/// Checks that a histogram can be one of f32 scores.
fn histogram(scores: &Histogram) -> Result<(), String> {
    let bins = (-512..=512).contains(&scores.first) && scores.counts.len() <= 1024;
    let counts = scores.counts.iter().chain([&scores.zero]).all(|count| *count <= WEIGHTS as u64);
    match bins && counts {
        true => Ok(()),
        false => Err("a distribution of scores that no numbers in f32 have".into()),
    }
}
