//! Number of swapped weights of each matrix.

use std::collections::BTreeMap;

use maud::{Markup, html};

use crate::report::{
    Report,
    chart::{self, heat_legend, heatmap},
    figure::{count, percent},
    names,
    table::{details, table, text},
};

/// Number of swaps and of kept weights, by kind of matrix and layer.
struct Swaps {
    /// Names of the kinds.
    kinds: Vec<String>,
    found: BTreeMap<(usize, usize), (usize, usize)>,
}

impl Swaps {
    fn of(report: &Report) -> Self {
        let (mut long, mut found) = (Vec::new(), BTreeMap::new());
        for group in &report.groups {
            let last = group.stages.len().saturating_sub(1);
            let stages = group.stages.iter().enumerate();
            for (i, matrix) in stages.flat_map(|(i, of)| of.matrices.iter().map(move |m| (i, m))) {
                let kind = kind(&matrix.tensor, group.layer);
                let place = long.iter().position(|known| *known == kind).unwrap_or_else(|| {
                    long.push(kind);
                    long.len() - 1
                });
                let (swaps, kept) = found.entry((place, group.layer)).or_insert((0, 0));
                *swaps += matrix.came_back;
                // A kind may have several matrices, those of experts.
                *kept += if i == last { matrix.kept } else { 0 };
            }
        }
        Self { kinds: names::short(&long, '.'), found }
    }

    /// Fraction of a matrix's kept weights that the refinement swapped in.
    fn fraction(&self, kind: usize, layer: usize) -> Option<f64> {
        let (swaps, kept) = self.found.get(&(kind, layer))?;
        Some(*swaps as f64 / (*kept).max(1) as f64)
    }
}

/// A tensor's name with `*` for the layer and for the expert, without `.weight`.
pub(in crate::report) fn kind(tensor: &str, layer: usize) -> String {
    const EXPERTS: &str = ".experts.";
    let name = tensor.replacen(&format!(".{layer}."), ".*.", 1);
    let name = name.strip_suffix(".weight").unwrap_or(&name);
    match name.split_once(EXPERTS).and_then(|(module, rest)| Some((module, rest.split_once('.')?)))
    {
        Some((module, (expert, rest))) if expert.parse::<usize>().is_ok() => {
            format!("{module}{EXPERTS}*.{rest}")
        }
        _ => name.to_owned(),
    }
}

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    let swaps = Swaps::of(report);
    let fractions = swaps.found.keys().filter_map(|(kind, layer)| swaps.fraction(*kind, *layer));
    let most = fractions.fold(0.0, f64::max);
    if most == 0.0 {
        return Ok(html! { p.empty { "No weights changed places." } });
    }
    let title = "Weights that came back as a share of a matrix's kept weights, by matrix and layer";
    let values = swaps
        .found
        .keys()
        .filter_map(|&(kind, layer)| Some((kind, layer, swaps.fraction(kind, layer)? / most)));
    let picture = heatmap(title, "layer", &swaps.kinds, report.last_layer(), values)?;
    Ok(html! {
        p {
            "How many weights of each matrix came back, of those that it keeps, all stages together: at "
            "most " b { (percent(most)) } ". For each one that came back another one went."
            @if !report.steps.is_empty() { " Swaps end to end are not among them." }
        }
        figure.wide {
            figcaption { "Weights that came back, of those that a matrix keeps" }
            (heat_legend(most, percent)?)
            div.scroll role="region" aria-label="Swaps by matrix and layer, as a chart" tabindex="0" {
                (picture)
            }
        }
        (details("Swaps, as a table", &all(report, &swaps)))
    })
}

fn all(report: &Report, swaps: &Swaps) -> Markup {
    let rows = report.layers().into_iter().map(|layer| {
        let cells = (0..swaps.kinds.len()).map(|kind| match swaps.found.get(&(kind, layer)) {
            None => text("–"),
            Some((came_back, kept)) => {
                let fraction = percent(*came_back as f64 / (*kept).max(1) as f64);
                html! { (count(*came_back as u64)) br; span.note { (fraction) } }
            }
        });
        std::iter::once(text(layer.to_string())).chain(cells).collect()
    });
    let head: Vec<&str> =
        std::iter::once("layer").chain(swaps.kinds.iter().map(String::as_str)).collect();
    table("Weights that came back, and their share of the kept ones", &head, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_the_same_in_all_layers() {
        let name = |layer| format!("model.layers.{layer}.mlp.up_proj.weight");
        assert_eq!(kind(&name(3), 3), "model.layers.*.mlp.up_proj");
        assert_eq!(kind(&name(12), 12), kind(&name(3), 3));
        let expert = "model.layers.3.mlp.experts.3.up_proj.weight";
        assert_eq!(kind(expert, 3), "model.layers.*.mlp.experts.*.up_proj");
    }
}
