//! The page that compares runs.

use maud::{Markup, html};

use super::{Comparison, Kind, Run};
use crate::report::{
    Report,
    axis::Axis,
    chart::{self, LARGE, Line, Lines, Scale, legend, points},
    page::frame,
    palette::LOOKS,
    section::Section,
    table::{bar, table, text},
};

/// The page.
pub(crate) fn page(runs: &[Run]) -> Result<String, chart::Error> {
    let comparison = Comparison::of(runs);
    let title = match runs.len() {
        1 => "One run".to_owned(),
        count => format!("{count} runs, compared"),
    };
    let head = html! { h1 { (title) } };
    let sections = [
        Section { id: "runs", title: "Runs", body: figures(&comparison) },
        Section { id: "recipe", title: "What differs in the recipes", body: settings(&comparison) },
        Section { id: "trade", title: "Perplexity and sparsity", body: trade(&comparison)? },
        Section { id: "error", title: "Output error", body: errors(runs)? },
        Section { id: "sparsity", title: "Sparsity by layer", body: sparsity(runs)? },
    ];
    Ok(frame(&title, &head, &sections, env!("CARGO_PKG_VERSION")))
}

/// A run's name with its number, by which charts call it.
fn numbered(run: usize, name: &str) -> Markup {
    html! { (run + 1) ". " (name) }
}

fn figures(comparison: &Comparison) -> Markup {
    let name = |figure: &super::Figure| match figure.kind {
        Kind::Perplexity => format!("perplexity, {}", figure.name),
        Kind::Accuracy => format!("accuracy, {}", figure.name),
        _ => figure.name.clone(),
    };
    let head: Vec<String> =
        std::iter::once("run".into()).chain(comparison.figures.iter().map(name)).collect();
    let most = |figure: &super::Figure| {
        let values = figure.values.iter().chain([&figure.dense]).flatten().copied();
        values.filter(|value| value.is_finite()).fold(0.0, f64::max)
    };
    let cell = |figure: &super::Figure, value: Option<f64>, best: bool| match value {
        None => text("–"),
        Some(value) => {
            let shown = figure.kind.show(value);
            let shown = if best { format!("best: {shown}") } else { shown };
            html! { span.best[best] { (bar(&shown, value / most(figure))) } }
        }
    };
    let mut rows: Vec<Vec<Markup>> = Vec::new();
    if comparison.figures.iter().any(|figure| figure.dense.is_some()) {
        let cells = comparison.figures.iter().map(|figure| cell(figure, figure.dense, false));
        rows.push(std::iter::once(text("dense")).chain(cells).collect());
    }
    for (run, name) in comparison.runs.iter().enumerate() {
        let cells = comparison.figures.iter();
        let cells =
            cells.map(|figure| cell(figure, figure.values[run], figure.best() == Some(run)));
        rows.push(std::iter::once(numbered(run, name)).chain(cells).collect());
    }
    html! {
        (table("What came of each run", &head, rows))
        p.note {
            "Perplexity: the lower the better; accuracy: the higher the better. The output error is "
            "what the refinement made of it."
        }
    }
}

fn settings(comparison: &Comparison) -> Markup {
    if comparison.settings.is_empty() {
        return html! { p.empty { "Nothing but where the outputs are." } };
    }
    let head: Vec<String> = std::iter::once("key".into())
        .chain(comparison.runs.iter().enumerate().map(|(i, run)| format!("{}. {run}", i + 1)))
        .collect();
    let rows = comparison.settings.iter().map(|of| {
        let values = of.values.iter().map(|value| match value {
            Some(value) => html! { code { (value) } },
            None => text("–"),
        });
        std::iter::once(html! { code { (of.key) } }).chain(values).collect()
    });
    table("Keys whose values are not the same in all runs", &head, rows)
}

/// Perplexity against sparsity, for each text.
fn trade(comparison: &Comparison) -> Result<Markup, chart::Error> {
    let Some(pruned) = comparison.figures.iter().find(|figure| figure.kind == Kind::Sparsity)
    else {
        return Ok(html! {});
    };
    let of_texts = comparison.figures.iter().filter(|figure| figure.kind == Kind::Perplexity);
    let mut charts = Vec::new();
    for figure in of_texts {
        let places = pruned.values.iter().zip(&figure.values);
        let places: Vec<_> =
            places.map(|(x, y)| (x.unwrap_or_default(), y.unwrap_or(f64::NAN))).collect();
        let least = places.iter().map(|(x, _)| *x).fold(1.0, f64::min);
        let most = places.iter().map(|(x, _)| *x).fold(0.0, f64::max);
        let label = |share: f64| format!("{}%", (1e3 * share).round() / 10.0);
        let x = Axis::linear((least - 0.05).max(0.0), (most + 0.05).min(1.0), label);
        let title =
            format!("Perplexity on {} by the share of weights that are pruned", figure.name);
        let scale = Scale::Logarithmic;
        charts.push((figure.name.as_str(), points(&title, "pruned", (x, scale), &places)?));
    }
    if charts.is_empty() {
        return Ok(html! { p.empty { "No perplexity was measured." } });
    }
    Ok(html! {
        p { "Each point is a run, by its number in the table above." }
        div.columns {
            @for (name, picture) in charts {
                figure { figcaption { "perplexity on " (name) " (logarithmic)" } (picture) }
            }
        }
    })
}

fn errors(runs: &[Run]) -> Result<Markup, chart::Error> {
    by_group(runs, "output error after the refinement", Scale::Logarithmic, |report, group| {
        let of = report.groups.iter().filter(|of| of.group == group);
        of.filter_map(|of| Some((of.layer as f64, of.errors()?[1].calibration))).collect()
    })
}

fn sparsity(runs: &[Run]) -> Result<Markup, chart::Error> {
    by_group(runs, "share that is pruned", Scale::Percent, |report, group| {
        let of = |layer| {
            let (weights, kept) = report.of(layer, group).fold((0.0, 0.0), |(all, kept), of| {
                (all + of.weights() as f64, kept + of.kept as f64)
            });
            (layer as f64, 1.0 - kept / weights)
        };
        report.layers().into_iter().map(of).filter(|(_, share)| share.is_finite()).collect()
    })
}

/// A chart for each group, by layer, with a line for each of as many runs as there are looks.
fn by_group(
    runs: &[Run],
    what: &str,
    scale: Scale,
    points: impl Fn(&Report, &str) -> Vec<(f64, f64)>,
) -> Result<Markup, chart::Error> {
    let shown = &runs[..runs.len().min(LOOKS.len())];
    let groups = super::distinct(shown.iter().flat_map(|run| {
        run.report.group_names().into_iter().map(str::to_owned).collect::<Vec<_>>()
    }));
    let last = shown.iter().map(|run| run.report.last_layer()).max().unwrap_or(0);
    let mut charts = Vec::new();
    for group in &groups {
        let line = |run: &Run| Line { name: run.name.clone(), points: points(&run.report, group) };
        let lines: Vec<_> = shown.iter().map(line).collect();
        if lines.iter().all(|line| line.points.is_empty()) {
            continue;
        }
        let (title, x) = (format!("{group}: {what}, by layer and run"), Axis::numbers(last));
        let chart = Lines { title, across: "layer", x, scale, lines, size: LARGE };
        charts.push((group, chart.draw()?));
    }
    if charts.is_empty() {
        return Ok(html! { p.empty { "No run has any." } });
    }
    let names: Vec<_> =
        shown.iter().enumerate().map(|(i, run)| format!("{}. {}", i + 1, run.name)).collect();
    Ok(html! {
        @if shown.len() < runs.len() {
            p.note { "The first " (shown.len()) " runs." }
        }
        (legend(&names)?)
        div.columns {
            @for (group, picture) in charts {
                figure { figcaption { (group) ", " (what) " by layer" } (picture) }
            }
        }
    })
}
