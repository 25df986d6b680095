//! Several runs side by side: as data, and as a page.

mod page;
mod swept;

use serde::Serialize;

pub(super) use self::page::page;
use super::{
    Report, Stages,
    figure::{bytes, change, duration, number, percent, uncertain},
    names,
};
use crate::evaluate::{Accuracy, Perplexity};

/// A run, with a name that is unique in a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Name of the run.
    pub name: String,
    /// Report of the run.
    pub report: Report,
}

impl Run {
    /// Names each run by the shortest part of its path that is unique.
    pub fn named(runs: Vec<(String, Report)>) -> Vec<Self> {
        let paths: Vec<String> = runs.iter().map(|(path, _)| path.clone()).collect();
        let names = names::short(&paths, '/').into_iter();
        names.zip(runs).map(|(name, (_, report))| Self { name, report }).collect()
    }
}

/// The figures and settings of several runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Names of the runs.
    pub runs: Vec<String>,
    /// Compared figures.
    pub figures: Vec<Figure>,
    /// Recipe keys whose values differ.
    pub settings: Vec<Difference>,
}

/// One figure for every run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Name of the figure.
    pub name: String,
    /// Unit, and which direction is better.
    #[serde(flatten)]
    pub kind: Kind,
    /// Value of the dense model, if it is the same in all runs.
    pub dense: Option<f64>,
    /// Standard error of `dense`, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_stderr: Option<f64>,
    /// Value of each run; `None` if the run lacks it.
    pub values: Vec<Option<f64>>,
    /// Standard error of each value, if known.
    pub stderrs: Vec<Option<f64>>,
    /// Index of the run that is better than every other, significantly so if standard errors are
    /// known.
    pub best: Option<usize>,
}

/// A result on a text or a task.
trait Measured {
    /// The compared value and its standard error.
    fn figure(&self) -> (f64, Option<f64>);
    /// Whether the difference to `other` is significant.
    fn differs(&self, other: &Self) -> bool;
}

impl Measured for Perplexity {
    fn figure(&self) -> (f64, Option<f64>) {
        (self.perplexity, self.perplexity_stderr)
    }

    fn differs(&self, other: &Self) -> bool {
        self.differs(other)
    }
}

impl Measured for Accuracy {
    fn figure(&self) -> (f64, Option<f64>) {
        (self.acc, Some(self.acc_stderr))
    }

    fn differs(&self, other: &Self) -> bool {
        self.differs(other)
    }
}

/// The unit of a figure, and which direction is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "unit", rename_all = "kebab-case")]
pub enum Kind {
    /// Fraction of the weights; neither direction is better.
    Sparsity,
    /// Perplexity; lower is better.
    Perplexity,
    /// Fraction of correct answers; higher is better.
    Accuracy,
    /// Ratio of the errors after and before the refinement; runs with different initial errors are
    /// not comparable.
    Factor,
    /// Seconds; lower is better.
    Seconds,
    /// Bytes; lower is better.
    Bytes,
}

/// A recipe key whose value differs between runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Name of the key.
    pub key: String,
    /// Value in each run; `None` if the run lacks the key.
    pub values: Vec<Option<String>>,
}

impl Kind {
    /// Formats a value for display.
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
    /// A figure without standard errors.
    fn plain(name: &str, kind: Kind, values: Vec<Option<f64>>) -> Self {
        let stderrs = vec![None; values.len()];
        let (dense, dense_stderr) = (None, None);
        Self { name: name.into(), kind, dense, dense_stderr, values, stderrs, best: None }
    }

    /// The figure of the results that `find` returns for the runs.
    fn of<T: Measured>(
        runs: &[Run],
        name: String,
        kind: Kind,
        find: impl Fn(&Run) -> Option<&Stages<T>>,
    ) -> Self {
        let found: Vec<_> = runs.iter().map(find).collect();
        let mut dense = found.iter().flatten().map(|of| of.dense.figure());
        let first = dense.next();
        let same = dense.all(|(value, _)| first.is_some_and(|(first, _)| value == first));
        let last: Vec<_> = found.iter().map(|of| of.map(Stages::last)).collect();
        let figures = || last.iter().map(|of| of.map(Measured::figure));
        Self {
            name,
            kind,
            dense: first.filter(|_| same).map(|(value, _)| value),
            dense_stderr: first.filter(|_| same).and_then(|(_, error)| error),
            values: figures().map(|of| Some(of?.0)).collect(),
            stderrs: figures().map(|of| of?.1).collect(),
            best: best(kind, &last),
        }
    }

    /// Value of a run, formatted for display.
    pub fn show(&self, run: usize) -> Option<String> {
        Some(self.shown(self.values[run]?, self.stderrs[run]))
    }

    /// Value of the dense model, formatted for display.
    pub fn show_dense(&self) -> Option<String> {
        Some(self.shown(self.dense?, self.dense_stderr))
    }

    fn shown(&self, value: f64, error: Option<f64>) -> String {
        match (self.kind, error) {
            (Kind::Accuracy, Some(error)) => format!("{} ± {:.2}", percent(value), 100.0 * error),
            (Kind::Perplexity, error) => uncertain(value, error),
            (kind, _) => kind.show(value),
        }
    }
}

/// Index of the best result, if it is significantly better than each of the others.
fn best<T: Measured>(kind: Kind, all: &[Option<&T>]) -> Option<usize> {
    // Smaller keys are better.
    let key = |of: &T| match kind {
        Kind::Accuracy => -of.figure().0,
        _ => of.figure().0,
    };
    let all = all.iter().enumerate().filter_map(|(run, of)| Some((run, (*of)?)));
    let all: Vec<_> = all.filter(|(_, of)| key(of).is_finite()).collect();
    let (best, of) = all.iter().min_by(|(_, a), (_, b)| key(a).total_cmp(&key(b)))?;
    let mut others = all.iter().filter(|(run, _)| run != best);
    (all.len() > 1 && others.all(|(_, other)| of.differs(other))).then_some(*best)
}

impl Comparison {
    /// Compares runs by every figure that at least one of them has. Texts and tasks match by name.
    pub fn of(runs: &[Run]) -> Self {
        let figure = |name: &str, kind, of: &dyn Fn(&Report) -> Option<f64>| {
            let values: Vec<_> = runs.iter().map(|run| of(&run.report)).collect();
            let any = values.iter().any(Option::is_some);
            any.then(|| Figure::plain(name, kind, values))
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
            Figure::of(runs, name, Kind::Perplexity, |run| {
                let of = run.report.perplexity.iter().find(|of| of.text == text);
                of.map(|of| &of.found)
            })
        };
        all.into_iter().zip(short).map(figure).collect()
    }

    fn tasks(runs: &[Run]) -> Vec<Figure> {
        let all = runs.iter().flat_map(|run| run.report.tasks.iter().map(|of| of.task.clone()));
        let figure = |task: String| {
            Figure::of(runs, task.clone(), Kind::Accuracy, |run| {
                let of = run.report.tasks.iter().find(|of| of.task == task);
                of.map(|of| &of.found)
            })
        };
        distinct(all).into_iter().map(figure).collect()
    }

    /// Recipe keys whose values differ between runs, except the output path.
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

/// Distinct values, in the order of their first occurrence.
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
        evaluate::Loss,
        recipe::Setting,
        report::{Size, Sizes, TextReport},
    };

    fn run(path: &str, dense: f64, refined: f64, alpha: &str) -> (String, Report) {
        let found = |perplexity: f64| Perplexity { perplexity, ..Perplexity::default() };
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
        assert_eq!((pruned.best, perplexity.best), (None, Some(1)));
        assert_eq!((pruned.dense, perplexity.dense), (None, Some(2.0)));
        assert_eq!(perplexity.values, [Some(3.0), Some(2.5)]);
        let [alpha] = &found.settings[..] else { panic!("{:?}", found.settings) };
        assert_eq!(alpha.key, "refine.0.alpha");
        assert_eq!(alpha.values, [Some("0.1".into()), Some("0.2".into())]);

        // Another dense model, and no number.
        let runs = [&runs[..], &[run("out/c", 2.1, f64::NAN, "0.2")]].concat();
        let found = Comparison::of(&Run::named(runs));
        assert_eq!((found.figures[1].dense, found.figures[1].best), (None, Some(1)));
        // Of equals none is the best.
        let runs = vec![run("a", 2.0, 3.0, "0.1"), run("b", 2.0, 3.0, "0.1")];
        let found = Comparison::of(&Run::named(runs));
        assert_eq!((found.figures[1].best, found.settings.len()), (None, 0));
        assert!(Comparison::of(&[]).figures.is_empty());
    }

    #[test]
    fn nothing_is_best_by_chance() {
        let with = |(path, mut report): (String, Report), nats: [f64; 4]| {
            let losses = nats.map(|nats| Loss { nats, predictions: 10 });
            report.perplexity[0].found.refined.as_mut().unwrap().losses = losses.into();
            (path, report)
        };
        let best = |runs: Vec<(String, Report)>| Comparison::of(&Run::named(runs)).figures[1].best;
        let of = |path: &str, nats: [f64; 4]| with(run(path, 2.0, nats[0] / 10.0, "0.1"), nats);
        // Segments differ by far more than the two runs do, but these differ in each alike.
        let one = of("a", [10.0, 20.0, 30.0, 40.0]);
        assert_eq!(best(vec![one.clone(), of("b", [11.0, 21.1, 31.0, 41.1])]), Some(0));
        assert_eq!(best(vec![one.clone(), of("b", [12.0, 21.0, 29.0, 42.0])]), None);
        // Of three the best must be better than both.
        let third = of("c", [12.0, 22.1, 32.0, 42.1]);
        assert_eq!(
            best(vec![one.clone(), of("b", [11.0, 21.1, 31.0, 41.1]), third.clone()]),
            Some(0)
        );
        assert_eq!(best(vec![one, of("b", [12.0, 21.0, 29.0, 42.0]), third]), None);
    }
}
