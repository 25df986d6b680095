//! The recipe with the source of each value, and what the run read and wrote.

use maud::{Markup, html};

use crate::{
    report::{
        Report,
        table::{details, table, text},
    },
    version::Version,
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
    let row = |file: String, digest: &String| {
        vec![html! { code { (file) } }, html! { code.digest { (digest) } }]
    };
    let inputs = report.inputs.iter().map(|(path, digest)| row(path.display().to_string(), digest));
    let outputs = report.outputs.iter().map(|(name, digest)| row(name.clone(), digest));
    let Version { barber, commit, target, instructions } = &report.version;
    html! {
        (table("What the recipe says", &head, rows(said)))
        (details("Values that are left at their defaults", &table("Defaults", &head, rows(default))))
        (details(
            "What the run read, by its SHA-256",
            &table("What the run read", &["file", "SHA-256"], inputs),
        ))
        @if !report.outputs.is_empty() {
            (details(
                "What the run wrote, by its SHA-256",
                &table("What the run wrote", &["file", "SHA-256"], outputs),
            ))
        }
        p.note {
            "Barber " (barber)
            @if let Some(commit) = commit { ", commit " (commit) }
            @if !target.is_empty() { ", on " (target) }
            @if !instructions.is_empty() { " with " (instructions) }
            "."
        }
    }
}
