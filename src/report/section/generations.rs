//! Continuations by the dense and by the pruned model.

use maud::{Markup, html};

use crate::report::{Report, table::table};

pub(super) fn body(report: &Report) -> Markup {
    let stages: Vec<Vec<(&str, &String)>> =
        report.generations.iter().map(|of| of.found.named().collect()).collect();
    let names: Vec<&str> = stages.first().into_iter().flatten().map(|(name, _)| *name).collect();
    let head: Vec<&str> = ["prompt"].into_iter().chain(names).collect();
    let rows = report.generations.iter().zip(&stages).map(|(of, stages)| {
        let cells = stages.iter().map(|(_, text)| html! { span.said { (text) } });
        [html! { span.said { (of.prompt) " …" } }].into_iter().chain(cells).collect()
    });
    html! {
        p {
            "The same prompts, continued by each model with the most likely token, again and again. A few "
            "examples show what a perplexity means; they do not measure anything."
        }
        (table("Continuations", &head, rows))
    }
}
