//! What a recipe does, in words.

use super::{Init, Kind, Recipe, Refine, Scope, Share, Stage};
use crate::prune::Alpha;

/// The metrics of a pipeline.
fn names(pipeline: &[Stage]) -> String {
    pipeline.iter().map(|stage| stage.metric.as_str()).collect::<Vec<_>>().join(" · ")
}

/// How initial masks are made.
pub(crate) fn init(recipe: &Recipe) -> String {
    match recipe.mask.init {
        Init::Metric => format!("metric {}", names(&recipe.mask.metric)),
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
            format!(
                "rebuild, scope {scope}, alpha {alpha}, metric {}, blocks {}",
                names(&recipe.metric),
                groups.join(", ")
            )
        }
        Some(Kind::Swap) => {
            let limit = stage.limit.unwrap_or_default();
            format!("swap, scope {scope}, at most {limit} a row, blend {}", recipe.streams.blend)
        }
        Some(Kind::Reconstruct) => "reconstruct: kept weights change".into(),
        None => String::new(),
    }
}
