//! `barber compare`: compares several runs.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
};

use super::{Error, table::Table, write};
use crate::{
    report::{Comparison, Figure, JSON, Kind, Run, comparison_page, read},
    run,
};

/// Compares runs: their results, and the differences of their recipes. Reads the reports that
/// `barber prune` wrote.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber compare out/50 out/60 --html comparison.html
  barber compare out/sweep")]
pub(super) struct Arguments {
    /// Directories that `barber prune` wrote, directories of such, as of a sweep, or reports,
    /// barber-report.json.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Write a page with the same figures and charts.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Replace the page if it exists.
    #[arg(long, requires = "html")]
    force: bool,
    /// Print JSON in place of the tables.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    if let Some(path) = &arguments.html {
        write::check(path, arguments.force)?;
    }
    let mut runs = Vec::new();
    for path in arguments.runs.iter().flat_map(|path| runs_of(path)) {
        runs.push((name(&path), read(&path)?));
    }
    let runs = Run::named(runs);
    if let Some(path) = &arguments.html {
        let page = comparison_page(&runs).map_err(|e| run::Error::Report(e.to_string()))?;
        write::new(path, page.as_bytes(), arguments.force)?;
    }
    let comparison = Comparison::of(&runs);
    if arguments.json {
        let json =
            serde_json::to_string(&comparison).map_err(|e| run::Error::Report(e.to_string()))?;
        println!("{json}");
    } else {
        tables(&comparison).iter().for_each(|table| println!("{table}"));
    }
    Ok(())
}

/// The runs in a directory, such as a sweep's, ordered by name, with numbers in numeric order. If
/// it has no runs, the path itself.
fn runs_of(path: &Path) -> Vec<PathBuf> {
    let is_run = |path: &Path| path.join(JSON).is_file();
    if is_run(path) {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    let mut runs: Vec<_> = entries.map(|entry| entry.path()).filter(|path| is_run(path)).collect();
    runs.sort_by(|a, b| in_order(&a.to_string_lossy(), &b.to_string_lossy()));
    if runs.is_empty() { vec![path.to_owned()] } else { runs }
}

/// The order of the names of a sweep's runs, such as `limit=5,ratio=0.5` before
/// `limit=10,ratio=0.45`.
fn in_order(a: &str, b: &str) -> Ordering {
    let parts = |name: &str| -> Vec<String> { name.split([',', '=']).map(str::to_owned).collect() };
    let part = |(a, b): (&String, &String)| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) => a.total_cmp(&b),
        _ => a.cmp(b),
    };
    let (of_a, of_b) = (parts(a), parts(b));
    let first = of_a.iter().zip(&of_b).map(part).find(|order| order.is_ne());
    first.unwrap_or_else(|| a.cmp(b))
}

/// The path of a run; for a report, that of its directory.
fn name(path: &Path) -> String {
    let report = path.file_name().is_some_and(|name| name == JSON);
    let dir = path.parent().filter(|dir| report && !dir.as_os_str().is_empty());
    dir.unwrap_or(path).display().to_string()
}

/// Tables of the runs' results, and of the differences of their recipes.
pub(super) fn tables(comparison: &Comparison) -> Vec<Table> {
    let mut head = vec![String::new()];
    for figure in &comparison.figures {
        head.push(match figure.kind {
            Kind::Perplexity => format!("perplexity, {}", figure.name),
            _ => figure.name.clone(),
        });
    }
    let mut rows = vec![head];
    let row = |name: &str, value: &dyn Fn(&Figure) -> Option<String>| {
        let values = comparison.figures.iter().map(|figure| value(figure).unwrap_or_default());
        std::iter::once(name.to_owned()).chain(values).collect::<Vec<_>>()
    };
    if comparison.figures.iter().any(|figure| figure.dense.is_some()) {
        rows.push(row("dense", &Figure::show_dense));
    }
    for (run, name) in comparison.runs.iter().enumerate() {
        rows.push(row(name, &|figure| figure.show(run)));
    }
    let mut tables = vec![Table::new("What came of each run", rows)];
    if !comparison.settings.is_empty() {
        let head = std::iter::once(String::new()).chain(comparison.runs.iter().cloned());
        let mut rows = vec![head.collect::<Vec<_>>()];
        for of in &comparison.settings {
            let values = of.values.iter().map(|value| value.clone().unwrap_or_default());
            rows.push(std::iter::once(of.key.clone()).chain(values).collect());
        }
        tables.push(Table::new("What differs in the recipes", rows));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_their_order() {
        let mut names = ["ratio=0.5", "limit=10,x=a", "ratio=0.45", "limit=5,x=b", "limit=5,x=a"];
        names.sort_by(|a, b| in_order(a, b));
        assert_eq!(
            names,
            ["limit=5,x=a", "limit=5,x=b", "limit=10,x=a", "ratio=0.45", "ratio=0.5"]
        );
    }
}
