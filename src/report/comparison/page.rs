//! The page that compares runs.

use maud::{Markup, html};

use super::{Comparison, Figure, Kind, Run, distinct, swept::Swept};
use crate::report::{
    Report,
    axis::{Axis, short},
    chart::{self, LARGE, Line, Lines, Scale, dots, legend},
    page::frame,
    palette::LOOKS,
    section::Section,
    table::{bar, table, text},
};

/// The page.
pub(crate) fn page(runs: &[Run]) -> Result<String, chart::Error> {
    let comparison = Comparison::of(runs);
    let models = distinct(runs.iter().map(|run| run.report.model_name()));
    let models = match &models[..] {
        [one] => one.clone(),
        models => format!("{} models", models.len()),
    };
    let title = match runs.len() {
        1 => format!("{models}: one run"),
        count => format!("{models}: {count} runs, compared"),
    };
    let head = html! { h1 { (title) } };
    let sections = [
        Section { id: "runs", title: "Runs", body: figures(&comparison) },
        Section { id: "recipe", title: "What differs in the recipes", body: settings(&comparison) },
        Section { id: "perplexity", title: "Perplexity", body: perplexity(&comparison)? },
        Section { id: "error", title: "Output error", body: errors(runs)? },
        Section { id: "sparsity", title: "Sparsity by layer", body: sparsity(runs)? },
    ];
    Ok(frame(&title, &head, &sections, env!("CARGO_PKG_VERSION")))
}

/// A run's name with its number, by which charts call it.
fn numbered(run: usize, name: &str) -> Markup {
    html! { (run + 1) ".\u{a0}" (name) }
}

fn figures(comparison: &Comparison) -> Markup {
    let name = |figure: &Figure| match figure.kind {
        Kind::Perplexity => format!("perplexity, {}", figure.name),
        Kind::Accuracy => format!("accuracy, {}", figure.name),
        _ => figure.name.clone(),
    };
    let head: Vec<String> =
        std::iter::once("run".into()).chain(comparison.figures.iter().map(name)).collect();
    let most = |figure: &Figure| {
        let values = figure.values.iter().chain([&figure.dense]).flatten().copied();
        values.filter(|value| value.is_finite()).fold(0.0, f64::max)
    };
    let cell = |figure: &Figure, value: Option<(f64, String)>, best: bool| match value {
        None => text("–"),
        Some((value, shown)) => {
            let shown = if best { format!("best: {shown}") } else { shown };
            html! { span.best[best] { (bar(&shown, value / most(figure))) } }
        }
    };
    let mut rows: Vec<Vec<Markup>> = Vec::new();
    if comparison.figures.iter().any(|figure| figure.dense.is_some()) {
        let cells = comparison.figures.iter();
        let cells = cells.map(|of| cell(of, of.dense.zip(of.show_dense()), false));
        rows.push(std::iter::once(text("dense")).chain(cells).collect());
    }
    for (run, name) in comparison.runs.iter().enumerate() {
        let cells = comparison.figures.iter();
        let cells =
            cells.map(|of| cell(of, of.values[run].zip(of.show(run)), of.best == Some(run)));
        rows.push(std::iter::once(numbered(run, name)).chain(cells).collect());
    }
    html! {
        (table("What came of each run", &head, rows))
        p.note {
            "Perplexity: the lower the better; accuracy: the higher the better; ± one standard error. "
            "A run is the best if it differs from each other one by more than two standard errors of "
            "the difference. Pruned: the share of "
            "the weights that the recipe may prune, and of all of the model's, embeddings included. "
            "Output error: by how much the refinement changed it from that of the initial mask, as "
            "the mean over the groups, each of which counts alike, and in the worst of them."
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

/// Perplexities by what was swept, for each text; run by run where nothing was.
fn perplexity(comparison: &Comparison) -> Result<Markup, chart::Error> {
    let figures = comparison.figures.iter().filter(|of| of.kind == Kind::Perplexity);
    let figures: Vec<_> = figures.collect();
    if figures.is_empty() {
        return Ok(html! { p.empty { "No perplexity was measured." } });
    }
    match Swept::of(comparison).filter(|swept| swept.series.len() < LOOKS.len()) {
        Some(swept) => by_value(&figures, &swept),
        None => by_run(&figures, comparison),
    }
}

fn by_value(figures: &[&Figure], swept: &Swept) -> Result<Markup, chart::Error> {
    let low = swept.values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = swept.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let room = 0.04 * (high - low);
    let x = match low > 0.0 && high >= 20.0 * low {
        true => Axis::logarithmic(low / 1.1, high * 1.1),
        false => {
            let percent = |fraction: f64| format!("{}%", (1e3 * fraction).round() / 10.0);
            let label = |value| if swept.fraction { percent(value) } else { short(value) };
            Axis::linear(low - room, high + room, label)
        }
    };
    let mut names: Vec<String> = swept.series.iter().map(|(name, _)| name.clone()).collect();
    if figures.iter().any(|figure| figure.dense.is_some()) {
        names.push("dense".into());
    }
    let mut charts = Vec::new();
    for figure in figures {
        let line = |(name, runs): &(String, Vec<usize>)| {
            let point = |run: &usize| Some((swept.values[*run], figure.values[*run]?));
            Line { name: name.clone(), points: runs.iter().filter_map(point).collect() }
        };
        let mut lines: Vec<_> = swept.series.iter().map(line).collect();
        lines.extend(
            figure.dense.map(|dense| Line {
                name: "dense".into(),
                points: vec![(low, dense), (high, dense)],
            }),
        );
        let title = format!("Perplexity on {} by {}", figure.name, swept.name);
        let (across, x, scale) = (swept.name.clone(), x.clone(), Scale::Logarithmic);
        let chart = Lines { title, across, x, scale, lines, rings: Vec::new(), size: LARGE };
        charts.push((&figure.name, chart.draw()?));
    }
    Ok(html! {
        p { "The lower the better, by " code { (swept.name) } "." }
        (legend(&names, None)?)
        div.columns {
            @for (name, picture) in charts {
                figure { figcaption { "perplexity on " (name) " (logarithmic)" } (picture) }
            }
        }
    })
}

fn by_run(figures: &[&Figure], comparison: &Comparison) -> Result<Markup, chart::Error> {
    let mut names: Vec<String> = comparison.runs.clone();
    let dense = figures.iter().any(|figure| figure.dense.is_some());
    if dense {
        names.insert(0, "dense".into());
    }
    let mut charts = Vec::new();
    for figure in figures {
        let mut values = figure.values.clone();
        if dense {
            values.insert(0, figure.dense);
        }
        let title = format!("Perplexity on {} by run", figure.name);
        charts.push((&figure.name, dots(&title, "perplexity", &names, &values)?));
    }
    Ok(html! {
        p { "The lower the better." }
        @for (name, picture) in charts {
            figure.wide {
                figcaption { "perplexity on " (name) " (logarithmic)" }
                div.scroll role="region" aria-label={ "perplexity on " (name) ", as a chart" } tabindex="0" {
                    (picture)
                }
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
        report.layers().into_iter().map(of).filter(|(_, fraction)| fraction.is_finite()).collect()
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
    let groups = distinct(shown.iter().flat_map(|run| {
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
        let chart = Lines {
            title,
            across: "layer".into(),
            x,
            scale,
            lines,
            rings: Vec::new(),
            size: LARGE,
        };
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
        (legend(&names, None)?)
        div.columns {
            @for (group, picture) in charts {
                figure { figcaption { (group) ", " (what) " by layer" } (picture) }
            }
        }
    })
}
