//! `barber prune`: runs a recipe.

use std::{path::PathBuf, str::FromStr, time::Duration};

use super::{
    Error,
    columns::labelled,
    interrupt::announce,
    job::{self, Split},
    progress::Terminal,
    show,
    summary::Summary,
    sweep,
};
use crate::{
    checkpoint::Reader,
    family::Decoder,
    permutation::Reach,
    plan::Plan,
    ranks::Ranks,
    recipe::{Loaded, Recipe, describe, load_runs},
    report::{Report, headline},
    run::{self, Settings, Shared, prune_among},
};

/// Prunes a checkpoint as a recipe says. --set overrides the environment (`BARBER_SECTION__KEY`),
/// which overrides the recipe's file. A recipe with a [sweep] is run for every combination of its
/// values, each into a directory of its own; finished runs are not run again, and a page compares
/// them all.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber prune recipes/quickstart.toml
  barber prune recipe.toml --set sparsity.ratio=0.6 --set output.path=out/60
  BARBER_SPARSITY__RATIO=0.6 barber prune recipe.toml --json > report.json")]
pub(super) struct Arguments {
    /// The recipe, a TOML file.
    pub(super) recipe: PathBuf,
    /// Overrides a value of the recipe, such as sparsity.ratio=0.6. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Replace the output directory if it exists, and discard the state of a stopped run to it. For
    /// a sweep, replace the directories of runs with other settings.
    #[arg(long)]
    pub(super) force: bool,
    /// Continue a stopped run to the same output; if there is none, begin anew.
    #[arg(long)]
    resume: bool,
    /// Minimum time between two saves, from which a stopped run can continue. Saves are farther
    /// apart where they would take more than 2% of the time. 0: after each layer.
    #[arg(long, value_name = "SECONDS|never", default_value = "30")]
    save_every: Every,
    /// Under several ranks, that is, processes of mpirun, give each whole runs of the sweep. Left out,
    /// all ranks share the samples of one run.
    #[arg(long, value_name = "WHAT")]
    split: Option<Split>,
    /// Print the report as JSON, and no progress.
    #[arg(long)]
    pub(super) json: bool,
}

/// The minimum time between saves; `None` for no saves.
#[derive(Clone, Copy)]
struct Every(Option<Duration>);

impl FromStr for Every {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "never" {
            return Ok(Self(None));
        }
        let seconds =
            text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        seconds.map(|seconds| Self(Some(seconds))).ok_or("expected seconds, or `never`")
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    job::run(|ranks| run_on(arguments, ranks))
}

/// Runs a recipe on some ranks.
fn run_on(arguments: &Arguments, ranks: &Ranks) -> Result<(), Error> {
    let runs = load_runs(&arguments.recipe, &arguments.sets)?;
    let outputs: Vec<_> = runs.iter().filter_map(|run| run.recipe.output.path.clone()).collect();
    let path = arguments.recipe.clone();
    if ranks.is_first() {
        announce(outputs).map_err(|source| Error::File { path, source })?;
    }
    match runs.as_slice() {
        [only] if only.point.settings.is_empty() => {
            if arguments.split.is_some() {
                return Err(Error::OneRun);
            }
            let report = one(only, arguments, ranks, &mut Shared::default())?;
            if arguments.json {
                let json = serde_json::to_string::<dyn erased_serde::Serialize>(&report);
                println!("{}", json.map_err(|e| run::Error::Report(e.to_string()))?);
            }
            Ok(())
        }
        _ if ranks.size() > 1 && arguments.split.is_none() => Err(Error::RunsOfRanks),
        runs => sweep::run(runs, arguments, ranks),
    }
}

/// Executes one run, with the data that it shares with others, and prints its summary.
pub(super) fn one(
    loaded: &Loaded,
    arguments: &Arguments,
    ranks: &Ranks,
    shared: &mut Shared,
) -> Result<Report, Error> {
    let &Arguments { force, resume, save_every: Every(save_every), json, .. } = arguments;
    let watch = Terminal { quiet: json };
    let settings = Settings { force, resume, save_every, watch: &watch, ranks };
    let report = prune_among(loaded, &settings, shared)?;
    if !json {
        println!("{}", Summary(&report));
    }
    Ok(report)
}

/// Prints what the run will do.
pub(super) fn introduce(recipe: &Recipe, dense: &Reader, decoder: &Decoder, plan: &Plan) {
    let layers = plan.layers.len();
    let groups: Vec<&str> = plan
        .layers
        .iter()
        .max_by_key(|groups| groups.len())
        .into_iter()
        .flatten()
        .map(|g| &*g.name)
        .collect();
    let model = format!("{} ({layers} layers)", show(recipe.model.reference().0));
    println!("{}", labelled("model", &model));
    if let Ok(Some(quantisation)) = dense.quantisation() {
        println!("{}", labelled("weights", &quantisation.to_string()));
    }
    let overrides = match recipe.overrides.len() {
        0 => String::new(),
        1 => ", with 1 override".into(),
        n => format!(", with {n} overrides"),
    };
    let [weights, pruned] = plan.weights(decoder);
    let ratio = match recipe.mask.init.zeros {
        // The sparse checkpoint determines the number of zeros.
        true => format!("of {weights} weights"),
        false => {
            let ratio = headline(pruned as f64 / weights.max(1) as f64);
            format!("{ratio} of {weights} weights pruned")
        }
    };
    let what = match &plan.removal {
        Some(removal) => {
            let each: Vec<String> = removal.lost.iter().map(ToString::to_string).collect();
            each.join(" and ")
        }
        None => recipe.sparsity.pattern.to_string(),
    };
    let mask = format!("{}, {what}, {ratio}{overrides}", describe::init(recipe));
    println!("{}", labelled("mask", &mask));
    if recipe.sparsity.permute {
        println!("{}", labelled("permute", &Reach::of(plan, decoder).to_string()));
    }
    if let Some(readers) = recipe.output.format.readers() {
        println!("{}", labelled("format", &readers));
    }
    for stage in describe::stages(recipe, &groups) {
        println!("{}", labelled("refine", &stage));
    }
}
