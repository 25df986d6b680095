//! Builds the metric pipelines of a recipe with the registered plugins.

use figment::value::{Dict, Value};

use super::{
    Loaded, MetricStep, Recipe, RecipeError,
    diagnose::read_all,
    error::{Fault, Problem, alternatives, segments},
};
use crate::{nearest::nearest, prune};

impl Loaded {
    /// Builds the metric pipeline that scores weights for rebuilds.
    ///
    /// # Errors
    /// If a metric or a parameter is unknown or wrong, or if two plugins have the same name.
    pub fn pipeline(&self) -> Result<Vec<prune::MetricStep>, RecipeError> {
        pipeline(&self.recipe.metric).map_err(|problems| self.source.error(problems))
    }

    /// Builds the metric pipeline that scores weights for initial masks; it is empty unless
    /// `mask.init` is `metric`.
    ///
    /// # Errors
    /// As [`Loaded::pipeline`], and if a metric needs gradients that the recipe has not.
    pub fn initial_pipeline(&self) -> Result<Vec<prune::MetricStep>, RecipeError> {
        initial_pipeline(&self.recipe).map_err(|problems| self.source.error(problems))
    }
}

/// The pipeline that scores weights for rebuilds, or all its problems.
pub(super) fn pipeline(metric: &[MetricStep]) -> Result<Vec<prune::MetricStep>, Vec<Problem>> {
    let steps = steps("metric", metric)?;
    let of_structures = steps.iter().position(|(_, metric)| !metric.structures().is_empty());
    if let Some(i) = of_structures {
        let (name, metric) = &steps[i];
        let why = format!("`{name}` scores {}, not single weights", all_of(metric.structures()));
        let problem = Problem::at(&format!("metric.{i}.use"), Fault::Value(why));
        return Err(vec![problem.help("choose another metric, or use it in `mask.metric`")]);
    }
    Ok(steps)
}

/// The pipeline that scores weights for initial masks, or all its problems.
pub(super) fn initial_pipeline(recipe: &Recipe) -> Result<Vec<prune::MetricStep>, Vec<Problem>> {
    let mask = &recipe.mask;
    let steps = steps("mask.metric", &mask.metric)?;
    let gradient = steps.iter().position(|(_, metric)| metric.needs().squared_gradient);
    let wrong = |i: usize, why: String, help: &str| {
        let problem = Problem::at(&format!("mask.metric.{i}.use"), Fault::Value(why));
        Err(vec![problem.help(help)])
    };
    let removed = recipe.structures();
    for (i, (name, metric)) in steps.iter().enumerate().filter(|_| mask.init.metrics) {
        let scored = metric.structures();
        let help = || {
            let of: Vec<_> =
                scored.iter().map(|of| format!("sparsity.structure = {of:?}")).collect();
            format!("use it with {}, or choose another metric", of.join(" or "))
        };
        if scored.is_empty() {
            continue;
        }
        if removed.is_empty() {
            return wrong(
                i,
                format!("`{name}` scores {}, not single weights", all_of(scored)),
                &help(),
            );
        }
        if let Some((_, other)) =
            removed.iter().find(|(_, of)| !scored.contains(&of.structure.name))
        {
            let why = format!("`{name}` scores {}, not {}", all_of(scored), other.structure.many());
            return wrong(i, why, &help());
        }
    }
    match gradient.filter(|_| mask.init.metrics) {
        Some(i) if removed.is_empty() => wrong(
            i,
            format!("`{}` needs gradients of the output error", steps[i].0),
            "there is no error before there is a mask; `barber metrics` shows what each metric needs",
        ),
        Some(i) if mask.passes == 1 => wrong(
            i,
            format!(
                "`{}` needs gradients of the dense model's loss, a pass of their own",
                steps[i].0
            ),
            "set `mask.passes` to 2",
        ),
        _ => Ok(steps),
    }
}

/// Names, in words.
fn all_of(names: &[&str]) -> String {
    names.join(" and ")
}

/// Builds the steps of the pipeline at `key`.
fn steps(key: &str, steps: &[MetricStep]) -> Result<Vec<prune::MetricStep>, Vec<Problem>> {
    let plugins = barber_metric::registered().map_err(|duplicate| {
        let problem = Problem::new(Vec::new(), Fault::DuplicateMetric(duplicate));
        vec![problem.help("rename one of them, or link only one")]
    })?;
    let (mut built, mut problems) = (Vec::new(), Vec::new());
    for (i, step) in steps.iter().enumerate() {
        let table = format!("{key}.{i}");
        let at = format!("{table}.use");
        let name = step.metric.as_str();
        match plugins.get(name) {
            Some(plugin) => {
                let mut parameters = Value::from(step.parameters.clone());
                let build = |given: &Value| {
                    plugin.build(given.as_dict().map_or_else(Dict::new, Dict::clone))
                };
                let (metric, mut wrong) = read_all(&mut parameters, build);
                let help = |path: &[String]| {
                    let mut known = plugin.parameters().into_iter();
                    Some(known.find(|parameter| Some(&parameter.name) == path.first())?.help)
                };
                for problem in &mut wrong {
                    problem.help = problem.help.take().or_else(|| help(&problem.path));
                    problem.path.splice(0..0, segments(&table));
                }
                problems.extend(wrong);
                built.extend(metric.map(|metric| (name.to_owned(), metric)));
            }
            None if name.is_empty() => {
                let help = "name the step's metric; `barber metrics` lists them";
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
    if problems.is_empty() { Ok(built) } else { Err(problems) }
}
