//! A study's tables, in Markdown.

use std::path::Path;

use super::log::Record;
use crate::{
    cli::{show, table::Table},
    recipe::Study,
};

/// The tables of a study: of each text, of each task, and of the seconds that the masks took.
pub(super) fn tables(study: &Study, records: &[&Record]) -> Vec<Table> {
    let Some(first) = records.first() else { return Vec::new() };
    let over = match study.seeds.as_slice() {
        [seed] => format!("seed {seed}"),
        seeds => format!("mean ± standard deviation over {} seeds", seeds.len()),
    };
    let mut tables = Vec::new();
    for (i, score) in first.perplexity.iter().enumerate() {
        let (on, dense) = (show(Path::new(&score.on)), shown(&[score.dense], 3));
        let title = format!("Perplexity on {on} (lower is better), {over}; dense {dense}");
        let value = |record: &Record| Some(record.perplexity.get(i)?.pruned);
        tables.push(table(title, study, records, 3, value));
    }
    for (i, score) in first.accuracy.iter().enumerate() {
        let (on, dense) = (&score.on, shown(&[100.0 * score.dense], 2));
        let title = format!("Accuracy on {on} in % (higher is better), {over}; dense {dense}");
        let value = |record: &Record| Some(100.0 * record.accuracy.get(i)?.pruned);
        tables.push(table(title, study, records, 2, value));
    }
    let title = format!("Seconds for the masks, {over}");
    tables.push(table(title, study, records, 1, |record| Some(record.seconds)));
    tables
}

/// Methods × cases, of one value of each run, with so many decimals at most.
fn table(
    title: String,
    study: &Study,
    records: &[&Record],
    decimals: i32,
    value: impl Fn(&Record) -> Option<f64>,
) -> Table {
    let cell = |method: &str, case: &str| {
        let of = records.iter().filter(|of| of.id.method == method && of.id.case == case);
        let values: Vec<f64> = of.filter_map(|record| value(record)).collect();
        shown(&values, decimals)
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

/// Values as `mean ± standard deviation`, or one as it is: five digits, of which so many decimals
/// at most.
fn shown(values: &[f64], decimals: i32) -> String {
    let (mean, deviation) = statistics(values);
    let whole = mean.abs().max(1.0).log10() as i32;
    let digits = 4_i32.saturating_sub(whole).clamp(0, decimals) as usize;
    match deviation {
        Some(deviation) => format!("{mean:.digits$} ± {deviation:.digits$}"),
        None => format!("{mean:.digits$}"),
    }
}

/// The mean and, of more than one, the sample's standard deviation.
fn statistics(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_the_samples() {
        assert_eq!(statistics(&[1.0, 3.0, 5.0]), (3.0, Some(2.0)));
        assert_eq!(statistics(&[4.0]), (4.0, None));
    }

    #[test]
    fn values_have_as_many_digits_as_say_something() {
        assert_eq!(shown(&[1.0, 1.5], 3), "1.250 ± 0.354");
        assert_eq!(shown(&[45.1, 45.3], 3), "45.200 ± 0.141");
        assert_eq!(shown(&[477.344], 3), "477.34");
        assert_eq!(shown(&[123_456.7], 3), "123457");
        assert_eq!(shown(&[12.34], 1), "12.3");
        assert_eq!(shown(&[f64::NAN, 1.0], 3), "NaN ± NaN");
    }
}
