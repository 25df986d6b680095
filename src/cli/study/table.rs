//! A study's tables, in Markdown.

use std::{fmt, path::Path};

use super::log::Record;
use crate::{cli::show, recipe::Study};

/// A table, with its columns aligned for a reader of plain text.
pub(super) struct Table {
    title: String,
    /// The first row is the head, the first cell of each names the row.
    rows: Vec<Vec<String>>,
}

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
        tables.push(Table::new(title, study, records, 3, value));
    }
    for (i, score) in first.accuracy.iter().enumerate() {
        let (on, dense) = (&score.on, shown(&[100.0 * score.dense], 2));
        let title = format!("Accuracy on {on} in % (higher is better), {over}; dense {dense}");
        let value = |record: &Record| Some(100.0 * record.accuracy.get(i)?.pruned);
        tables.push(Table::new(title, study, records, 2, value));
    }
    let title = format!("Seconds for the masks, {over}");
    tables.push(Table::new(title, study, records, 1, |record| Some(record.seconds)));
    tables
}

impl Table {
    /// Methods × cases, of one value of each run, with so many decimals at most.
    fn new(
        title: String,
        study: &Study,
        records: &[&Record],
        decimals: i32,
        value: impl Fn(&Record) -> Option<f64>,
    ) -> Self {
        let cell = |method: &str, case: &str| {
            let of = records.iter().filter(|of| of.id.method == method && of.id.case == case);
            let values: Vec<f64> = of.filter_map(|record| value(record)).collect();
            shown(&values, decimals)
        };
        let cases = || study.cases.iter().map(|case| case.name.as_str());
        let name = |name: &str| name.replace('|', "\\|");
        let mut rows = vec![[String::new()].into_iter().chain(cases().map(name)).collect()];
        for method in study.methods.iter().map(|method| method.name.as_str()) {
            let cells = cases().map(|case| cell(method, case));
            rows.push([name(method)].into_iter().chain(cells).collect());
        }
        Self { title, rows }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.title)?;
        let columns = self.rows.first().map_or(0, Vec::len);
        let length = |row: &Vec<String>, i: usize| row[i].chars().count();
        let widths: Vec<usize> = (0..columns)
            .map(|i| self.rows.iter().map(|row| length(row, i)).max().unwrap_or(0).max(2))
            .collect();
        for (i, row) in self.rows.iter().enumerate() {
            for (j, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match j {
                    0 => write!(f, "| {cell:width$} |")?,
                    _ => write!(f, " {cell:>width$} |")?,
                }
            }
            writeln!(f)?;
            if i == 0 {
                for (j, width) in widths.iter().enumerate() {
                    match j {
                        0 => write!(f, "|{}|", "-".repeat(width + 2))?,
                        _ => write!(f, "{}:|", "-".repeat(width + 1))?,
                    }
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
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

    #[test]
    fn tables_are_aligned() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = vec![
            row(["", "50%", "2:4"]),
            row(["Wanda", "1.250 ± 0.354", "2"]),
            row(["a ± b", "3", "477.34"]),
        ];
        let table = Table { title: "Seconds".into(), rows };
        let expected = "\
Seconds

|       |           50% |    2:4 |
|-------|--------------:|-------:|
| Wanda | 1.250 ± 0.354 |      2 |
| a ± b |             3 | 477.34 |
";
        assert_eq!(table.to_string(), expected);
    }
}
