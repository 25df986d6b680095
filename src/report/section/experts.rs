//! Number of calibration tokens that each expert saw.

use maud::{Markup, html};

use crate::{
    executor::FEWEST_ROWS,
    prune::ExpertReport,
    report::{
        Report,
        figure::count,
        table::{details, table, text},
    },
};

pub(super) fn body(report: &Report) -> Markup {
    let few: usize = report.experts.iter().map(|layer| few(layer).count()).sum();
    html! {
        p {
            "The statistics of an expert are of the calibration tokens that the router sent to it. "
            @if few == 0 {
                "Each expert saw at least " (FEWEST_ROWS) " of them."
            } @else {
                b { (count(few as u64)) } " experts saw fewer than " (FEWEST_ROWS) " of them: these "
                "were pruned by the mean statistics of their layer's experts. More calibration "
                "samples would help."
            }
        }
        (by_layer(report))
        (details("Tokens of each expert, as a table", &by_expert(report)))
    }
}

/// The experts with too few tokens for statistics of their own, and their numbers of tokens.
fn few(layer: &ExpertReport) -> impl Iterator<Item = (usize, usize)> {
    let tokens = layer.tokens.iter().copied().enumerate();
    tokens.filter(|(_, tokens)| *tokens < FEWEST_ROWS)
}

fn by_layer(report: &Report) -> Markup {
    let rows = report.experts.iter().map(|layer| {
        let mut tokens = layer.tokens.clone();
        tokens.sort_unstable();
        let at = |index: usize| count(tokens.get(index).copied().unwrap_or(0) as u64);
        let numbers: Vec<String> = few(layer).map(|(expert, _)| expert.to_string()).collect();
        let last = tokens.len().saturating_sub(1);
        [layer.layer.to_string(), at(0), at(last / 2), at(last), numbers.join(", ")]
            .map(text)
            .into()
    });
    let head = ["layer", "fewest", "median", "most", "experts with too few"];
    table("Calibration tokens of an expert, by layer", &head, rows)
}

fn by_expert(report: &Report) -> Markup {
    let rows = report.experts.iter().flat_map(|layer| {
        let name = &layer.experts;
        let all = layer.tokens.iter().enumerate();
        all.map(move |(i, tokens)| [format!("{name}.{i}"), count(*tokens as u64)].map(text).into())
    });
    table("Calibration tokens of each expert", &["expert", "tokens"], rows)
}
