//! The metric pipelines of a recipe: their stages, built by the registered plugins.

use super::{
    Init, Loaded, RecipeError,
    error::{Fault, Problem, alternatives, nearest},
    resolve::typed_in,
};
use crate::prune::Stage;

impl Loaded {
    /// Builds the stages of the metric pipeline that scores weights for rebuilds.
    ///
    /// # Errors
    /// If a stage names no registered metric or has parameters that the metric does not know, or
    /// if two plugins have one name.
    pub fn pipeline(&self) -> Result<Vec<Stage>, RecipeError> {
        self.stages("metric", &self.recipe.metric)
    }

    /// Builds the stages of the pipeline that scores weights for initial masks; there are none unless
    /// `mask.init` is `metric`.
    ///
    /// # Errors
    /// As [`Loaded::pipeline`], and if a metric needs gradients.
    pub fn initial_pipeline(&self) -> Result<Vec<Stage>, RecipeError> {
        let stages = self.stages("mask.metric", &self.recipe.mask.metric)?;
        let gradient = stages.iter().position(|(_, metric)| metric.needs().squared_gradient);
        match gradient.filter(|_| self.recipe.mask.init == Init::Metric) {
            None => Ok(stages),
            Some(i) => {
                let why = format!("`{}` needs gradients of an error", stages[i].0);
                let problem = Problem::at(&format!("mask.metric.{i}.use"), Fault::Value(why));
                let help = "before there is a mask, there is no error; `barber metrics` shows what \
                            metrics need";
                Err(self.source.error(vec![problem.help(help)]))
            }
        }
    }

    /// Builds the stages at a key.
    fn stages(&self, key: &str, stages: &[super::Stage]) -> Result<Vec<Stage>, RecipeError> {
        let plugins = barber_metric::registered().map_err(|duplicate| {
            let problem = Problem::new(Vec::new(), Fault::DuplicateMetric(duplicate))
                .help("rename one of them, or link only one");
            self.source.error(vec![problem])
        })?;
        let (mut built, mut problems) = (Vec::new(), Vec::new());
        for (i, stage) in stages.iter().enumerate() {
            let table = format!("{key}.{i}");
            let at = format!("{table}.use");
            let name = stage.metric.as_str();
            match plugins.get(name) {
                Some(plugin) => match plugin.build(stage.parameters.clone()) {
                    Ok(metric) => built.push((name.to_owned(), metric)),
                    Err(error) => problems.extend(typed_in(&table, error)),
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
        if problems.is_empty() { Ok(built) } else { Err(self.source.error(problems)) }
    }
}
