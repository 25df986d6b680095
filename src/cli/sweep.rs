//! `barber prune` for a recipe with a sweep: executes its runs, and compares them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    Error, compare,
    progress::Terminal,
    prune::{Arguments, one},
    show, write,
};
use crate::{
    checkpoint::{Output, digest},
    ranks::Ranks,
    recipe::{Loaded, Recipe},
    report::{self, Comparison, Report, comparison_page},
    run::{self, Checkpoints, Shared, look_ahead, of_beginning},
};

/// Name of the page that compares the runs, beside their directories.
const PAGE: &str = "barber-sweep.html";

pub(super) fn run(runs: &[Loaded], arguments: &Arguments) -> Result<(), Error> {
    let watch = Terminal { quiet: arguments.json };
    let page = target(&runs[0]).with_file_name(PAGE);
    let dir = page.parent().unwrap_or(Path::new(""));
    if ["config.json", report::JSON].iter().any(|file| dir.join(file).exists()) {
        return Err(Error::InCheckpoint(dir.to_owned()));
    }
    if page.parent().is_some_and(Path::exists) {
        write::check(&page, true)?;
    }
    let mut digests = BTreeMap::new();
    let mut left = Vec::new();
    for run in in_order(runs) {
        let target = target(run);
        if done(run, watch, &mut digests).map_err(|e| failed(run, e))? {
            Output::tidy(target)?;
            watch.note(&format!("done      {}", run.point.name));
        } else if target.exists() && !arguments.force {
            return Err(failed(run, Error::OtherRun(target.to_owned())));
        } else {
            left.push(run);
        }
    }
    let mut shared = Shared::among(left.iter().map(|run| &run.recipe));
    // Errors of later runs are reported before the first one begins.
    for run in &left {
        look_ahead(run, &mut shared, &watch).map_err(|e| failed(run, e.into()))?;
    }
    for (i, run) in left.iter().enumerate() {
        shared.go_on();
        if watch.speaks() {
            println!("\nrun {} of {}: {}\n", i + 1, left.len(), run.point.name);
        }
        one(run, arguments, &Ranks::ONE, &mut shared).map_err(|e| failed(run, e))?;
    }
    compared(runs, &page, arguments)
}

/// Writes the page of all runs, and prints the tables.
fn compared(runs: &[Loaded], path: &Path, arguments: &Arguments) -> Result<(), Error> {
    let read = |run: &Loaded| {
        let report = report::read(target(run))?;
        Ok(report::Run { name: run.point.name.clone(), report })
    };
    let reports = runs.iter().map(read).collect::<Result<Vec<_>, Error>>()?;
    let page = comparison_page(&reports).map_err(|e| run::Error::Report(e.to_string()))?;
    write::new(path, page.as_bytes(), true)?;
    if arguments.json {
        let all: Vec<_> = runs.iter().zip(&reports).map(|(run, of)| described(run, of)).collect();
        let version = env!("CARGO_PKG_VERSION");
        println!("{}", serde_json::json!({ "barber": version, "page": path, "runs": all }));
    } else {
        println!("");
        compare::tables(&Comparison::of(&reports)).iter().for_each(|table| println!("{table}"));
        println!("compared  {}", show(path));
    }
    Ok(())
}

/// The JSON of a run for `--json`.
fn described(run: &Loaded, report::Run { name, report }: &report::Run) -> serde_json::Value {
    let settings: BTreeMap<_, _> = run.point.settings.iter().cloned().collect();
    serde_json::json!({ "name": name, "settings": settings, "report": report })
}

/// The runs, ordered so that those with the same initial masks follow each other.
fn in_order(runs: &[Loaded]) -> Vec<&Loaded> {
    let mut groups: Vec<(Recipe, Vec<&Loaded>)> = Vec::new();
    for run in runs {
        let beginning = of_beginning(&run.recipe);
        match groups.iter_mut().find(|(known, _)| *known == beginning) {
            Some((_, group)) => group.push(run),
            None => groups.push((beginning, vec![run])),
        }
    }
    groups.into_iter().flat_map(|(_, group)| group).collect()
}

/// The output of a run.
fn target(run: &Loaded) -> &Path {
    run.recipe.output.path.as_deref().unwrap_or(Path::new(""))
}

/// Adds the run to an error.
fn failed(run: &Loaded, error: Error) -> Error {
    Error::Run { run: run.point.name.clone(), error: Box::new(error) }
}

/// Whether the result of a run exists already, from an equal recipe and unchanged files. `digests`
/// caches the digests of files.
fn done(
    run: &Loaded,
    watch: Terminal,
    digests: &mut BTreeMap<PathBuf, String>,
) -> Result<bool, Error> {
    let Ok(was) = run::recipe(target(run)) else { return Ok(false) };
    let is = Checkpoints::open(&run.recipe, &watch)?.resolved(&run.recipe)?;
    if decisive(was.recipe) != decisive(is) {
        return Ok(false);
    }
    let Ok(Report { inputs, .. }) = report::read(target(run)) else { return Ok(false) };
    for (file, was) in inputs {
        if !file.is_file() {
            return Ok(false);
        }
        let is = match digests.get(&file) {
            Some(known) => known.clone(),
            None => digests.entry(file.clone()).or_insert(digest(&file)?).clone(),
        };
        if is != was {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The part of a resolved recipe that determines the result: without the preset's name and the
/// memory limit.
fn decisive(mut recipe: Recipe) -> Recipe {
    recipe.preset = None;
    recipe.executor.memory = None;
    recipe
}
