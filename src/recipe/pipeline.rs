//! The metric pipeline of a recipe: its stages, built by the registered plugins.

use super::{
    Loaded, RecipeError,
    error::{Fault, Problem, alternatives, nearest},
    resolve::typed_in,
};
use crate::prune::Stage;

impl Loaded {
    /// Builds the stages of the metric pipeline.
    ///
    /// # Errors
    /// If a stage names no registered metric or has parameters that the metric does not know, or
    /// if two plugins have one name.
    pub fn pipeline(&self) -> Result<Vec<Stage>, RecipeError> {
        let plugins = barber_metric::registered().map_err(|duplicate| {
            let problem = Problem::new(Vec::new(), Fault::DuplicateMetric(duplicate))
                .help("rename one of them, or link only one");
            self.source.error(vec![problem])
        })?;
        let (mut stages, mut problems) = (Vec::new(), Vec::new());
        for (i, stage) in self.recipe.metric.iter().enumerate() {
            let at = format!("metric.{i}.use");
            let name = stage.metric.as_str();
            match plugins.get(name) {
                Some(plugin) => match plugin.build(stage.parameters.clone()) {
                    Ok(metric) => stages.push((name.to_owned(), metric)),
                    Err(error) => problems.extend(typed_in(i, error)),
                },
                None if name.is_empty() => {
                    let help = "name the stage's metric; `barber metrics` lists them";
                    problems.push(Problem::at(&at, Fault::Missing).help(help));
                }
                None => {
                    let near = nearest(name, plugins.keys().copied());
                    let near = near.map(|near| format!("did you mean `{near}`? "));
                    let known = alternatives(plugins.keys().copied());
                    let help = format!("{}registered: {known}", near.unwrap_or_default());
                    let fault = Fault::UnknownMetric { name: name.into() };
                    problems.push(Problem::at(&at, fault).help(help));
                }
            }
        }
        if problems.is_empty() { Ok(stages) } else { Err(self.source.error(problems)) }
    }
}
