//! The properties that every metric must have.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

use super::{
    Found,
    case::{Case, columns, rows},
};
use crate::{Error, LayerStats, Metric, MetricPlugin, Needs, figment::value::Dict};

/// A property of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// The metric is submitted under its name, it and its parameters are documented, and unknown
    /// parameters are errors.
    Registration,
    /// The metric scores matrices of every shape, including those without rows or columns.
    Shape,
    /// Scores of finite numbers are finite: of zeros, and of numbers as large and as small as they
    /// Scores of finite numbers are finite: of zeros, and of the largest and smallest numbers in a
    /// model that f32 can run (weights and inputs up to 1e9, statistics up to their squares).
    Finiteness,
    /// The same matrix gets the same bits: after other matrices, in other threads, and from another
    /// instance with the same parameters.
    Determinism,
    /// The metric reads no undeclared statistic, and declares none that has no influence.
    Needs,
    /// Of a metric that scores structures: in another order they have the same scores.
    Permutation,
    /// A change of the matrix changes the scores as the [`Symmetry`] says.
    Symmetry(Symmetry),
}

/// A change of a matrix with a known effect on the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Symmetry {
    /// Permuted rows have permuted scores.
    Rows,
    /// Permuted columns, with their statistics, have permuted scores.
    Columns,
    /// Negated weights have the same scores.
    Signs,
    /// Weights scaled by a positive number have scores in the same order.
    Scale,
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registration => "registration",
            Self::Shape => "shape",
            Self::Finiteness => "finiteness",
            Self::Determinism => "determinism",
            Self::Needs => "declared needs",
            Self::Permutation => "order of structures",
            Self::Symmetry(Symmetry::Rows) => "symmetry of rows",
            Self::Symmetry(Symmetry::Columns) => "symmetry of columns",
            Self::Symmetry(Symmetry::Signs) => "symmetry of signs",
            Self::Symmetry(Symmetry::Scale) => "symmetry of scale",
        })
    }
}

/// The scores of a case.
fn score(metric: &dyn Metric, case: &Case) -> Result<Vec<f32>, String> {
    score_with(metric, case, &case.stats(metric.needs()))
}

fn score_with(
    metric: &dyn Metric,
    case: &Case,
    stats: &LayerStats<'_>,
) -> Result<Vec<f32>, String> {
    let mut scores = case.scores.clone();
    guarded(|| metric.score(stats, &mut scores))?;
    Ok(scores)
}

/// Runs a metric; its errors and panics in words.
pub(super) fn guarded(run: impl FnOnce() -> Result<(), Error>) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Error::Undeclared(name))) => {
            Err(format!("it reads `{name}`, but does not declare it"))
        }
        Ok(Err(error)) => Err(format!("it fails: {error}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("it panics: {}", text.unwrap_or_default()))
        }
    }
}

/// Checks how a metric is registered.
pub(super) fn unregistered(plugin: &MetricPlugin) -> Option<String> {
    if plugin.help.trim().is_empty() || plugin.help.contains('\n') {
        return Some("its help is not one line".into());
    }
    let silent = plugin.parameters().into_iter().find(|parameter| parameter.help.is_empty());
    if let Some(parameter) = silent {
        return Some(format!("its parameter `{}` has no documentation", parameter.name));
    }
    let unknown = Dict::from([("no-parameter-of-this-name".into(), 1.into())]);
    let accepted = plugin.build(unknown).is_ok();
    accepted.then(|| "unknown parameters are no errors; `#[serde(deny_unknown_fields)]`".into())
}

pub(super) fn shape(metric: &dyn Metric, case: &Case) -> Result<(), String> {
    score(metric, case).map(drop)
}

pub(super) fn finiteness(metric: &dyn Metric, case: &Case) -> Result<(), String> {
    let scores = score(metric, case)?;
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(()),
        Some(i) => Err(format!("the score {} is {}", place(case, i), scores[i])),
    }
}

pub(super) fn determinism(
    metric: &dyn Metric,
    build: &dyn Fn() -> Option<Box<dyn Metric>>,
    case: &Case,
) -> Result<(), String> {
    let first = score(metric, case)?;
    let same = |scores: Result<Vec<f32>, String>, when: &str| {
        let scores = scores?;
        match first.iter().zip(&scores).position(|(a, b)| a.to_bits() != b.to_bits()) {
            None => Ok(()),
            Some(i) => {
                let [a, b] = [first[i], scores[i]];
                Err(format!("the score {} is {a} at first and {b} {when}", place(case, i)))
            }
        }
    };
    same(score(metric, case), "again")?;
    let order: Vec<usize> = (0..case.dims.rows).rev().collect();
    score(metric, &case.rows(&order))?;
    same(score(metric, case), "after another matrix")?;
    let threads = thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| score(metric, case)));
        threads.map(|thread| thread.join().unwrap_or_else(|_| Err("it panics".into())))
    });
    threads.into_iter().try_for_each(|scores| same(scores, "in another thread"))?;
    build().map_or(Ok(()), |other| same(score(other.as_ref(), case), "by another instance"))
}

/// The statistics, by their names.
const STATISTICS: [(&str, Needs); 4] = [
    ("squared_gradient", Needs::SQUARED_GRADIENT),
    ("input_square", Needs::INPUT_SQUARE),
    ("input_variance", Needs::INPUT_VARIANCE),
    ("gram", Needs::GRAM),
];

/// Checks that poison in undeclared statistics has no effect.
pub(super) fn reads_no_other(metric: &dyn Metric, case: &Case) -> Result<(), String> {
    let needs = metric.needs();
    let without = score(metric, case)?;
    let poison = vec![f32::NAN; case.gram.len().max(case.weight.len())];
    for (name, one) in STATISTICS.into_iter().filter(|(_, one)| needs.or(*one) != needs) {
        let poisoned = |this: bool, like: &[f32]| this.then_some(&poison[..like.len()]);
        let stats = case.stats(needs);
        let stats = LayerStats {
            squared_gradient: poisoned(one.squared_gradient, &case.squared_gradient)
                .or(stats.squared_gradient),
            input_square: poisoned(one.input_square, &case.input_square).or(stats.input_square),
            input_variance: poisoned(one.input_variance, &case.input_variance)
                .or(stats.input_variance),
            gram: poisoned(one.gram, &case.gram).or(stats.gram),
            ..stats
        };
        let with = score_with(metric, case, &stats)?;
        if with.iter().zip(&without).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Err(format!("it reads `{name}`, but does not declare it"));
        }
    }
    Ok(())
}

/// Finds declared statistics that have no influence on any case.
pub(super) fn reads_none_of(metric: &dyn Metric, cases: &[Case]) -> Found {
    let needs = metric.needs();
    let declared = STATISTICS.into_iter().filter(|(_, one)| needs.or(*one) == needs);
    for (name, one) in declared {
        let influence = cases.iter().any(|case| {
            let mut other = case.clone();
            let columns = case.dims.columns.max(1);
            // Unlike in each column: a metric may look at ratios alone.
            let factor = |j: usize| (2 + j % columns) as f32;
            if one.squared_gradient {
                let values = other.squared_gradient.iter_mut().enumerate();
                values.for_each(|(i, value)| *value *= (2 + i) as f32);
            }
            if one.input_square {
                let values = other.input_square.iter_mut().enumerate();
                values.for_each(|(j, value)| *value *= factor(j));
            }
            if one.input_variance {
                let values = other.input_variance.iter_mut().enumerate();
                values.for_each(|(j, value)| *value *= factor(j));
            }
            if one.gram {
                let values = other.gram.iter_mut().enumerate();
                values.for_each(|(i, value)| *value *= factor(i) * factor(i / columns));
            }
            score(metric, case) != score(metric, &other)
        });
        if !influence {
            let reason = format!("it declares `{name}`, which has no influence on its scores");
            return Some((reason, None));
        }
    }
    None
}

pub(super) fn symmetry(metric: &dyn Metric, case: &Case, symmetry: Symmetry) -> Result<(), String> {
    let scores = score(metric, case)?;
    let dims = case.dims;
    let (changed, expected) = match symmetry {
        Symmetry::Rows => {
            let order = case.order(dims.rows);
            (case.rows(&order), rows(&scores, dims, &order))
        }
        Symmetry::Columns => {
            let order = case.order(dims.columns);
            (case.columns(&order), columns(&scores, dims, &order))
        }
        Symmetry::Signs => {
            let mut changed = case.clone();
            let chosen =
                changed.weight.iter_mut().zip(&case.choices).filter(|(_, chosen)| **chosen);
            chosen.for_each(|(weight, _)| *weight = -*weight);
            (changed, scores)
        }
        Symmetry::Scale => return scale(metric, case, &scores),
    };
    let found = score(metric, &changed)?;
    match found.iter().zip(&expected).position(|(a, b)| !close(*a, *b)) {
        None => Ok(()),
        Some(i) => {
            let after = match symmetry {
                Symmetry::Rows => format!("with the rows {:?}", case.order(dims.rows)),
                Symmetry::Columns => format!("with the columns {:?}", case.order(dims.columns)),
                _ => format!("with the weights {:?}", changed.weight),
            };
            let [found, expected] = [found[i], expected[i]];
            Err(format!("{after} the score {} is {found}, not {expected}", place(case, i)))
        }
    }
}

fn scale(metric: &dyn Metric, case: &Case, scores: &[f32]) -> Result<(), String> {
    let factor = if case.choices[0] { 8.0 } else { 0.125 };
    let mut changed = case.clone();
    changed.weight.iter_mut().for_each(|weight| *weight *= factor);
    let found = score(metric, &changed)?;
    for i in 0..scores.len() {
        for j in 0..scores.len() {
            let below = |of: &[f32]| of[i] < of[j] && !close(of[i], of[j]);
            let above = |of: &[f32]| of[i] > of[j] && !close(of[i], of[j]);
            if below(scores) && above(&found) {
                let [i, j] = [i, j].map(|i| place(case, i));
                return Err(format!(
                    "with {factor} times the weights the score {i} is above that {j}"
                ));
            }
        }
    }
    Ok(())
}

/// Equal up to rounding. Two NaNs are equal: the finiteness check rejects them.
pub(super) fn close(a: f32, b: f32) -> bool {
    a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-4 * a.abs().max(b.abs()) + 1e-30
}

fn place(case: &Case, i: usize) -> String {
    let columns = case.dims.columns;
    format!("at row {}, column {}", i / columns, i % columns)
}
