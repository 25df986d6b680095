//! Perplexity and tasks, of the dense model and of the pruned one on its way.

use maud::{Markup, html};

use crate::{
    evaluate::Accuracy,
    report::{
        Report,
        figure::{count, number, percent, times},
        names,
        table::{bar, table, text},
    },
};

pub(super) fn body(report: &Report) -> Markup {
    let texts: Vec<String> = report.perplexity.iter().map(|text| text.text.clone()).collect();
    let names = names::short(&texts, '/');
    html! {
        @if report.perplexity.is_empty() && report.tasks.is_empty() {
            p.empty { "Nothing was measured: the recipe names no text and no task under [evaluate]." }
        }
        @if !names.is_empty() {
            p {
                "Perplexity says how well a model predicts a text: 1 is perfect, and a model that "
                "hesitates between " i { "k" } " equally likely words has perplexity " i { "k" } "."
            }
        }
        div.columns {
            @for (of, name) in report.perplexity.iter().zip(&names) {
                (perplexity(of, name))
            }
        }
        @if !report.tasks.is_empty() { (tasks(report)) }
    }
}

fn perplexity(of: &crate::report::TextReport, name: &str) -> Markup {
    let dense = of.found.dense.perplexity;
    let largest = of.found.named().map(|(_, found)| found.perplexity);
    let largest = largest.filter(|value| value.is_finite()).fold(0.0, f64::max);
    let rows = of.found.named().map(|(stage, found)| {
        vec![
            text(stage),
            bar(&number(found.perplexity), found.perplexity / largest),
            text(times(found.perplexity / dense)),
        ]
    });
    let caption = format!("Perplexity on {name} (lower is better)");
    html! {
        div {
            (table(&caption, &["model", "perplexity", "× dense"], rows))
            p.note {
                (count(of.found.dense.predictions as u64)) " predictions in "
                (count(of.found.dense.segments as u64)) " segments of " (of.text)
            }
        }
    }
}

fn tasks(report: &Report) -> Markup {
    let head = ["task", "dense", "initial mask", "refined", "questions"];
    let cell = |found: Option<&Accuracy>| match found {
        None => text("–"),
        Some(found) => html! {
            (accuracy(found.acc, found.acc_stderr)) br;
            span.note { "norm " (accuracy(found.acc_norm, found.acc_norm_stderr)) }
        },
    };
    let rows = report.tasks.iter().map(|of| {
        vec![
            text(&of.task),
            cell(Some(&of.found.dense)),
            cell(of.found.initial.as_ref()),
            cell(of.found.refined.as_ref()),
            text(count(of.found.dense.questions as u64)),
        ]
    });
    html! {
        (table("Accuracy (higher is better), ± its standard error", &head, rows))
        p.note { "norm: each answer's likelihood is divided by the answer's length." }
    }
}

fn accuracy(share: f64, error: f64) -> String {
    format!("{} ± {:.2}", percent(share), 100.0 * error)
}
