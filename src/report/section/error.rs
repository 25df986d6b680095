//! Output errors of the groups by layer, before and after the refinement.

use maud::{Markup, html};

use crate::{
    executor::Loss,
    prune::GroupReport,
    report::{
        OutputError, Report,
        axis::Axis,
        chart::{self, LARGE, Line, Lines, Scale, WIDE, legend},
        figure::{change, count, number, percent},
        table::{details, table, text},
    },
};

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    if report.groups.is_empty() {
        return Ok(html! {
            p.empty { "No stage refined the masks group by group, so the error was not measured: the recipe has no [[refine]]." }
        });
    }
    let groups = report.group_names();
    let names = lines(report, groups[0]).into_iter().map(|line| line.name).collect::<Vec<_>>();
    let chart = |group: &str| {
        let title = format!("{group}: mean squared error of the output by layer, logarithmic");
        let (x, lines) = (Axis::numbers(report.last_layer()), lines(report, group));
        let rings =
            rings(report, |of, [_, after]| (of.group == group).then_some(after.calibration));
        let scale = Scale::Logarithmic;
        Lines { title, across: "layer".into(), x, scale, lines, rings, size: LARGE }.draw()
    };
    Ok(html! {
        p {
            "A group is a part of a decoder layer, such as its MLP, whose masks are refined together. "
            "Its error is by how much its output on the calibration samples differs from its target, "
            "what the dense weights give: the mean square, before the first stage, with the initial "
            "mask, and after the last one."
        }
        @if let Some(error) = &report.output_error { (relative(error)) }
        (taken_back(report))
        (stages(report))
        (left(report)?)
        (legend(&names, ring(report))?)
        div.columns {
            @for group in &groups {
                figure { figcaption { (group) ", error by layer (logarithmic)" } (chart(group)?) }
            }
        }
        (details("All errors, as a table", &all(report)))
    })
}

/// Text about the mean and the worst relative error.
fn relative(error: &OutputError) -> Markup {
    html! {
        p {
            "Of a group's error with the initial mask, the refinement left " b { (percent(error.mean)) }
            " (mean of all groups, each of which counts alike), and " b { (percent(error.worst)) }
            " in the worst one, " (error.worst_place())
            @if let Some(held_out) = error.held_out {
                "; on the held-out samples " b { (percent(held_out)) } " (mean)"
            }
            "."
        }
    }
}

/// Text about the groups in which a stage was reverted.
fn taken_back(report: &Report) -> Markup {
    let stages: Vec<_> = (0..most_stages(report))
        .map(|stage| (stage, report.taken_back(stage).map(GroupReport::place).collect::<Vec<_>>()))
        .filter(|(_, places)| !places.is_empty())
        .collect();
    html! {
        @for (stage, places) in stages {
            p {
                "Stage " (stage + 1) ", " (report.groups[0].stages[stage].stage) ", was taken back in "
                (places.join(", ")) ": it did not lower the error there, and these groups are what they "
                "were before it."
            }
        }
    }
}

/// The meaning of a ring, if there are any.
fn ring(report: &Report) -> Option<&'static str> {
    (0..most_stages(report))
        .any(|stage| report.taken_back(stage).next().is_some())
        .then_some("a stage was taken back")
}

/// Points of the reverted groups in a chart of `error`.
fn rings(
    report: &Report,
    error: impl Fn(&GroupReport, [Loss; 2]) -> Option<f64>,
) -> Vec<(f64, f64)> {
    let taken_back =
        report.groups.iter().filter(|of| of.stages.iter().any(|stage| !stage.accepted));
    taken_back.filter_map(|of| Some((of.layer as f64, error(of, of.errors()?)?))).collect()
}

fn most_stages(report: &Report) -> usize {
    report.groups.iter().map(|group| group.stages.len()).max().unwrap_or(0)
}

/// Relative error of each group after the refinement.
fn left(report: &Report) -> Result<Markup, chart::Error> {
    let groups = report.group_names();
    let quotient = |[before, after]: [Loss; 2]| after.calibration / before.calibration;
    let line = |group: &&str| {
        let of = report.groups.iter().filter(|of| of.group == *group);
        let points = of.filter_map(|of| Some((of.layer as f64, quotient(of.errors()?))));
        Line { name: (*group).to_owned(), points: points.collect() }
    };
    let lines = groups.iter().map(line).collect();
    let title = "Error after the refinement, as a share of that before, by layer and group".into();
    let (x, scale) = (Axis::numbers(report.last_layer()), Scale::FromZero);
    let rings = rings(report, |_, errors| Some(quotient(errors)));
    let picture =
        Lines { title, across: "layer".into(), x, scale, lines, rings, size: WIDE }.draw()?;
    Ok(html! {
        figure.wide {
            figcaption { "Error after the refinement, as a share of that before, by layer" }
            (legend(&groups, ring(report))?)
            div.scroll role="region" aria-label="Share of the error that is left, as a chart" tabindex="0" {
                (picture)
            }
        }
    })
}

/// The errors of the groups of one name, as series.
fn lines(report: &Report, group: &str) -> Vec<Line> {
    let of = |name: &str, error: fn([Loss; 2]) -> Option<f64>| Line {
        name: name.into(),
        points: report
            .groups
            .iter()
            .filter(|of| of.group == group)
            .filter_map(|of| Some((of.layer as f64, error(of.errors()?)?)))
            .collect(),
    };
    let mut lines = vec![
        of("before", |[before, _]| Some(before.calibration)),
        of("after", |[_, after]| Some(after.calibration)),
    ];
    if held_out(report) {
        lines.push(of("before, held out", |[before, _]| before.held_out));
        lines.push(of("after, held out", |[_, after]| after.held_out));
    }
    lines
}

/// Whether there are held-out samples.
fn held_out(report: &Report) -> bool {
    let mut errors = report.groups.iter().filter_map(GroupReport::errors);
    errors.any(|[before, _]| before.held_out.is_some())
}

/// Results of each stage over all groups.
fn stages(report: &Report) -> Markup {
    let rows = (0..most_stages(report)).map(|i| {
        let of: Vec<_> = report.groups.iter().filter_map(|group| group.stages.get(i)).collect();
        let accepted = of.iter().filter(|stage| stage.accepted).count();
        let matrices = || of.iter().flat_map(|stage| &stage.matrices);
        let swaps: usize = matrices().map(|matrix| matrix.came_back).sum();
        let kept: usize = matrices().map(|matrix| matrix.kept).sum();
        let error = OutputError::of_stage(&report.groups, i);
        let fell = |quotient: Option<f64>| quotient.map_or("–".into(), |of| change(1.0, of));
        [
            format!("{}. {}", i + 1, of[0].stage),
            format!("{accepted} of {}", of.len()),
            count(swaps as u64),
            percent(swaps as f64 / kept.max(1) as f64),
            fell(error.as_ref().map(|error| error.mean)),
            fell(error.as_ref().map(|error| error.worst)),
            fell(error.and_then(|error| error.held_out)),
        ]
        .map(text)
        .into()
    });
    let head = [
        "stage",
        "groups accepted",
        "swaps",
        "of the kept",
        "error, mean",
        "error, worst group",
        "held out, mean",
    ];
    let head = if held_out(report) { &head[..] } else { &head[..6] };
    let rows = rows.map(|row: Vec<Markup>| row.into_iter().take(head.len()).collect());
    table("The stages, over all groups", head, rows)
}

fn all(report: &Report) -> Markup {
    let error = |loss: Option<f64>| loss.map_or("–".into(), number);
    let rows = report.groups.iter().flat_map(|group| {
        group.stages.iter().map(move |stage| {
            [
                format!("{}, {}", group.layer, group.group),
                stage.stage.clone(),
                number(stage.before.calibration),
                number(stage.after.calibration),
                change(stage.before.calibration, stage.after.calibration),
                if stage.accepted { "yes".into() } else { "taken back".into() },
                error(stage.before.held_out),
                error(stage.after.held_out),
            ]
            .map(text)
            .into()
        })
    });
    let head = [
        "layer, group",
        "stage",
        "before",
        "after",
        "change",
        "accepted",
        "held out, before",
        "held out, after",
    ];
    let head = if held_out(report) { &head[..] } else { &head[..6] };
    let rows = rows.map(|row: Vec<Markup>| row.into_iter().take(head.len()).collect());
    table("Errors by layer, group and stage", head, rows)
}
