//! Distributions of the scores of swapped and of kept weights.

use maud::{Markup, html};

use crate::{
    mask::{Distribution, Histogram},
    report::{
        Report,
        axis::Axis,
        chart::{self, LARGE, Line, Lines, SMALL, Scale, legend},
        figure::{count, number},
        table::{details, table, text},
    },
};

/// What happened to weights: its name, and their scores.
type Fate = (&'static str, fn(&Distribution) -> &Histogram);

/// The sets of weights whose scores are drawn.
const FATES: [Fate; 4] = [
    ("stayed", |of| &of.kept),
    ("came back", |of| &of.came_back),
    ("went", |of| &of.went),
    ("stayed away", |of| &of.pruned),
];

/// Maximum number of distributions drawn for a stage.
const MOST: usize = 80;

/// The scores of the groups in one stage.
struct Stage<'a> {
    /// Number of the stage, and its method.
    name: String,
    measure: &'a str,
    /// Layers and groups with their distributions.
    groups: Vec<(usize, &'a str, &'a Distribution)>,
}

fn stages(report: &Report) -> Vec<Stage<'_>> {
    let most = report.groups.iter().map(|group| group.stages.len()).max().unwrap_or(0);
    let of = |i: usize| {
        let groups = report.groups.iter().filter_map(|group| {
            let scores = group.stages.get(i)?.scores.as_ref()?;
            Some((group.layer, group.group.as_str(), scores))
        });
        let groups: Vec<_> = groups.collect();
        let (_, _, first) = groups.first()?;
        let stage = report.groups.iter().find_map(|group| group.stages.get(i))?;
        let name = format!("{}. {}", i + 1, stage.stage);
        Some(Stage { name, measure: &first.measure, groups })
    };
    (0..most).filter_map(of).collect()
}

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    let stages = stages(report);
    if stages.is_empty() {
        return Ok(html! { p.empty { "No weights changed places by their scores." } });
    }
    let names = FATES.map(|(name, _)| name);
    let mut parts = Vec::new();
    for stage in &stages {
        parts.push(stage.body(report)?);
    }
    Ok(html! {
        p {
            "Weights that " b { "came back" } " had been pruned, those that " b { "went" }
            " had been kept; the others stayed what they were. The scores are those that the stage "
            "looked at; swaps have no scores, and are shown by |w|·‖x‖, what a weight alone adds to "
            "the output."
        }
        (legend(&names, None)?)
        @for part in parts { (part) }
    })
}

impl Stage<'_> {
    fn body(&self, report: &Report) -> Result<Markup, chart::Error> {
        let names = report.group_names();
        let names = names.iter().filter(|name| self.groups.iter().any(|(_, of, _)| of == *name));
        let names: Vec<&str> = names.copied().collect();
        // A large model has too many layers to draw all: draw every `step`-th; the table has all.
        let step = self.groups.len().div_ceil(MOST).max(1);
        let mut small = Vec::new();
        for (layer, group, scores) in self.groups.iter().filter(|(layer, ..)| layer % step == 0) {
            small.push((format!("layer {layer}, {group}"), self.histogram(*layer, group, scores)?));
        }
        let summary = match step {
            1 => "The distributions of each layer and group".into(),
            step => format!("The distributions of each group, of one in {step} layers"),
        };
        let all = html! {
            div.small {
                @for (caption, picture) in small { figure { figcaption { (caption) } (picture) } }
            }
        };
        Ok(html! {
            h3 { (self.name) ", by " (self.measure) }
            div.columns {
                @for name in names {
                    figure {
                        figcaption { (name) ", median score by layer (logarithmic)" }
                        (self.medians(report, name)?)
                    }
                }
            }
            (details(&summary, &all))
            (details("Medians and numbers, as a table", &self.table()))
        })
    }

    /// Medians of a group's scores by layer.
    fn medians(&self, report: &Report, name: &str) -> Result<Markup, chart::Error> {
        let line = |(fate, scores): Fate| Line {
            name: fate.into(),
            points: self
                .groups
                .iter()
                .filter(|(_, group, _)| *group == name)
                .map(|(layer, _, of)| (*layer as f64, median(scores(of))))
                .collect(),
        };
        let title = format!("{name}: median score of weights by layer, by what became of them");
        let (x, lines) = (Axis::numbers(report.last_layer()), FATES.map(line).into());
        Lines {
            title,
            across: "layer".into(),
            x,
            scale: Scale::Logarithmic,
            lines,
            rings: Vec::new(),
            size: LARGE,
        }
        .draw()
    }

    /// Histograms of a group's scores.
    fn histogram(
        &self,
        layer: usize,
        group: &str,
        of: &Distribution,
    ) -> Result<Markup, chart::Error> {
        let score = |bin: i32| 2_f64.powf((f64::from(bin) + 0.5) / 2.0);
        let all = FATES.map(|(_, scores)| scores(of));
        let ends = all
            .iter()
            .filter(|scores| !scores.counts.is_empty())
            .map(|scores| [scores.first, scores.first + scores.counts.len() as i32 - 1].map(score));
        let (low, high) = ends.fold((f64::INFINITY, 0.0_f64), |(low, high), [first, last]| {
            (low.min(first), high.max(last))
        });
        let line = |(fate, scores): Fate| {
            let scores = scores(of);
            let fraction = |count: &u64| *count as f64 / scores.len().max(1) as f64;
            let points = (scores.first..).zip(&scores.counts);
            let points = points.map(|(bin, count)| (score(bin), fraction(count))).collect();
            Line { name: fate.into(), points }
        };
        let title = format!("Layer {layer}, {group}: distribution of scores");
        let (x, lines) = (Axis::logarithmic(low.min(high), high), FATES.map(line).into());
        Lines {
            title,
            across: "score".into(),
            x,
            scale: Scale::FromZero,
            lines,
            rings: Vec::new(),
            size: SMALL,
        }
        .draw()
    }

    fn table(&self) -> Markup {
        let rows = self.groups.iter().map(|(layer, group, of)| {
            let cells = FATES.map(|(_, scores)| {
                let scores = scores(of);
                html! { (number(median(scores))) br; span.note { "of " (count(scores.len())) } }
            });
            std::iter::once(text(format!("{layer}, {group}"))).chain(cells).collect()
        });
        let names = FATES.map(|(name, _)| name);
        let head: Vec<&str> = std::iter::once("layer, group").chain(names).collect();
        let caption = format!("{}: median score, and the number of weights", self.name);
        table(&caption, &head, rows)
    }
}

/// Median; NaN without scores, 0 if it is below the smallest bin.
fn median(scores: &Histogram) -> f64 {
    match scores.quantile(0.5) {
        Some(power) => power.exp2(),
        None if scores.is_empty() => f64::NAN,
        None => 0.0,
    }
}
