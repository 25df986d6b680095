//! A study's tables, in Markdown.

use std::path::Path;

use super::log::Record;
use crate::{
    cli::{show, table::Table},
    recipe::Study,
};

/// A value, and its standard error, if known.
type Value = (f64, Option<f64>);

/// The tables of a study: one for each text, one for each task, and one of the seconds for the
/// masks.
pub(super) fn tables(study: &Study, records: &[&Record]) -> Vec<Table> {
    let Some(first) = records.first() else { return Vec::new() };
    let over = |error: &str| match study.seeds.as_slice() {
        [seed] => format!("{error}seed {seed}"),
        seeds => format!("mean ± standard deviation over {} seeds", seeds.len()),
    };
    let mut tables = Vec::new();
    for (i, score) in first.perplexity.iter().enumerate() {
        let on = show(Path::new(&score.on));
        let dense = shown((score.dense, score.dense_stderr), 3);
        let over = over("± standard error, ");
        let title = format!("Perplexity on {on} (lower is better), {over}; dense {dense}");
        let value = |record: &Record| {
            let score = record.perplexity.get(i)?;
            Some((score.pruned, score.pruned_stderr))
        };
        tables.push(table(title, study, records, 3, value));
    }
    let percent = |(fraction, error): Value| (100.0 * fraction, error.map(|error| 100.0 * error));
    for (i, score) in first.accuracy.iter().enumerate() {
        let (on, over) = (&score.on, over("± standard error, "));
        let dense = shown(percent((score.dense, score.dense_stderr)), 2);
        let title = format!("Accuracy on {on} in % (higher is better), {over}; dense {dense}");
        let value = |record: &Record| {
            let score = record.accuracy.get(i)?;
            Some(percent((score.pruned, score.pruned_stderr)))
        };
        tables.push(table(title, study, records, 2, value));
    }
    let title = format!("Seconds for the masks, {}", over(""));
    tables.push(table(title, study, records, 1, |record| Some((record.seconds, None))));
    tables
}

/// A table of methods × cases with one value of each run, with at most this number of decimals.
fn table(
    title: String,
    study: &Study,
    records: &[&Record],
    decimals: i32,
    value: impl Fn(&Record) -> Option<Value>,
) -> Table {
    let cell = |method: &str, case: &str| {
        let of = records.iter().filter(|of| of.id.method == method && of.id.case == case);
        let values: Vec<Value> = of.filter_map(|record| value(record)).collect();
        match values[..] {
            [one] => shown(one, decimals),
            _ => shown(statistics(values.iter().map(|(value, _)| *value)), decimals),
        }
    };
    let cases = || study.cases.iter().map(|case| case.name.as_str());
    let mut rows: Vec<Vec<String>> =
        vec![std::iter::once("").chain(cases()).map(str::to_owned).collect()];
    for method in study.methods.iter().map(|method| method.name.as_str()) {
        let cells = cases().map(|case| cell(method, case));
        rows.push(std::iter::once(method.to_owned()).chain(cells).collect());
    }
    Table::new(title, rows)
}

/// A value and its uncertainty, if known, after `±`: five digits, with at most this number of
/// decimals.
fn shown((value, spread): Value, decimals: i32) -> String {
    let whole = value.abs().max(1.0).log10() as i32;
    let digits = 4_i32.saturating_sub(whole).clamp(0, decimals) as usize;
    match spread {
        Some(spread) => format!("{value:.digits$} ± {spread:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// The mean and the sample's standard deviation.
fn statistics(values: impl ExactSizeIterator<Item = f64> + Clone) -> Value {
    let count = values.len() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, Some((squares / (count - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_the_samples() {
        assert_eq!(statistics([1.0, 3.0, 5.0].into_iter()), (3.0, Some(2.0)));
    }

    #[test]
    fn values_have_as_many_digits_as_say_something() {
        let of = |values: &[f64]| shown(statistics(values.iter().copied()), 3);
        assert_eq!(of(&[1.0, 1.5]), "1.250 ± 0.354");
        assert_eq!(of(&[45.1, 45.3]), "45.200 ± 0.141");
        assert_eq!(of(&[f64::NAN, 1.0]), "NaN ± NaN");
        assert_eq!(shown((477.344, Some(12.345)), 3), "477.34 ± 12.35");
        assert_eq!(shown((123_456.7, None), 3), "123457");
        assert_eq!(shown((12.34, None), 1), "12.3");
    }
}
