//! `barber prune`: a recipe from its text to a checkpoint.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use barber_metric::Needs;
use dfdx::tensor::Cpu;

use super::{
    Error,
    evaluate::{Asked, measure, tokens},
    progress::bar,
    show,
    summary::{Stages, Summary, TaskReport, TextReport},
};
use crate::{
    calibration::{Samples, Text, samples, segments},
    checkpoint::{Output, Pruned, Reader, digest},
    evaluate::{Accuracy, Perplexity, Task},
    hub::locate,
    model::Model,
    plan::Plan,
    prune::{Event, GroupReport, Rebuild, Start, rebuild, start},
    recipe::{Calibration, Evaluate, Loaded, Recipe, load},
};

/// Prunes a checkpoint as a recipe says. Values are layered: defaults, the recipe's file,
/// `BARBER_SECTION__KEY` environment variables, --set.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// Overrides a value of the recipe, such as sparsity.ratio=0.6. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Replace the output directory if it exists.
    #[arg(long)]
    force: bool,
    /// Print the report as JSON, and no progress.
    #[arg(long)]
    json: bool,
}

/// Runs a phase and notes how long it took.
fn timed<T>(
    seconds: &mut BTreeMap<&'static str, f64>,
    phase: &'static str,
    run: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let started = Instant::now();
    let result = run()?;
    *seconds.entry(phase).or_default() += started.elapsed().as_secs_f64();
    Ok(result)
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let loaded = load(&arguments.recipe, &arguments.sets)?;
    let (recipe, quiet) = (&loaded.recipe, arguments.json);
    let new = |file: &str, bytes| bar(file, bytes, quiet);
    let located = locate(&recipe.model.path, recipe.model.revision.as_deref(), &new)?;
    let reader = Reader::open(&located.dir)?;
    let model = Model::new(&reader, Cpu::default())?;
    let plan = plan(&loaded, &model)?;
    let target = recipe.output.path.as_deref().unwrap_or(Path::new(""));
    let output = Output::create(target, arguments.force, reader.path())?;
    let calibration = calibrate(recipe, &model)?;
    let texts = texts(recipe, &model)?;
    let tasks = tasks(recipe)?;
    if !quiet {
        introduce(recipe, &model, &plan);
    }

    let mut seconds = BTreeMap::new();
    let tokens = tokens(&model, recipe.evaluate.special_tokens);
    let mut evaluated = |pruned: &Pruned, name: &str| {
        timed(&mut seconds, "evaluation", || {
            let mut found = Found::default();
            for (_, segments) in &texts {
                let name = format!("perplexity, {name}");
                found.perplexity.push(measure(&model, pruned, segments, &name, quiet)?);
            }
            for asked in &tasks {
                let name = format!("{}, {name}", asked.task.name);
                found.accuracy.push(asked.answer(&model, pruned, &tokens, &name, quiet)?);
            }
            Ok(found)
        })
    };
    let dense = evaluated(&Pruned::default(), "dense")?;

    let mut mask_seconds = BTreeMap::new();
    let initial = timed(&mut mask_seconds, "initial masks", || {
        initial_masks(recipe, &model, &plan, &calibration, output.scratch(), quiet)
    })?;
    let initial_found = evaluated(&initial, "initial masks")?;
    let mut groups = Vec::new();
    let (pruned, rebuilt_found) = if recipe.rebuild.is_some() {
        let rebuilt = timed(&mut mask_seconds, "rebuild", || {
            rebuilt_masks(&loaded, &model, &plan, &calibration, initial, quiet, &mut groups)
        })?;
        let found = evaluated(&rebuilt, "rebuilt masks")?;
        (rebuilt, Some(found))
    } else {
        (initial, None)
    };
    seconds.append(&mut mask_seconds);

    let changed = timed(&mut seconds, "writing", || {
        let bytes = reader.names().filter_map(|name| reader.tensor(name).ok());
        let bar = bar("writing", bytes.map(|tensor| tensor.bytes.len() as u64).sum(), quiet);
        let changed =
            output.write(&reader, recipe.output.dtype, &pruned, |bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        Ok(changed)
    })?;
    let perplexity = texts.iter().enumerate().map(|(i, (text, _))| TextReport {
        text: text.label(),
        found: Stages {
            dense: dense.perplexity[i],
            initial: Some(initial_found.perplexity[i]),
            rebuilt: rebuilt_found.as_ref().map(|found| found.perplexity[i]),
        },
    });
    let accuracy = tasks.iter().enumerate().map(|(i, asked)| TaskReport {
        task: asked.task.name,
        found: Stages {
            dense: dense.accuracy[i],
            initial: Some(initial_found.accuracy[i]),
            rebuilt: rebuilt_found.as_ref().map(|found| found.accuracy[i]),
        },
    });
    let prunable: usize = pruned.masks.values().map(|mask| mask.dims().len()).sum();
    let kept: usize = pruned.masks.values().map(|mask| mask.kept()).sum();
    let summary = Summary {
        barber: env!("CARGO_PKG_VERSION"),
        output: output.target().to_owned(),
        prunable_weights: prunable,
        pruned_weights: prunable - kept,
        changed_weights: changed,
        perplexity: perplexity.collect(),
        tasks: accuracy.collect(),
        groups,
        seconds,
        inputs: digests(recipe, &reader)?,
    };
    let mut resolved = recipe.clone();
    resolved.model.revision = located.commit;
    finish(resolved, &summary, output)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&summary).map_err(|e| Error::Report(e.to_string()))?);
    } else {
        println!("{summary}");
    }
    Ok(())
}

pub(super) fn plan(loaded: &Loaded, model: &Model<'_, Cpu>) -> Result<Plan, Error> {
    let blocks = loaded.recipe.blocks.iter();
    let blocks: Vec<_> = blocks.map(|block| (block.name.clone(), block.layers.clone())).collect();
    let rules = loaded.rules(model.decoder.linears().map(|linear| linear.weight.as_str()))?;
    Ok(Plan::new(&model.decoder, &blocks, |name| rules.of(name))?)
}

fn calibrate(recipe: &Recipe, model: &Model<'_, Cpu>) -> Result<Vec<Vec<u32>>, Error> {
    let Some(source) = recipe.calibration.source.as_deref().filter(|_| recipe.calibrates()) else {
        return Ok(Vec::new());
    };
    let wanted = Samples {
        count: recipe.calibration.samples,
        sequence_length: recipe.calibration.sequence_length,
        seed: recipe.calibration.seed,
        selection: recipe.calibration.selection,
    };
    let Calibration { field, special_tokens, .. } = &recipe.calibration;
    let text = Text { field: Some(field.clone()), ..Text::from(source) };
    Ok(samples(&text, wanted, &tokens(model, *special_tokens))?)
}

pub(super) type Texts = Vec<(Text, Vec<Vec<u32>>)>;

pub(super) fn texts(recipe: &Recipe, model: &Model<'_, Cpu>) -> Result<Texts, Error> {
    let Evaluate { perplexity, sequence_length, segments: limit, special_tokens, .. } =
        &recipe.evaluate;
    let tokens = tokens(model, *special_tokens);
    let read = |text: &Text| {
        let limit = text.segments.or(*limit);
        Ok((text.clone(), segments(text, *sequence_length, limit, &tokens)?))
    };
    perplexity.iter().map(read).collect()
}

fn tasks(recipe: &Recipe) -> Result<Vec<Asked>, Error> {
    let named = |(name, file): (&String, &PathBuf)| Some((Task::named(name)?, file.clone()));
    let tasks = recipe.evaluate.tasks.iter().filter_map(named);
    tasks.map(|(task, file)| Asked::read(task, &file, recipe.evaluate.questions)).collect()
}

/// What was measured of one model.
#[derive(Default)]
struct Found {
    perplexity: Vec<Perplexity>,
    accuracy: Vec<Accuracy>,
}

/// Says what will happen.
fn introduce(recipe: &Recipe, model: &Model<'_, Cpu>, plan: &Plan) {
    let layers = plan.layers.len();
    let groups: Vec<&str> = plan
        .layers
        .iter()
        .max_by_key(|groups| groups.len())
        .into_iter()
        .flatten()
        .map(|g| &*g.name)
        .collect();
    println!("model     {} ({layers} layers)", show(&recipe.model.path));
    let overrides = match recipe.overrides.len() {
        0 => String::new(),
        1 => ", with 1 override".into(),
        n => format!(", with {n} overrides"),
    };
    println!(
        "mask      {}, {}, {:.0}% of {} pruned{overrides}",
        recipe.mask.init,
        recipe.sparsity.pattern,
        100.0 * recipe.sparsity.ratio,
        plan_size(plan, model)
    );
    if let Some(rebuild) = &recipe.rebuild {
        let stages: Vec<&str> = recipe.metric.iter().map(|stage| stage.metric.as_str()).collect();
        println!(
            "rebuild   scope {}, alpha {}, metric {}, blocks {}",
            rebuild.scope,
            rebuild.alpha,
            stages.join(" · "),
            groups.join(", ")
        );
    }
}

fn plan_size(plan: &Plan, model: &Model<'_, Cpu>) -> String {
    let layers = 0..plan.layers.len();
    let weights: usize = layers
        .flat_map(|layer| plan.matrices(&model.decoder, layer))
        .map(|(_, linear)| linear.dims.len())
        .sum();
    format!("{weights} weights")
}

fn initial_masks(
    recipe: &Recipe,
    model: &Model<'_, Cpu>,
    plan: &Plan,
    calibration: &[Vec<u32>],
    scratch: &Path,
    quiet: bool,
) -> Result<Pruned, Error> {
    let bar = bar("initial masks", plan.layers.len() as u64, quiet);
    let settings = Start { init: recipe.mask.init, dtype: recipe.output.dtype, scratch };
    let pruned = start(model, plan, &settings, calibration, &mut |event| {
        if let Event::Layer(_) = event {
            bar.inc(1);
        }
    });
    bar.finish_and_clear();
    Ok(pruned?)
}

fn rebuilt_masks(
    loaded: &Loaded,
    model: &Model<'_, Cpu>,
    plan: &Plan,
    calibration: &[Vec<u32>],
    initial: Pruned,
    quiet: bool,
    groups: &mut Vec<GroupReport>,
) -> Result<Pruned, Error> {
    let Some(wanted) = &loaded.recipe.rebuild else { return Ok(initial) };
    let settings =
        Rebuild { alpha: wanted.alpha, retain: wanted.retain, pipeline: &loaded.pipeline()? };
    let bar = bar("rebuild", plan.layers.iter().map(|groups| groups.len() as u64).sum(), quiet);
    let pruned = rebuild(model, plan, &settings, calibration, initial, &mut |event| {
        if let Event::Group(report) = event {
            tracing::info!(
                layer = report.layer,
                group = report.group,
                before = report.error_before,
                after = report.error_after,
                "rebuilt"
            );
            groups.push(report.clone());
            bar.inc(1);
        }
    });
    bar.finish_and_clear();
    Ok(pruned?)
}

/// What the metrics of the rebuild need, if there is one.
pub(super) fn calibration_needs(loaded: &Loaded) -> Result<Option<Needs>, Error> {
    if loaded.recipe.rebuild.is_none() {
        return Ok(None);
    }
    let stages = loaded.pipeline()?;
    Ok(Some(stages.iter().fold(Needs::NOTHING, |needs, (_, stage)| needs.or(stage.needs()))))
}

fn digests(recipe: &Recipe, reader: &Reader) -> Result<BTreeMap<PathBuf, String>, Error> {
    let mut inputs = BTreeMap::new();
    let tokenizer = reader.path().join("tokenizer.json");
    let files = reader
        .weight_files()
        .map(Path::to_owned)
        .chain([reader.path().join("config.json")])
        .chain(tokenizer.is_file().then_some(tokenizer))
        .chain(recipe.calibration.source.iter().filter(|_| recipe.calibrates()).cloned())
        .chain(recipe.evaluate.perplexity.iter().map(|text| text.path.clone()))
        .chain(recipe.evaluate.tasks.values().cloned());
    for file in files {
        inputs.insert(file.clone(), digest(&file)?);
    }
    Ok(inputs)
}

/// Adds the report and the resolved recipe, and gives the output its name.
fn finish(recipe: Recipe, summary: &Summary, output: Output) -> Result<(), Error> {
    let report = |e: &dyn std::fmt::Display| Error::Report(e.to_string());
    let json = serde_json::to_string_pretty(summary).map_err(|e| report(&e))?;
    output.add_file("barber-report.json", format!("{json}\n").as_bytes())?;
    let resolved = recipe.absolute().map_err(|e| report(&e))?;
    let resolved = resolved.to_toml().map_err(|e| report(&e))?;
    output.add_file("barber-recipe.toml", resolved.as_bytes())?;
    output.finish()?;
    Ok(())
}
