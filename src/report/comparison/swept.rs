//! Finds the number that a sweep varies.

use super::{Comparison, Kind, distinct};
use crate::report::names;

/// Runs along an axis: the runs of a series have the same recipe except for one number.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Swept {
    /// Name of the number: a recipe key, or the pruned fraction.
    pub(super) name: String,
    /// Whether it is a fraction of the weights.
    pub(super) fraction: bool,
    /// Value of each run.
    pub(super) values: Vec<f64>,
    /// Series, each with a name that is unique and its runs, sorted by value.
    pub(super) series: Vec<(String, Vec<usize>)>,
}

impl Swept {
    /// The recipe key with the most distinct numbers; without one, the pruned fraction. `None` if
    /// no number differs between runs whose other settings are equal.
    pub(super) fn of(comparison: &Comparison) -> Option<Self> {
        let keys = comparison.settings.iter().filter(|of| !of.key.ends_with("seed"));
        let of_keys = keys.filter_map(|of| {
            let number = |value: &Option<String>| {
                value.as_ref()?.parse().ok().filter(|x: &f64| x.is_finite())
            };
            let values: Option<Vec<f64>> = of.values.iter().map(number).collect();
            Self::along(comparison, of.key.clone(), of.key == "sparsity.ratio", values?, |key| {
                key == of.key
            })
        });
        let pruned = comparison.figures.iter().find(|of| of.kind == Kind::Sparsity);
        let of_fractions = || {
            let values: Option<Vec<f64>> = pruned?.values.iter().copied().collect();
            Self::along(comparison, "pruned".into(), true, values?, |key| {
                key.starts_with("sparsity.")
            })
        };
        // The first of equally many.
        of_keys
            .reduce(|best, other| if other.count() > best.count() { other } else { best })
            .or_else(of_fractions)
    }

    /// Number of distinct values.
    fn count(&self) -> usize {
        distinct(self.values.iter().map(f64::to_string)).len()
    }

    /// Groups runs by their other settings; `is_part` says which keys belong to the swept number.
    fn along(
        comparison: &Comparison,
        name: String,
        fraction: bool,
        values: Vec<f64>,
        is_part: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        let others: Vec<_> = comparison.settings.iter().filter(|of| !is_part(&of.key)).collect();
        let runs = 0..values.len();
        // The fewest keys that tell the series apart.
        let mut telling: Vec<usize> = Vec::new();
        let mut series: Vec<Vec<usize>> = vec![runs.collect()];
        for (key, of) in others.iter().enumerate() {
            let split: Vec<Vec<usize>> = series
                .iter()
                .flat_map(|runs| {
                    let found = distinct(runs.iter().map(|run| of.values[*run].clone()));
                    let with = |value| {
                        runs.iter().copied().filter(|run| of.values[*run] == value).collect()
                    };
                    found.into_iter().map(with).collect::<Vec<_>>()
                })
                .collect();
            if split.len() > series.len() {
                telling.push(key);
                series = split;
            }
        }
        let runs_along =
            |runs: &Vec<usize>| distinct(runs.iter().map(|run| values[*run].to_string())).len();
        if !series.iter().any(|runs| runs_along(runs) > 1) {
            return None;
        }
        let keys: Vec<String> = telling.iter().map(|key| others[*key].key.clone()).collect();
        let keys = names::short(&keys, '.');
        let named = |mut runs: Vec<usize>| {
            let said = telling.iter().zip(&keys).map(|(key, name)| {
                let value = others[*key].values[runs[0]].as_deref().unwrap_or("–");
                format!("{name} {}", value.trim_matches('"'))
            });
            let said = said.collect::<Vec<_>>().join(", ");
            runs.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
            (if said.is_empty() { "pruned".into() } else { said }, runs)
        };
        let series = series.into_iter().map(named).collect();
        Some(Self { name, fraction, values, series })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Difference, Figure};

    fn comparison(pruned: &[f64], settings: &[(&str, &[&str])]) -> Comparison {
        let difference = |(key, values): &(&str, &[&str])| Difference {
            key: (*key).into(),
            values: values.iter().map(|value| Some((*value).into())).collect(),
        };
        Comparison {
            runs: pruned.iter().map(f64::to_string).collect(),
            figures: vec![Figure::plain(
                "pruned",
                Kind::Sparsity,
                pruned.iter().copied().map(Some).collect(),
            )],
            settings: settings.iter().map(difference).collect(),
        }
    }

    fn swept(pruned: &[f64], settings: &[(&str, &[&str])]) -> Option<Swept> {
        Swept::of(&comparison(pruned, settings))
    }

    #[test]
    fn a_grid_has_an_axis_and_series() {
        let found = swept(
            &[0.6, 0.5, 0.7, 0.5, 0.6, 0.7],
            &[
                ("sparsity.ratio", &["0.6", "0.5", "0.7", "0.5", "0.6", "0.7"]),
                (
                    "mask.init",
                    &[
                        "\"wanda\"",
                        "\"wanda\"",
                        "\"wanda\"",
                        "\"magnitude\"",
                        "\"magnitude\"",
                        "\"magnitude\"",
                    ],
                ),
                // What follows from another key tells nothing apart.
                ("mask.scope", &["1", "1", "1", "2", "2", "2"]),
            ],
        );
        let found = found.unwrap();
        assert_eq!((&*found.name, found.fraction), ("sparsity.ratio", true));
        let series = [
            ("init wanda".to_owned(), vec![1, 0, 2]),
            ("init magnitude".to_owned(), vec![3, 4, 5]),
        ];
        assert_eq!(found.series, series);
    }

    #[test]
    fn numbers_that_are_no_axis_are_none() {
        // Two runs that differ in two keys: neither is what makes the difference.
        assert_eq!(swept(&[0.5, 0.5], &[("a", &["1", "2"]), ("b", &["1", "2"])]), None);
        assert_eq!(swept(&[0.5, 0.5], &[("calibration.seed", &["1", "2"])]), None);
        assert_eq!(swept(&[0.5, 0.5], &[("preset", &["\"a\"", "\"b\""])]), None);
        assert_eq!(swept(&[0.5], &[]), None);
        // Patterns are no numbers, but the fraction that they prune is.
        let found = swept(&[0.5, 0.25], &[("sparsity.pattern", &["\"2:4\"", "\"3:4\""])]).unwrap();
        assert_eq!((&*found.name, &found.series[0].1), ("pruned", &vec![1, 0]));
        // One run without the key.
        let mut comparison = comparison(&[0.5, 0.5], &[("a", &["1", "2"])]);
        comparison.settings[0].values[0] = None;
        assert_eq!(Swept::of(&comparison), None);
    }
}
