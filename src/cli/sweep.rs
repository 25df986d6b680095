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
    checkpoint::Output,
    journal::Identity,
    ranks::{Ranks, share},
    recipe::{Loaded, Recipe},
    report::{self, Comparison, Report, comparison_page},
    run::{self, Checkpoints, Digests, Shared, alike, look_ahead, of_beginning},
};

/// Name of the page that compares the runs, beside their directories.
const PAGE: &str = "barber-sweep.html";

/// Executes the unfinished runs of a sweep, each on one of the ranks, and compares all runs.
pub(super) fn run(runs: &[Loaded], arguments: &Arguments, ranks: &Ranks) -> Result<(), Error> {
    let watch = Terminal { quiet: arguments.json };
    let mut digests = Digests::default();
    if ranks.size() > 1 {
        alike(ranks, &identities(runs, watch, &mut digests)?)?;
    }
    let page = target(&runs[0]).with_file_name(PAGE);
    // Only the first rank looks for results: the others may do so when some have begun.
    let left = match ranks.is_first() {
        true => unfinished(runs, &page, arguments, &mut digests)?,
        false => Vec::new(),
    };
    let left: Vec<&Loaded> = ranks.of_first(left).into_iter().map(|run| &runs[run]).collect();
    // Runs with the same initial masks follow each other, and are mostly one rank's.
    let own = share(left.len(), ranks.rank(), ranks.size());
    let mut shared = Shared::among(left[own.clone()].iter().map(|run| &run.recipe));
    // Errors of later runs are reported before the first one begins.
    for run in &left {
        look_ahead(run, &mut shared, &watch).map_err(|e| failed(run, e.into()))?;
    }
    ranks.wait();
    let apart = ranks.apart();
    for i in own {
        shared.go_on();
        let run = left[i];
        if watch.speaks() {
            println!("\nrun {} of {}: {}\n", i + 1, left.len(), run.point.name);
        }
        one(run, arguments, &apart, &mut shared).map_err(|e| failed(run, e))?;
    }
    ranks.wait();
    if ranks.is_first() { compared(runs, &page, arguments) } else { Ok(()) }
}

/// The indices of the runs that have no result yet, ordered so that those with the same initial masks
/// follow each other.
fn unfinished(
    runs: &[Loaded],
    page: &Path,
    arguments: &Arguments,
    digests: &mut Digests,
) -> Result<Vec<usize>, Error> {
    let watch = Terminal { quiet: arguments.json };
    let dir = page.parent().unwrap_or(Path::new(""));
    if ["config.json", report::JSON].iter().any(|file| dir.join(file).exists()) {
        return Err(Error::InCheckpoint(dir.to_owned()));
    }
    if page.parent().is_some_and(Path::exists) {
        write::check(page, true)?;
    }
    let mut left = Vec::new();
    for index in in_order(runs) {
        let run = &runs[index];
        let target = target(run);
        if done(run, watch, digests).map_err(|e| failed(run, e))? {
            Output::tidy(target)?;
            watch.note(&format!("done      {}", run.point.name));
        } else if target.exists() && !arguments.force {
            return Err(failed(run, Error::OtherRun(target.to_owned())));
        } else {
            left.push(index);
        }
    }
    Ok(left)
}

/// All that determines the result of each run.
fn identities(
    runs: &[Loaded],
    watch: Terminal,
    digests: &mut Digests,
) -> Result<Vec<Identity>, Error> {
    let mut identity = |run: &Loaded| {
        let checkpoints = Checkpoints::open(&run.recipe, &watch)?;
        run.find_texts()?;
        Ok(run::identity(&checkpoints.resolved(&run.recipe)?, &checkpoints, digests)?)
    };
    runs.iter().map(|run| identity(run).map_err(|e| failed(run, e))).collect()
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

/// The indices of the runs, ordered so that those with the same initial masks follow each other.
fn in_order(runs: &[Loaded]) -> Vec<usize> {
    let mut groups: Vec<(Recipe, Vec<usize>)> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let beginning = of_beginning(&run.recipe);
        match groups.iter_mut().find(|(known, _)| *known == beginning) {
            Some((_, group)) => group.push(index),
            None => groups.push((beginning, vec![index])),
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

/// Whether the result of a run exists already, from an equal recipe and unchanged files.
fn done(run: &Loaded, watch: Terminal, digests: &mut Digests) -> Result<bool, Error> {
    let Ok(was) = run::recipe(target(run)) else { return Ok(false) };
    let is = Checkpoints::open(&run.recipe, &watch)?.resolved(&run.recipe)?;
    if decisive(was.recipe) != decisive(is) {
        return Ok(false);
    }
    let Ok(Report { inputs, .. }) = report::read(target(run)) else { return Ok(false) };
    let files: Vec<PathBuf> = inputs.keys().cloned().collect();
    Ok(files.iter().all(|file| file.is_file()) && digests.of(&files)? == inputs)
}

/// The part of a resolved recipe that determines the result: without the preset's name and the
/// memory limit.
fn decisive(mut recipe: Recipe) -> Recipe {
    recipe.preset = None;
    recipe.executor.memory = None;
    recipe
}
