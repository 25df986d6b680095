//! A table of the measurements of a run: dense model, initial masks and refined masks.

use std::path::Path;

use super::columns::{
    Column::{Figures, Words},
    columns,
};
use crate::{
    evaluate::Accuracy,
    report::{Report, Stages},
};

/// A fraction of a task's questions, and its standard error; `None` if the task has no such
/// fraction.
type Of = fn(&Accuracy) -> Option<[f64; 2]>;

/// A line of the table.
struct Line {
    name: String,
    /// Figures of the dense model, with the initial masks, and with the refined masks.
    figures: [Option<String>; 3],
    /// The change by the refinement.
    change: String,
}

/// A line for each text and each task; `None` if nothing was measured.
pub(super) fn gains(report: &Report) -> Option<String> {
    let mut lines = Vec::new();
    for text in &report.perplexity {
        let errors = each(&text.found, |found| found.perplexity_stderr).map(Option::flatten);
        let found = each(&text.found, |found| found.perplexity);
        let file = Path::new(&text.text).file_name().map(|name| name.to_string_lossy());
        let [dense, initial, refined] = found;
        lines.push(Line {
            name: format!("perplexity, {}", file.as_deref().unwrap_or(&text.text)),
            figures: found.map(|found| Some(format!("{:.4}", found?))),
            change: relative(initial, refined),
        });
        if errors.iter().any(Option::is_some) {
            let Stages { initial, refined, .. } = &text.found;
            let change = initial.as_ref().zip(refined.as_ref());
            let change = change.and_then(|(initial, refined)| refined.above(initial));
            lines.push(Line {
                name: "  standard error".into(),
                figures: errors.map(|error| Some(format!("± {:.4}", error?))),
                change: change
                    .map_or_else(String::new, |[_, error]| format!("± {:.1}%", 100.0 * error)),
            });
        }
        let times = |found: Option<f64>| Some(format!("× {:.2}", found? / dense?));
        lines.push(Line {
            name: "  against the dense model's".into(),
            figures: [None, times(initial), times(refined)],
            change: String::new(),
        });
    }
    for task in &report.tasks {
        let of: [(&str, Of); 2] = [
            ("acc", |found| Some([found.acc, found.acc_stderr])),
            ("acc_norm", |found| Some([found.acc_norm?, found.acc_norm_stderr?])),
        ];
        for (name, of) in of {
            let found =
                each(&task.found, of).map(|found| Some(found??.map(|fraction| 100.0 * fraction)));
            if found[0].is_none() {
                continue;
            }
            let change = match found {
                [_, Some([initial, _]), Some([refined, _])] => {
                    let points = refined - initial;
                    format!("{:.1} points {}", points.abs(), direction(points))
                }
                _ => String::new(),
            };
            lines.push(Line {
                name: format!("{}, {name}", task.task),
                figures: found
                    .map(|found| found.map(|[acc, error]| format!("{acc:.1} ± {error:.1}%"))),
                change,
            });
        }
    }
    let shown: Vec<usize> =
        (0..3).filter(|&i| lines.iter().any(|line| line.figures[i].is_some())).collect();
    if shown.is_empty() {
        return None;
    }
    let headings = ["dense", "initial mask", "refined"];
    let mut heads = vec![Words("")];
    heads.extend(shown.iter().map(|&i| Figures(headings[i])));
    let gained = lines.iter().any(|line| !line.change.is_empty());
    heads.extend(gained.then_some(Words("by refinement")));
    let row = |Line { name, mut figures, change }: Line| {
        let mut row = vec![name];
        row.extend(shown.iter().map(|&i| figures[i].take().unwrap_or_default()));
        row.extend(gained.then_some(change));
        row
    };
    Some(columns(&heads, &lines.into_iter().map(row).collect::<Vec<_>>()))
}

/// A figure of each of the three models that was measured.
fn each<T, U>(found: &Stages<T>, of: impl Fn(&T) -> U) -> [Option<U>; 3] {
    [Some(&found.dense), found.initial.as_ref(), found.refined.as_ref()].map(|found| found.map(&of))
}

fn direction(change: f64) -> &'static str {
    if change < 0.0 { "lower" } else { "higher" }
}

fn relative(from: Option<f64>, to: Option<f64>) -> String {
    match (from, to) {
        (Some(from), Some(to)) => {
            let percent = 100.0 * (to / from - 1.0);
            format!("{:.1}% {}", percent.abs(), direction(percent))
        }
        _ => String::new(),
    }
}
