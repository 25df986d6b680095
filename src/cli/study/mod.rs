//! `barber study`: methods × cases on one model, over several seeds.

mod log;
mod table;

use std::{
    iter::zip,
    mem::take,
    path::{Path, PathBuf},
};

use self::{
    log::{Figures, Id, Inputs, Log, Record, Score, remove_parts},
    table::tables,
};
use super::{
    Error,
    job::{self, Split},
    progress::Terminal,
};
use crate::{
    checkpoint::{Pruned, digest_text},
    executor::ops::Ops,
    journal::Identity,
    model::Model,
    plan::Plan,
    ranks::Ranks,
    recipe::{Loaded, Recipe, Study, Variant, load, load_study},
    run::{
        self, Checkpoints, Digests, EVALUATION, Found, Notes, Progress, Run, Shared, Tests, alike,
        calibrate, foresee, on_device, plan,
    },
};

/// Compares methods: prunes one model with each method in each case, with several seeds, and prints
/// tables of perplexity, accuracy and time. The pruned models are not kept.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber study recipes/study-smollm2.toml --output runs.jsonl
  barber study study.toml --only Wanda --set evaluate.segments=8")]
pub(super) struct Arguments {
    /// The study, a TOML file.
    pub(super) study: PathBuf,
    /// Overrides a value of the recipe in all runs, such as evaluate.segments=8. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print all runs as JSON in place of the tables, and no progress.
    #[arg(long)]
    json: bool,
    /// Append each finished run to a file, as a line of JSON. A study that is started again with
    /// the same file skips its runs.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run only this method. May be repeated.
    #[arg(long, value_name = "METHOD")]
    only: Vec<String>,
    /// Under several ranks, that is, processes of mpirun, give each whole runs, in turn.
    #[arg(long, value_name = "WHAT")]
    split: Option<Split>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    job::run(|ranks| run_among(arguments, ranks))
}

/// Executes the runs of a study that are left, each on one of the ranks, and prints the tables.
fn run_among(arguments: &Arguments, ranks: &Ranks) -> Result<(), Error> {
    if ranks.size() > 1 && arguments.split.is_none() {
        return Err(Error::RunsOfRanks);
    }
    let mut study = load_study(&arguments.study)?;
    keep_only(&mut study.methods, &arguments.only)?;
    let planned = planned(&study, &arguments.sets)?;
    let path = arguments.output.as_deref();
    let mut log = if ranks.is_first() { Log::open(path)? } else { Log::default() };
    let watch = Terminal { quiet: arguments.json };
    if let Some(Planned { loaded, .. }) = planned.first() {
        let checkpoints = Checkpoints::open(&loaded.recipe, &watch)?;
        let identified = (path.is_some() || ranks.size() > 1)
            .then(|| identities(&planned, &checkpoints))
            .transpose()?
            .unwrap_or_default();
        alike(ranks, &identified)?;
        let inputs: Vec<Inputs> = match path {
            Some(_) => identified.into_iter().map(|identity| identity.inputs).collect(),
            None => vec![Inputs::new(); planned.len()],
        };
        for (planned, inputs) in zip(&planned, &inputs) {
            log.check(&planned.id, inputs)?;
        }
        let left = planned.iter().map(|planned| log.find(&planned.id).is_none());
        let left = ranks.of_first(left.collect::<Vec<bool>>());
        let left =
            zip(zip(&planned, inputs), left).filter_map(|(run, is_left)| is_left.then_some(run));
        let left: Vec<_> = left.collect();
        if !ranks.is_first() {
            log = Log::of_rank(path, ranks.rank())?;
        }
        if !left.is_empty() {
            let of = &loaded.recipe.executor;
            on_device!(
                of.device,
                of.precision,
                ranks,
                run_on(&checkpoints, &left, &mut log, watch, ranks)
            )?;
        }
        collect(&planned, path, &mut log, ranks)?;
    }
    let records: Vec<&Record> =
        planned.iter().filter_map(|planned| log.find(&planned.id)).collect();
    if arguments.json {
        let version = env!("CARGO_PKG_VERSION");
        println!("{}", serde_json::json!({ "barber": version, "runs": records }));
    } else {
        tables(&study, &records).iter().for_each(|table| println!("{table}"));
    }
    Ok(())
}

/// Adds the runs of the other ranks to the first one's log.
fn collect(
    planned: &[Planned],
    path: Option<&Path>,
    log: &mut Log,
    ranks: &Ranks,
) -> Result<(), Error> {
    let own = if ranks.is_first() { Vec::new() } else { take(log).into_records() };
    let found: Vec<Record> = ranks.gather_values(own).into_iter().flatten().collect();
    if !ranks.is_first() {
        return Ok(());
    }
    for Planned { id, .. } in planned {
        match found.iter().find(|record| record.id == *id) {
            Some(record) if log.find(id).is_none() => log.add(record.clone())?,
            _ => {}
        }
    }
    path.map_or(Ok(()), remove_parts)
}

/// Keeps only the methods that are named; all if none is.
fn keep_only(methods: &mut Vec<Variant>, only: &[String]) -> Result<(), Error> {
    let unknown = only.iter().find(|name| methods.iter().all(|method| method.name != **name));
    if let Some(name) = unknown {
        let known: Vec<_> = methods.iter().map(|method| format!("`{}`", method.name)).collect();
        return Err(Error::NoMethod { name: name.clone(), known: known.join(", ") });
    }
    methods.retain(|method| only.is_empty() || only.contains(&method.name));
    Ok(())
}

/// A planned run.
struct Planned {
    id: Id,
    loaded: Loaded,
}

/// All runs of a study, ordered by seeds, so that an interrupted study has comparable runs.
fn planned(study: &Study, sets: &[String]) -> Result<Vec<Planned>, Error> {
    let mut all: Vec<Planned> = Vec::new();
    for &seed in &study.seeds {
        for (method, case) in
            study.methods.iter().flat_map(|m| study.cases.iter().map(move |c| (m, c)))
        {
            let seeded = [format!("calibration.seed={seed}")];
            let layers = [&study.set, &case.set, &method.set, sets, &seeded];
            let mut id = Id {
                method: method.name.clone(),
                case: case.name.clone(),
                seed,
                settings: String::new(),
            };
            let loaded = load(&study.recipe, &layers.concat()).map_err(|e| id.failed(e))?;
            let recipe = &loaded.recipe;
            if let Some(key) = all.first().and_then(|first| varying(&first.loaded.recipe, recipe)) {
                return Err(id.failed(Error::Varies(key)));
            }
            id.settings = settings(recipe)?;
            all.push(Planned { id, loaded });
        }
    }
    Ok(all)
}

/// The first part of two recipes that must be equal in a study but differs.
fn varying(one: &Recipe, other: &Recipe) -> Option<&'static str> {
    let alike = [
        ("model", one.model == other.model),
        ("evaluate", one.evaluate == other.evaluate),
        ("executor.device", one.executor.device == other.executor.device),
    ];
    alike.into_iter().find(|(_, alike)| !alike).map(|(key, _)| key)
}

/// The digest of a recipe without its output.
fn settings(recipe: &Recipe) -> Result<String, Error> {
    let mut recipe = recipe.clone();
    recipe.output.path = None;
    let recipe = recipe.absolute().map_err(|e| run::Error::Report(e.to_string()))?;
    Ok(digest_text(&recipe.to_toml().map_err(|e| run::Error::Report(e.to_string()))?))
}

fn figures(found: &Found) -> Figures {
    let perplexity = found.perplexity.iter().map(|of| (of.perplexity, of.perplexity_stderr));
    let accuracy = found.accuracy.iter().map(|of| (of.acc, Some(of.acc_stderr)));
    [perplexity.collect(), accuracy.collect()]
}

/// All that determines the result of each run.
fn identities(all: &[Planned], checkpoints: &Checkpoints) -> Result<Vec<Identity>, Error> {
    let mut digests = Digests::default();
    let mut of = |Planned { id, loaded }: &Planned| {
        loaded.find_texts().map_err(|e| id.failed(e))?;
        let resolved = checkpoints.resolved(&loaded.recipe)?;
        Ok(run::identity(&resolved, checkpoints, &mut digests)?)
    };
    all.iter().map(&mut of).collect()
}

/// Executes this rank's part of the remaining runs of a study, on a device with `available` bytes of
/// free memory.
fn run_on<D: Ops>(
    device: D,
    available: u64,
    checkpoints: &Checkpoints,
    left: &[(&Planned, Inputs)],
    log: &mut Log,
    watch: Terminal,
    ranks: &Ranks,
) -> Result<(), Error> {
    let mut model = Model::new(&checkpoints.dense, device)?;
    let plans = left.iter().map(|(run, _)| plan(&run.loaded, &model).map_err(|e| run.id.failed(e)));
    let plans = plans.collect::<Result<Vec<Plan>, _>>()?;
    let Some((Planned { loaded, .. }, _)) = left.first() else { return Ok(()) };
    let tests = Tests::read(&loaded.recipe, &model)?;
    let scratch =
        tempfile::tempdir().map_err(|source| Error::File { path: std::env::temp_dir(), source })?;
    let mut shared = Shared::default();
    // Errors of later runs are reported before the first one begins.
    for ((Planned { id, loaded }, _), plan) in zip(left, &plans) {
        foresee(loaded, &model, plan, &tests, &mut shared).map_err(|e| id.failed(e))?;
    }
    let is_own = |run: usize| run % ranks.size() == ranks.rank();
    if !(0..left.len()).any(is_own) {
        return Ok(());
    }
    // Measured even if the log has it, as numbers read from JSON may differ in the last bit.
    let dense = tests.measure(&model.written(None), &Pruned::dense(), "dense", &watch)?;
    let dense = figures(&dense);
    let runs = zip(left, plans).enumerate().filter(|(run, _)| is_own(*run));
    for (i, ((planned, inputs), plan)) in runs {
        watch.note(&format!("run {} of {}: {}", i + 1, left.len(), planned.id));
        let (loaded, scratch) = (&planned.loaded, scratch.path());
        let place = (available, scratch);
        let found = shared.samples(&loaded.recipe, || calibrate(&loaded.recipe, &model));
        let run = found
            .and_then(|ids| Run::prepare(loaded, plan, &mut model, &tests, ids, place, &watch));
        let zeros = checkpoints.sparse.as_ref();
        let found = run.and_then(|run| measured(run.with_zeros_of(zeros)));
        let (found, seconds) = found.map_err(|e| planned.id.failed(e))?;
        let [perplexity, accuracy] = &found;
        let texts = tests.texts.iter().map(|(text, _)| text.label());
        let tasks = tests.tasks.iter().map(|asked| asked.task.name.to_owned());
        log.add(Record {
            id: planned.id.clone(),
            inputs: inputs.clone(),
            perplexity: scores(texts, &dense[0], perplexity),
            accuracy: scores(tasks, &dense[1], accuracy),
            seconds,
        })?;
    }
    Ok(())
}

/// The measurements of a run, and the seconds for its masks.
fn measured<D: Ops>(run: Run<'_, D>) -> Result<(Figures, f64), run::Error> {
    let mut progress = Progress::new(None);
    run.prune(false, &mut progress)?;
    let Notes { initial, refined, mut phases, .. } = progress.notes;
    let found = refined.or(initial).unwrap_or_default();
    phases.seconds.remove(EVALUATION);
    Ok((figures(&found), phases.seconds.values().sum()))
}

fn scores(
    names: impl Iterator<Item = String>,
    dense: &[(f64, Option<f64>)],
    pruned: &[(f64, Option<f64>)],
) -> Vec<Score> {
    let score = |(on, (dense, pruned)): (String, (&(f64, _), &(f64, _)))| {
        let (&(dense, dense_stderr), &(pruned, pruned_stderr)) = (dense, pruned);
        Score { on, dense, dense_stderr, pruned, pruned_stderr }
    };
    zip(names, zip(dense, pruned)).map(score).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::load_text;

    #[test]
    fn the_study_of_smollm2_is_fine() {
        let mut study = load_study(Path::new("recipes/study-smollm2.toml")).unwrap();
        let all = planned(&study, &[]).unwrap();
        assert_eq!(all.len(), 11 * 4 * 3);
        let mut settings: Vec<&str> = all.iter().map(|run| run.id.settings.as_str()).collect();
        settings.sort_unstable();
        settings.dedup();
        assert_eq!(settings.len(), all.len());
        // The recipe's own stages would be above those of a preset.
        for preset in ["best", "fast"] {
            let text = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";
            let set = [format!("preset={preset}")];
            let expected = load_text(Path::new("r.toml"), text, [], &set).unwrap().recipe;
            let found = all.iter().find(|run| run.id.method == preset).unwrap();
            assert_eq!(found.loaded.recipe.refine, expected.refine);
            assert_eq!(found.loaded.recipe.mask, expected.mask);
        }

        let only = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        keep_only(&mut study.methods, &only(&["Wanda", "best"])).unwrap();
        assert_eq!(study.methods.len(), 2);
        assert!(keep_only(&mut study.methods, &only(&["fast"])).is_err_and(|e| e.status() == 2));
    }

    #[test]
    fn runs_have_one_model_and_one_evaluation() {
        let mut study = load_study(Path::new("recipes/study-smollm2.toml")).unwrap();
        study.cases[1].set.push("evaluate.segments=3".into());
        let error = planned(&study, &[]).map(|_| ()).unwrap_err();
        assert_eq!(error.status(), 2);
        assert!(error.to_string().starts_with("magnitude, 60%, seed 0: `evaluate`"), "{error}");
        assert!(planned(&study, &["evaluate.segments=3".into()]).is_ok());
    }
}
