//! The sections of a run's page, one file each.

mod cost;
mod error;
mod experts;
mod generations;
mod quality;
mod recipe;
mod scores;
mod sparsity;
mod steps;
mod swaps;

use maud::Markup;

pub(super) use self::swaps::kind;
use super::{Report, chart};

/// A section of a page.
pub(super) struct Section {
    /// The name of its place in the page.
    pub(super) id: &'static str,
    /// Title of the section.
    pub(super) title: &'static str,
    /// Content of the section.
    pub(super) body: Markup,
}

/// The sections of a run's page, in their order.
pub(super) fn all(report: &Report) -> Result<Vec<Section>, chart::Error> {
    let examples =
        || Section { id: "examples", title: "Examples", body: generations::body(report) };
    let examples = (!report.generations.is_empty()).then(examples);
    let quality =
        Section { id: "quality", title: "What it costs the model", body: quality::body(report) };
    let steps = match report.steps.len() {
        0 => None,
        _ => Some(Section { id: "steps", title: "End to end", body: steps::body(report)? }),
    };
    let error = Section { id: "error", title: "Output error", body: error::body(report)? };
    let experts = || Section { id: "experts", title: "Experts", body: experts::body(report) };
    let experts = (!report.experts.is_empty()).then(experts);
    let others = [
        Section { id: "sparsity", title: "Sparsity", body: sparsity::body(report)? },
        Section { id: "swaps", title: "Swaps", body: swaps::body(report)? },
        Section { id: "scores", title: "Scores", body: scores::body(report)? },
        Section { id: "cost", title: "Time, memory and size", body: cost::body(report) },
        Section { id: "recipe", title: "Recipe", body: recipe::body(report) },
    ];
    let first = [quality].into_iter().chain(examples).chain(steps);
    Ok(first.chain([error]).chain(experts).chain(others).collect())
}
