//! Number of pruned weights by layer, group and matrix.

use maud::{Markup, html};

use crate::{
    permutation::PermutedPart,
    report::{
        Matrix, Report, StructureReport,
        axis::Axis,
        chart::{self, LARGE, Line, Lines, Scale, legend},
        figure::{count, percent},
        table::{details, table, text},
    },
};

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    if report.matrices.is_empty() {
        return Ok(html! { p.empty { "The report does not say which matrices were pruned." } });
    }
    let chart = |group: &str| {
        let title = format!("{group}: share of weights that are pruned, by layer");
        let (x, lines) = (Axis::numbers(report.last_layer()), lines(report, group));
        Lines {
            title,
            across: "layer".into(),
            x,
            scale: Scale::Percent,
            lines,
            rings: Vec::new(),
            size: LARGE,
        }
        .draw()
    };
    Ok(html! {
        p {
            (count(report.pruned_weights as u64)) " of " (count(report.prunable_weights as u64))
            " weights are pruned, " (percent(report.sparsity()))
            @if let Some(fraction) = report.model_sparsity() {
                ", which is " (percent(fraction)) " of the " (count(report.model_weights))
                " weights of the whole model, embeddings included"
            }
            "."
            @if let Some(structures) = StructureReport::in_words(&report.structures) {
                " They are " (structures) ", and the result is a smaller dense model."
            }
            @if let Some(permuted) = PermutedPart::in_words(&report.permuted) {
                " Before, channels were put in another order: " (permuted) "."
            }
            @if report.changed_weights > 0 {
                " " (count(report.changed_weights as u64))
                " of the kept ones are not the dense model's."
            }
            @if report.changed_biases > 0 {
                " " (count(report.changed_biases as u64))
                " values of biases are not the dense model's."
            }
        }
        (legend(&NAMES, None)?)
        div.columns {
            @for group in report.group_names() {
                figure { figcaption { (group) ", share that is pruned by layer" } (chart(group)?) }
            }
        }
        (details("Sparsity by layer and group, as a table", &by_group(report)))
        (details("Sparsity by matrix, as a table", &by_matrix(report)))
    })
}

const NAMES: [&str; 2] = ["initial masks", "in the end"];

/// Pruned fraction of matrices, given the number of weights that each keeps.
fn pruned<'a>(
    matrices: impl Iterator<Item = &'a Matrix>,
    kept: fn(&Matrix) -> usize,
) -> Option<f64> {
    let (all, kept) =
        matrices.fold((0, 0), |(all, sum), matrix| (all + matrix.weights(), sum + kept(matrix)));
    (all > 0).then(|| 1.0 - kept as f64 / all as f64)
}

fn lines(report: &Report, group: &str) -> Vec<Line> {
    let of = |name: &str, kept: fn(&Matrix) -> usize| Line {
        name: name.into(),
        points: report
            .layers()
            .into_iter()
            .filter_map(|layer| Some((layer as f64, pruned(report.of(layer, group), kept)?)))
            .collect(),
    };
    vec![of(NAMES[0], |matrix| matrix.initial), of(NAMES[1], |matrix| matrix.kept)]
}

fn by_group(report: &Report) -> Markup {
    let rows = report.layers().into_iter().flat_map(|layer| {
        report.group_names().into_iter().filter_map(move |group| {
            let matrices = || report.of(layer, group);
            let weights: usize = matrices().map(Matrix::weights).sum();
            let [before, after] = [
                pruned(matrices(), |matrix| matrix.initial)?,
                pruned(matrices(), |matrix| matrix.kept)?,
            ];
            let cells = [
                format!("{layer}, {group}"),
                percent(before),
                percent(after),
                count(weights as u64),
            ];
            Some(cells.map(text).into())
        })
    });
    let head = ["layer, group", "initial masks", "in the end", "weights"];
    table("Share of weights that are pruned, by layer and group", &head, rows)
}

fn by_matrix(report: &Report) -> Markup {
    let rows = report.matrices.iter().map(|matrix| {
        let weights = matrix.weights().max(1) as f64;
        let fraction = |kept: usize| percent(1.0 - kept as f64 / weights);
        let [rows, columns] = matrix.shape;
        [
            matrix.tensor.clone(),
            format!("{rows} × {columns}"),
            matrix.pattern.clone(),
            fraction(matrix.initial),
            fraction(matrix.kept),
        ]
        .map(text)
        .into()
    });
    let head = ["matrix", "outputs × inputs", "pattern", "initial mask", "in the end"];
    table("Share of weights that are pruned, by matrix", &head, rows)
}
