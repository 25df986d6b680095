//! The frame of every page, and the page of a run.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    Report, chart,
    figure::{bytes, change, count, duration, headline, percent, uncertain},
    palette,
    section::{self, Section},
};
use crate::evaluate::Perplexity;

/// A page: one file that needs no other.
pub(super) fn frame(title: &str, head: &Markup, sections: &[Section], barber: &str) -> String {
    // Nothing is ever loaded, and nothing runs.
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(policy);
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) (PreEscaped(palette::css())) }
            }
            body {
                a.skip href="#main" { "Skip to the figures" }
                header { (head) }
                nav aria-label="Sections" {
                    ul {
                        @for section in sections {
                            li { a href={ "#" (section.id) } { (section.title) } }
                        }
                    }
                }
                main id="main" tabindex="-1" {
                    @for Section { id, title, body } in sections {
                        section id=(id) aria-labelledby={ (id) "-title" } {
                            h2 id={ (id) "-title" } { (title) }
                            (body)
                        }
                    }
                }
                footer { p { "Made by Barber " (barber) "." } }
            }
        }
    };
    markup.into_string()
}

/// The page of a run.
pub(super) fn page(report: &Report) -> Result<String, chart::Error> {
    let output = report.output.file_name().unwrap_or_default().to_string_lossy();
    let title = match report.model_name() {
        name if name.is_empty() => "Pruning report".into(),
        name => format!("{name}, {} pruned", headline(report.sparsity())),
    };
    let head = html! {
        h1 { (title) }
        p.note { (report.model.display()) " → " (output) }
        dl.tiles {
            @for (name, value, more) in tiles(report) {
                div { dt { (name) } dd { b { (value) } @if !more.is_empty() { span { (more) } } } }
            }
        }
    };
    Ok(frame(&title, &head, &section::all(report)?, &report.version.barber))
}

/// The figures that matter most: a name, the figure, and what more there is to say.
fn tiles(report: &Report) -> Vec<(String, String, String)> {
    let mut weights = format!("of {} weights", count(report.prunable_weights));
    if let Some(fraction) = report.model_sparsity() {
        let all = count(report.model_weights);
        weights += &format!("; {} of the whole model's {all}", percent(fraction));
    }
    let mut tiles = vec![("pruned".into(), percent(report.sparsity()), weights)];
    if let Some(text) = report.perplexity.first() {
        let of = |found: &Perplexity| uncertain(found.perplexity, found.perplexity_stderr);
        let more = format!("dense {}", of(&text.found.dense));
        tiles.push(("perplexity".into(), of(text.found.last()), more));
    }
    if !report.tasks.is_empty() {
        let mean = |of: fn(&super::TaskReport) -> f64| {
            report.tasks.iter().map(of).sum::<f64>() / report.tasks.len() as f64
        };
        let more = format!("dense {}", percent(mean(|task| task.found.dense.acc)));
        tiles.push(("mean accuracy".into(), percent(mean(|task| task.found.last().acc)), more));
    }
    if let Some(error) = &report.output_error {
        let worst = change(1.0, error.worst);
        let more = format!(
            "against the initial mask, mean of the groups; {worst} in {}",
            error.worst_place()
        );
        tiles.push(("output error".into(), change(1.0, error.mean), more));
    }
    tiles.push(("time".into(), duration(report.total_seconds()), String::new()));
    if let Some(peak) = report.peak_memory() {
        tiles.push(("peak memory".into(), bytes(peak), String::new()));
    }
    if report.sizes.dense.weight_bytes > 0 {
        let more = format!("dense {}", bytes(report.sizes.dense.weight_bytes));
        tiles.push(("weights on disk".into(), bytes(report.sizes.output.weight_bytes), more));
    }
    tiles
}
