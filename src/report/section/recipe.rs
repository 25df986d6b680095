//! The recipe with the source of each value, and what the run read.

use maud::{Markup, html};

use crate::report::{
    Report,
    table::{details, table, text},
};

pub(super) fn body(report: &Report) -> Markup {
    let (default, said): (Vec<_>, Vec<_>) =
        report.recipe.iter().partition(|setting| setting.source == "default");
    let rows = |settings: Vec<&crate::recipe::Setting>| {
        settings
            .into_iter()
            .map(|of| {
                vec![html! { code { (of.key) } }, html! { code { (of.value) } }, text(&of.source)]
            })
            .collect::<Vec<_>>()
    };
    let head = ["key", "value", "source"];
    let inputs = report.inputs.iter().map(|(path, digest)| {
        vec![html! { code { (path.display()) } }, html! { code.digest { (digest) } }]
    });
    html! {
        (table("What the recipe says", &head, rows(said)))
        (details("Values that are left at their defaults", &table("Defaults", &head, rows(default))))
        (details(
            "What the run read, by its SHA-256",
            &table("What the run read", &["file", "SHA-256"], inputs),
        ))
    }
}
