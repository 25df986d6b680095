//! Several runs side by side: as data, and as a page.

mod page;
mod swept;

use serde::Serialize;

pub(super) use self::page::page;
use super::{
    Report, TaskReport, TextReport,
    figure::{bytes, change, duration, number, percent},
    names,
};

/// A run and its name among those that it is compared with.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// What it is called.
    pub name: String,
    /// What it did.
    pub report: Report,
}

impl Run {
    /// Runs by their paths; of each, as much is its name as tells it from the others.
    pub fn named(runs: Vec<(String, Report)>) -> Vec<Self> {
        let paths: Vec<String> = runs.iter().map(|(path, _)| path.clone()).collect();
        let names = names::short(&paths, '/').into_iter();
        names.zip(runs).map(|(name, (_, report))| Self { name, report }).collect()
    }
}

/// Runs side by side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The names of the runs: the rows.
    pub runs: Vec<String>,
    /// The figures that are compared.
    pub figures: Vec<Figure>,
    /// What the recipes do not have in common.
    pub settings: Vec<Difference>,
}

/// A figure of each run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// Its kind.
    #[serde(flatten)]
    pub kind: Kind,
    /// Of the dense model, if all runs have the same.
    pub dense: Option<f64>,
    /// Of each run that has it.
    pub values: Vec<Option<f64>>,
}

/// What a figure is measured in, and what is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "unit", rename_all = "kebab-case")]
pub enum Kind {
    /// A share of the weights; neither more nor less is good.
    Sparsity,
    /// A perplexity: the lower the better.
    Perplexity,
    /// A share of right answers: the higher the better.
    Accuracy,
    /// A factor by which the refinement changed errors; runs may have different ones to begin with.
    Factor,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
}

/// A key of the recipe that does not have one value in all runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The key.
    pub key: String,
    /// Its value in each run that has one.
    pub values: Vec<Option<String>>,
}

impl Kind {
    /// A value as it is shown.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Sparsity | Self::Accuracy => percent(value),
            Self::Perplexity => number(value),
            Self::Factor => change(1.0, value),
            Self::Seconds => duration(value),
            Self::Bytes => bytes(value as u64),
        }
    }
}

impl Figure {
    /// The run with the best value, where one is better than the others.
    pub fn best(&self) -> Option<usize> {
        let key = |value: f64| match self.kind {
            Kind::Perplexity => Some(value),
            Kind::Accuracy => Some(-value),
            _ => None,
        };
        let values = self.values.iter().enumerate();
        let values = values.filter_map(|(run, value)| Some((run, key((*value)?)?)));
        let values: Vec<_> = values.filter(|(_, value)| value.is_finite()).collect();
        let (best, least) = values.iter().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let alone = values.iter().filter(|(_, value)| value == least).count() == 1;
        (values.len() > 1 && alone).then_some(*best)
    }
}

impl Comparison {
    /// Compares runs. The figures are those that any run has; a text or a task is the same in two
    /// runs if it has the same name.
    pub fn of(runs: &[Run]) -> Self {
        let figure = |name: &str, kind, of: &dyn Fn(&Report) -> Option<f64>| {
            let values: Vec<_> = runs.iter().map(|run| of(&run.report)).collect();
            let any = values.iter().any(Option::is_some);
            any.then(|| Figure { name: name.into(), kind, dense: None, values })
        };
        let pruned = [
            figure("pruned", Kind::Sparsity, &|report| Some(report.sparsity())),
            figure("pruned of the whole model", Kind::Sparsity, &Report::model_sparsity),
        ];
        let written = |report: &Report| {
            Some(report.sizes.output.weight_bytes as f64).filter(|size| *size > 0.0)
        };
        let taken = [
            figure("output error", Kind::Factor, &|report| {
                Some(report.output_error.as_ref()?.mean)
            }),
            figure("worst output error", Kind::Factor, &|report| {
                Some(report.output_error.as_ref()?.worst)
            }),
            figure("time", Kind::Seconds, &|report| Some(report.total_seconds())),
            figure("peak memory", Kind::Bytes, &|report| Some(report.peak_memory()? as f64)),
            figure("weights on disk", Kind::Bytes, &written),
        ];
        let measured = Self::texts(runs).into_iter().chain(Self::tasks(runs));
        let figures = pruned.into_iter().chain(measured.map(Some)).chain(taken).flatten().collect();
        let names = runs.iter().map(|run| run.name.clone()).collect();
        Self { runs: names, figures, settings: Self::settings(runs) }
    }

    fn texts(runs: &[Run]) -> Vec<Figure> {
        let texts = |run: &'_ Run| {
            run.report.perplexity.iter().map(|of| of.text.clone()).collect::<Vec<_>>()
        };
        let all = distinct(runs.iter().flat_map(texts));
        let short = names::short(&all, '/');
        let figure = |(text, name): (String, String)| {
            let find = |run: &Run| run.report.perplexity.iter().find(|of| of.text == text).cloned();
            let dense = |of: &TextReport| of.found.dense.perplexity;
            let last = |of: &TextReport| of.found.last().perplexity;
            Figure::of(runs, name, Kind::Perplexity, &find, dense, last)
        };
        all.into_iter().zip(short).map(figure).collect()
    }

    fn tasks(runs: &[Run]) -> Vec<Figure> {
        let all = runs.iter().flat_map(|run| run.report.tasks.iter().map(|of| of.task.clone()));
        let figure = |task: String| {
            let find = |run: &Run| run.report.tasks.iter().find(|of| of.task == task).cloned();
            let dense = |of: &TaskReport| of.found.dense.acc;
            let last = |of: &TaskReport| of.found.last().acc;
            Figure::of(runs, task.clone(), Kind::Accuracy, &find, dense, last)
        };
        distinct(all).into_iter().map(figure).collect()
    }

    /// The keys whose values are not the same in all runs; but for where the outputs are.
    fn settings(runs: &[Run]) -> Vec<Difference> {
        let keys = distinct(runs.iter().flat_map(|run| {
            run.report.recipe.iter().map(|setting| setting.key.clone()).collect::<Vec<_>>()
        }));
        let mut differences = Vec::new();
        for key in keys.into_iter().filter(|key| key != "output.path") {
            let value = |run: &Run| {
                let of = run.report.recipe.iter().find(|setting| setting.key == key);
                of.map(|setting| setting.value.clone())
            };
            let values: Vec<_> = runs.iter().map(value).collect();
            if values.iter().any(|value| *value != values[0]) {
                differences.push(Difference { key, values });
            }
        }
        differences
    }
}

impl Figure {
    /// What was measured of the runs that `find` finds it in.
    fn of<T>(
        runs: &[Run],
        name: String,
        kind: Kind,
        find: &dyn Fn(&Run) -> Option<T>,
        dense: fn(&T) -> f64,
        last: fn(&T) -> f64,
    ) -> Self {
        let found: Vec<_> = runs.iter().map(find).collect();
        let mut dense = found.iter().flatten().map(dense);
        let first = dense.next();
        let same = dense.all(|value| Some(value) == first);
        let values = found.iter().map(|of| of.as_ref().map(last)).collect();
        Self { name, kind, dense: first.filter(|_| same), values }
    }
}

/// Values, each once, in the order in which they come first.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        evaluate::Perplexity,
        recipe::Setting,
        report::{Size, Sizes, Stages},
    };

    fn run(path: &str, dense: f64, refined: f64, alpha: &str) -> (String, Report) {
        let found = |perplexity: f64| Perplexity {
            perplexity,
            cross_entropy: 0.0,
            predictions: 1,
            segments: 1,
        };
        let text = TextReport {
            text: "data/test.txt".into(),
            found: Stages { dense: found(dense), initial: None, refined: Some(found(refined)) },
        };
        let setting = |key: &str, value: &str| Setting {
            key: key.into(),
            value: value.into(),
            source: "default".into(),
        };
        let report = Report {
            perplexity: vec![text],
            sizes: Sizes {
                output: Size { weight_bytes: 4, directory_bytes: 5 },
                ..Sizes::default()
            },
            prunable_weights: 4,
            pruned_weights: 1,
            recipe: vec![setting("output.path", path), setting("refine.0.alpha", alpha)],
            ..Report::default()
        };
        (path.into(), report)
    }

    #[test]
    fn the_best_is_named_and_differences_are_found() {
        let runs = vec![run("out/a", 2.0, 3.0, "0.1"), run("out/b", 2.0, 2.5, "0.2")];
        let found = Comparison::of(&Run::named(runs.clone()));
        assert_eq!(found.runs, ["a", "b"]);
        let names: Vec<_> = found.figures.iter().map(|figure| figure.name.as_str()).collect();
        assert_eq!(names, ["pruned", "test.txt", "time", "weights on disk"]);
        let [pruned, perplexity, ..] = &found.figures[..] else { panic!("{names:?}") };
        assert_eq!((pruned.best(), perplexity.best()), (None, Some(1)));
        assert_eq!((pruned.dense, perplexity.dense), (None, Some(2.0)));
        assert_eq!(perplexity.values, [Some(3.0), Some(2.5)]);
        let [alpha] = &found.settings[..] else { panic!("{:?}", found.settings) };
        assert_eq!(alpha.key, "refine.0.alpha");
        assert_eq!(alpha.values, [Some("0.1".into()), Some("0.2".into())]);

        // Another dense model, and no number.
        let runs = [&runs[..], &[run("out/c", 2.1, f64::NAN, "0.2")]].concat();
        let found = Comparison::of(&Run::named(runs));
        assert_eq!((found.figures[1].dense, found.figures[1].best()), (None, Some(1)));
        // Of equals none is the best.
        let runs = vec![run("a", 2.0, 3.0, "0.1"), run("b", 2.0, 3.0, "0.1")];
        let found = Comparison::of(&Run::named(runs));
        assert_eq!((found.figures[1].best(), found.settings.len()), (None, 0));
        assert!(Comparison::of(&[]).figures.is_empty());
    }
}
