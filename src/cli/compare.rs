//! `barber compare`: several runs side by side.

use std::path::{Path, PathBuf};

use super::{Error, table::Table, write};
use crate::{
    report::{Comparison, Kind, Run, comparison_page, read},
    run,
};

/// Puts runs side by side: what came of them, and what differs in their recipes. Reads the reports
/// that `barber prune` wrote.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber compare out/50 out/60 --html comparison.html")]
pub(super) struct Arguments {
    /// Directories that `barber prune` wrote, or their reports, barber-report.json.
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
    let read = |path: &PathBuf| Ok((name(path), read(path)?));
    let runs = arguments.runs.iter().map(read).collect::<Result<Vec<_>, Error>>()?;
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

/// The path of a run; that of its directory if a report in one is given.
fn name(path: &Path) -> String {
    let report = path.file_name().is_some_and(|name| name == crate::report::JSON);
    let dir = path.parent().filter(|dir| report && !dir.as_os_str().is_empty());
    dir.unwrap_or(path).display().to_string()
}

/// What came of the runs, and what differs in their recipes.
pub(super) fn tables(comparison: &Comparison) -> Vec<Table> {
    let mut head = vec![String::new()];
    for figure in &comparison.figures {
        head.push(match figure.kind {
            Kind::Perplexity => format!("perplexity, {}", figure.name),
            _ => figure.name.clone(),
        });
    }
    let mut rows = vec![head];
    let row = |name: &str, value: &dyn Fn(usize) -> Option<f64>| {
        let values =
            comparison.figures.iter().enumerate().map(|(i, figure)| {
                value(i).map_or_else(String::new, |value| figure.kind.show(value))
            });
        std::iter::once(name.to_owned()).chain(values).collect::<Vec<_>>()
    };
    if comparison.figures.iter().any(|figure| figure.dense.is_some()) {
        rows.push(row("dense", &|figure| comparison.figures[figure].dense));
    }
    for (run, name) in comparison.runs.iter().enumerate() {
        rows.push(row(name, &|figure| comparison.figures[figure].values[run]));
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
