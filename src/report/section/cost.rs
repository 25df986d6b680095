//! Time, memory, and sizes of the checkpoints.

use maud::{Markup, html};

use crate::report::{
    Report,
    figure::{bytes, duration, operations, times},
    table::{bar, table, text},
};

pub(super) fn body(report: &Report) -> Markup {
    html! {
        div.columns {
            (phases(report))
            (size(report))
        }
        @if report.operations > 0 {
            p.note {
                "Finding the masks took " (operations(report.operations as f64)) " of matrix products"
                @if report.product_seconds > 0.0 {
                    ", and these " (duration(report.product_seconds)) " of the time above, at "
                    (operations(report.operations as f64 / report.product_seconds)) "/s"
                }
                ". "
                "Expected were " (operations(report.least_operations)) "."
            }
        }
    }
}

fn phases(report: &Report) -> Markup {
    let longest = report.seconds.values().copied().fold(0.0, f64::max);
    let most = report.peak_memory();
    let mut rows: Vec<Vec<Markup>> = Vec::new();
    for (phase, &seconds) in &report.seconds {
        let memory = report.memory.get(phase).copied().zip(most);
        rows.push(vec![
            text(phase),
            bar(&duration(seconds), seconds / longest),
            memory.map_or_else(
                || text("–"),
                |(peak, most)| bar(&bytes(peak), peak as f64 / most.max(1) as f64),
            ),
        ]);
    }
    let total =
        ["together".into(), duration(report.total_seconds()), most.map_or("–".into(), bytes)];
    rows.push(total.map(text).into());
    html! {
        div {
            (table("Phases", &["phase", "time", "peak memory"], rows))
            p.note { "Memory is the process's own, without the pages of the mapped checkpoint." }
        }
    }
}

fn size(report: &Report) -> Markup {
    let [dense, pruned] = [report.sizes.dense, report.sizes.output].map(|size| size.weight_bytes);
    let fraction = |of: u64| of as f64 / dense.max(pruned).max(1) as f64;
    let row = |name: &str, of: u64| {
        vec![text(name), bar(&bytes(of), fraction(of)), text(times(of as f64 / dense as f64))]
    };
    let format = report.sizes.format;
    let stored = if format.is_dense() { "pruned".into() } else { format!("pruned, {format}") };
    let rows = [row("dense", dense), row(&stored, pruned)];
    html! {
        div {
            (table("Weights on disk", &["checkpoint", "size", "× dense"], rows))
            @if let Some(quantisation) = &report.quantisation {
                p.note { "The dense model is " (quantisation) "." }
            }
        }
    }
}
