//! Descriptions of a recipe's settings.

use super::{MetricStep, Recipe};
use crate::prune::stage::Described;

/// The names of a pipeline's metrics.
fn names(pipeline: &[MetricStep]) -> String {
    pipeline.iter().map(|step| step.metric.as_str()).collect::<Vec<_>>().join(" · ")
}

/// The initial masks, in a line.
pub(crate) fn init(recipe: &Recipe) -> String {
    let init = recipe.mask.init;
    if init.metrics {
        format!("{init} {}", names(&recipe.mask.metric))
    } else if init.zeros {
        let name = recipe.model.path.file_name().unwrap_or_default();
        let values = if recipe.mask.retain { "the zeros and values" } else { "the zeros" };
        format!("{values} of {}", name.to_string_lossy())
    } else {
        init.to_string()
    }
}

/// The stages of the refinement of these groups, one line each.
pub(crate) fn stages(recipe: &Recipe, groups: &[&str]) -> Vec<String> {
    let metrics = &names(&recipe.metric);
    let structures = !recipe.structures().is_empty();
    let described = Described { metrics, groups, blend: recipe.streams.blend, structures };
    recipe.refine.iter().map(|stage| stage.describe(&described)).collect()
}
