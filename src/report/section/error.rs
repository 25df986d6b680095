//! By how much groups miss what they are to give, layer by layer, before and after the refinement.

use maud::{Markup, html};

use crate::{
    executor::Loss,
    prune::{GroupReport, StageReport},
    report::{
        Report,
        axis::Axis,
        chart::{self, LARGE, Line, Lines, Scale, WIDE, legend},
        figure::{change, count, number, percent},
        table::{details, table, text},
    },
};

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    if report.groups.is_empty() {
        return Ok(html! {
            p.empty { "No stage refined the masks, so the error was not measured: the recipe has no [[refine]]." }
        });
    }
    let groups = report.group_names();
    let names = lines(report, groups[0]).into_iter().map(|line| line.name).collect::<Vec<_>>();
    let chart = |group: &str| {
        let title = format!("{group}: mean squared error of the output by layer, logarithmic");
        let (x, lines) = (Axis::numbers(report.last_layer()), lines(report, group));
        Lines { title, across: "layer", x, scale: Scale::Logarithmic, lines, size: LARGE }.draw()
    };
    Ok(html! {
        p {
            "The mean squared error of each group's output on the calibration samples, before the "
            "first stage and after the last one."
        }
        (stages(report))
        (left(report)?)
        (legend(&names)?)
        div.columns {
            @for group in &groups {
                figure { figcaption { (group) ", error by layer (logarithmic)" } (chart(group)?) }
            }
        }
        (details("All errors, as a table", &all(report)))
    })
}

/// What the refinement left of each group's error.
fn left(report: &Report) -> Result<Markup, chart::Error> {
    let groups = report.group_names();
    let line = |group: &&str| {
        let of = report.groups.iter().filter(|of| of.group == *group);
        let points = of.filter_map(|of| {
            let [before, after] = of.errors()?;
            Some((of.layer as f64, after.calibration / before.calibration))
        });
        Line { name: (*group).to_owned(), points: points.collect() }
    };
    let lines = groups.iter().map(line).collect();
    let title = "Error after the refinement, as a share of that before, by layer and group".into();
    let (x, scale) = (Axis::numbers(report.last_layer()), Scale::Share);
    let picture = Lines { title, across: "layer", x, scale, lines, size: WIDE }.draw()?;
    Ok(html! {
        (legend(&groups)?)
        figure.wide {
            figcaption { "Error after the refinement, as a share of that before, by layer" }
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

/// Whether samples were held out.
fn held_out(report: &Report) -> bool {
    let mut errors = report.groups.iter().filter_map(GroupReport::errors);
    errors.any(|[before, _]| before.held_out.is_some())
}

/// What each stage did, over all groups.
fn stages(report: &Report) -> Markup {
    let most = report.groups.iter().map(|group| group.stages.len()).max().unwrap_or(0);
    let rows = (0..most).map(|i| {
        let of: Vec<_> = report.groups.iter().filter_map(|group| group.stages.get(i)).collect();
        let accepted = of.iter().filter(|stage| stage.accepted).count();
        let matrices = || of.iter().flat_map(|stage| &stage.matrices);
        let swaps: usize = matrices().map(|matrix| matrix.came_back).sum();
        let kept: usize = matrices().map(|matrix| matrix.kept).sum();
        let sum = |loss: &dyn Fn(&StageReport) -> Option<f64>| -> Option<f64> {
            of.iter().map(|stage| loss(stage)).sum()
        };
        let fell = |loss: fn(&Loss) -> Option<f64>| {
            let before = sum(&|stage| loss(&stage.before));
            before.zip(sum(&|stage| loss(&stage.after))).map_or("–".into(), |(b, a)| change(b, a))
        };
        [
            format!("{}. {}", i + 1, of[0].stage),
            format!("{accepted} of {}", of.len()),
            count(swaps as u64),
            percent(swaps as f64 / kept.max(1) as f64),
            fell(|loss| Some(loss.calibration)),
            fell(|loss| loss.held_out),
        ]
        .map(text)
        .into()
    });
    let head = ["stage", "groups accepted", "swaps", "of the kept", "error", "held out"];
    let head = if held_out(report) { &head[..] } else { &head[..5] };
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
