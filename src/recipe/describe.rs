//! What a recipe does, in words.

use super::{Init, Kind, Recipe, Refine, Rounds, Scope, Share, Stage, Values};
use crate::prune::{Alpha, Side};

/// The metrics of a pipeline.
fn names(pipeline: &[Stage]) -> String {
    pipeline.iter().map(|stage| stage.metric.as_str()).collect::<Vec<_>>().join(" · ")
}

/// How initial masks are made.
pub(crate) fn init(recipe: &Recipe) -> String {
    match recipe.mask.init {
        Init::Metric => format!("metric {}", names(&recipe.mask.metric)),
        Init::None => {
            let name = recipe.model.path.file_name().unwrap_or_default();
            format!("the zeros of {}", name.to_string_lossy())
        }
        init => init.to_string(),
    }
}

/// What a stage of the refinement is, for these groups, in a line.
pub(crate) fn stage(stage: &Refine, recipe: &Recipe, groups: &[&str]) -> String {
    let scope = stage.scope.unwrap_or(Scope::Row);
    match stage.stage {
        Some(Kind::Rebuild) => {
            let alpha = match stage.alpha {
                Some(Share(Alpha::Share(alpha))) => alpha.to_string(),
                _ => "auto".into(),
            };
            // What is not the paper's way.
            let mut otherwise = String::new();
            match stage.rounds {
                None | Some(Rounds(1)) => {}
                Some(Rounds(usize::MAX)) => otherwise += ", until it converges",
                Some(Rounds(rounds)) => otherwise += &format!(", at most {rounds} rounds"),
            }
            if stage.gradient == Some(Side::Sparse) {
                otherwise += ", at the sparse weights";
            }
            if stage.retain == Some(true) {
                otherwise += ", changed weights retained";
            }
            format!(
                "rebuild, scope {scope}, alpha {alpha}{otherwise}, metric {}, blocks {}",
                names(&recipe.metric),
                groups.join(", ")
            )
        }
        Some(Kind::Swap) => format!(
            "swap, scope {scope}, at most {} a row, shrinkage {}, blend {}",
            stage.limit.unwrap_or_default(),
            stage.shrinkage.unwrap_or_default(),
            recipe.streams.blend
        ),
        Some(Kind::Reconstruct) => {
            let method = match stage.method {
                Some(Values::Gradient) => "gradient",
                _ => "least squares",
            };
            format!("reconstruct by {method}: kept weights change")
        }
        None => String::new(),
    }
}
