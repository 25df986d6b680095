//! Perplexity and task accuracy, from the dense to the written model.

use maud::{Markup, html};

use crate::{
    evaluate::Accuracy,
    report::{
        Report, TaskReport,
        figure::{count, percent, times, uncertain},
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
        @if report.refined_in_one_pass() {
            p.note {
                "The masks were made and refined in one pass, layer by layer, so that no model had the "
                "initial masks alone. To measure one, set mask.passes = 2."
            }
        }
    }
}

fn perplexity(of: &crate::report::TextReport, name: &str) -> Markup {
    let dense = of.found.dense.perplexity;
    let largest = of.found.named().map(|(_, found)| found.perplexity);
    let largest = largest.filter(|value| value.is_finite()).fold(0.0, f64::max);
    let rows = of.found.named().map(|(stage, found)| {
        vec![
            text(stage),
            bar(&uncertain(found.perplexity, found.perplexity_stderr), found.perplexity / largest),
            text(times(found.perplexity / dense)),
        ]
    });
    let caption = format!("Perplexity on {name} (lower is better), ± its standard error");
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
    let stages = [("dense", 0), ("initial mask", 1), ("refined", 2)];
    let stage =
        |of: &TaskReport, i: usize| [Some(of.found.dense), of.found.initial, of.found.refined][i];
    let measured = |i: usize| report.tasks.iter().any(|of| stage(of, i).is_some());
    let stages: Vec<_> = stages.into_iter().filter(|(_, i)| measured(*i)).collect();
    let names = stages.iter().map(|(name, _)| *name);
    let head: Vec<&str> = ["task"].into_iter().chain(names).chain(["questions"]).collect();
    let cell = |found: Option<Accuracy>| match found {
        None => text("–"),
        Some(found) => html! {
            (accuracy(found.acc, found.acc_stderr))
            @if let Some((acc, error)) = found.acc_norm.zip(found.acc_norm_stderr) {
                br;
                span.note { "norm " (accuracy(acc, error)) }
            }
        },
    };
    let rows = report.tasks.iter().map(|of| {
        let cells = stages.iter().map(|(_, i)| cell(stage(of, *i)));
        let questions = text(count(of.found.dense.questions as u64));
        [text(&of.task)].into_iter().chain(cells).chain([questions]).collect()
    });
    let normed = report.tasks.iter().any(|of| of.found.dense.acc_norm.is_some());
    html! {
        (table("Accuracy (higher is better), ± its standard error", &head, rows))
        @if normed {
            p.note { "norm: each answer's likelihood is divided by the answer's length." }
        }
    }
}

fn accuracy(fraction: f64, error: f64) -> String {
    format!("{} ± {:.2}", percent(fraction), 100.0 * error)
}
