//! `barber prune`: a recipe from its text to a checkpoint.

use std::{
    cell::Cell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use barber_metric::Needs;
use bytesize::ByteSize;

use super::{
    Error,
    check::expected,
    evaluate::{Asked, measure, tokens},
    on_device,
    progress::bar,
    show,
    summary::{Stages, Summary, TaskReport, TextReport},
};
use crate::{
    calibration::{Samples, Text, samples, segments},
    checkpoint::{Output, Pruned, Reader, digest},
    estimate::estimate,
    evaluate::{Accuracy, Perplexity, Task},
    executor::{
        Storage,
        ops::{Ops, operations},
    },
    hub::locate,
    mask::Scope,
    model::Model,
    plan::Plan,
    prune::{
        Alpha, Event, GroupReport, Method, Rebuild, Reconstruct, Refine, Refinement, Sampled,
        Stage, Start, Swap, allocate, refine, start,
    },
    recipe::{Calibration, Evaluate, Kind, Loaded, Recipe, Rounds, Share, Values, load},
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
    on_device!(loaded.recipe.executor.device, run_on(arguments, &loaded))
}

/// Runs on a device with so many bytes of memory free.
fn run_on<D: Ops>(
    device: D,
    available: u64,
    arguments: &Arguments,
    loaded: &Loaded,
) -> Result<(), Error> {
    let (recipe, quiet) = (&loaded.recipe, arguments.json);
    let new = |file: &str, bytes| bar(file, bytes, quiet);
    let located = locate(&recipe.model.path, recipe.model.revision.as_deref(), &new)?;
    let reader = Reader::open(&located.dir)?;
    let mut model = Model::new(&reader, device)?;
    let mut plan = plan(loaded, &model)?;
    let target = recipe.output.path.as_deref().unwrap_or(Path::new(""));
    let output = Output::create(target, arguments.force, reader.path())?;
    let calibration = calibrate(recipe, &model)?;
    let texts = texts(recipe, &model)?;
    let tasks = tasks(recipe)?;
    let expected = estimate(&model.decoder, &plan, &expected(loaded, &model, &texts)?);
    let left = left(recipe, available, expected.memory)?;
    model.executor.storage = Storage::new(recipe.executor.stream_dtype, left, output.scratch());
    let model = model;
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
    let mut groups = Vec::new();
    let work = Cell::new(0);
    let samples = Sampled { ids: &calibration, held_out: recipe.calibration.held_out };
    let scratch = output.scratch();
    let shares = match recipe.allocation() {
        Some(allocation) => timed(&mut mask_seconds, "allocation", || {
            let bar = bar("allocation", plan.layers.len() as u64, quiet);
            let (side, dtype) = (recipe.streams.statistics, recipe.output.dtype);
            let start = Start { init: recipe.mask.init, side, dtype, scratch };
            let budget = (allocation, recipe.sparsity.ratio);
            let shares = allocate(&model, &mut plan, budget, &start, samples, &mut || bar.inc(1));
            bar.finish_and_clear();
            Ok(shares?)
        })?,
        None => Vec::new(),
    };
    let masks = Masks { loaded, model: &model, plan: &plan, samples, scratch, quiet, work: &work };
    let mut initial_found = None;
    let mut initial = Pruned::default();
    if !single_pass(recipe) {
        initial = timed(&mut mask_seconds, "initial masks", || masks.initial())?;
        initial_found = Some(evaluated(&initial, "initial masks")?);
    }
    let (pruned, refined_found) = if recipe.refine.is_empty() {
        (initial, None)
    } else {
        let refined =
            timed(&mut mask_seconds, "refinement", || masks.refined(initial, &mut groups))?;
        let found = evaluated(&refined, "refined")?;
        (refined, Some(found))
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
            initial: initial_found.as_ref().map(|found| found.perplexity[i]),
            refined: refined_found.as_ref().map(|found| found.perplexity[i]),
        },
    });
    let accuracy = tasks.iter().enumerate().map(|(i, asked)| TaskReport {
        task: asked.task.name,
        found: Stages {
            dense: dense.accuracy[i],
            initial: initial_found.as_ref().map(|found| found.accuracy[i]),
            refined: refined_found.as_ref().map(|found| found.accuracy[i]),
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
        allocation: shares,
        perplexity: perplexity.collect(),
        tasks: accuracy.collect(),
        groups,
        seconds,
        operations: work.get(),
        least_operations: expected.pruning,
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

pub(super) fn plan<D: Ops>(loaded: &Loaded, model: &Model<'_, D>) -> Result<Plan, Error> {
    let blocks = loaded.recipe.blocks.iter();
    let blocks: Vec<_> = blocks.map(|block| (block.name.clone(), block.layers.clone())).collect();
    let rules = loaded.rules(model.decoder.linears().map(|linear| linear.weight.as_str()))?;
    Ok(Plan::new(&model.decoder, &blocks, |name| rules.of(name))?)
}

fn calibrate<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Vec<Vec<u32>>, Error> {
    let Some(source) = recipe.calibration.source.as_deref().filter(|_| recipe.calibrates()) else {
        return Ok(Vec::new());
    };
    let wanted = Samples {
        count: recipe.calibration.samples + recipe.calibration.held_out,
        sequence_length: recipe.calibration.sequence_length,
        seed: recipe.calibration.seed,
        selection: recipe.calibration.selection,
    };
    let Calibration { field, special_tokens, .. } = &recipe.calibration;
    let text = Text { field: Some(field.clone()), ..Text::from(source) };
    Ok(samples(&text, wanted, &tokens(model, *special_tokens))?)
}

pub(super) type Texts = Vec<(Text, Vec<Vec<u32>>)>;

pub(super) fn texts<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Texts, Error> {
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
fn introduce<D: Ops>(recipe: &Recipe, model: &Model<'_, D>, plan: &Plan) {
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
    for stage in &recipe.refine {
        println!("refine    {}", describe(stage, recipe, &groups));
    }
}

/// What a stage of the refinement is, in a line.
fn describe(stage: &crate::recipe::Refine, recipe: &Recipe, groups: &[&str]) -> String {
    let scope = stage.scope.unwrap_or(Scope::Row);
    match stage.stage {
        Some(Kind::Rebuild) => {
            let metrics: Vec<&str> = recipe.metric.iter().map(|of| of.metric.as_str()).collect();
            let alpha = match stage.alpha {
                Some(Share(Alpha::Share(alpha))) => alpha.to_string(),
                _ => "auto".into(),
            };
            format!(
                "rebuild, scope {scope}, alpha {alpha}, metric {}, blocks {}",
                metrics.join(" · "),
                groups.join(", ")
            )
        }
        Some(Kind::Swap) => {
            let limit = stage.limit.unwrap_or_default();
            format!("swap, scope {scope}, at most {limit} a row, blend {}", recipe.streams.blend)
        }
        Some(Kind::Reconstruct) => "reconstruct: kept weights change".into(),
        None => String::new(),
    }
}

fn plan_size<D: Ops>(plan: &Plan, model: &Model<'_, D>) -> String {
    let layers = 0..plan.layers.len();
    let weights: usize = layers
        .flat_map(|layer| plan.matrices(&model.decoder, layer))
        .map(|(_, linear)| linear.dims.len())
        .sum();
    format!("{weights} weights")
}

/// Bytes of memory that are left for what waits between layers.
fn left(recipe: &Recipe, available: u64, needed: f64) -> Result<u64, Error> {
    let given = recipe.executor.memory.map(|memory| memory.as_u64());
    let left = given.unwrap_or(available).checked_sub(needed as u64);
    if let (None, Some(_)) = (left, given) {
        return Err(Error::Memory { needed: ByteSize(needed as u64) });
    }
    Ok(left.unwrap_or_else(|| {
        tracing::warn!(
            "the run needs about {} of memory, but {} are free",
            ByteSize(needed as u64),
            ByteSize(available)
        );
        0
    }))
}

/// What the masks are made with.
struct Masks<'a, D: Ops> {
    loaded: &'a Loaded,
    model: &'a Model<'a, D>,
    plan: &'a Plan,
    samples: Sampled<'a>,
    scratch: &'a Path,
    quiet: bool,
    /// The operations of matrix products so far.
    work: &'a Cell<u64>,
}

impl<D: Ops> Masks<'_, D> {
    fn counted<T>(&self, run: impl FnOnce() -> T) -> T {
        let before = operations();
        let result = run();
        self.work.set(self.work.get() + operations() - before);
        result
    }

    fn start(&self) -> Start<'_> {
        let Recipe { mask, output, .. } = &self.loaded.recipe;
        let side = self.loaded.recipe.streams.statistics;
        Start { init: mask.init, side, dtype: output.dtype, scratch: self.scratch }
    }

    fn initial(&self) -> Result<Pruned, Error> {
        let bar = bar("initial masks", self.plan.layers.len() as u64, self.quiet);
        let settings = self.start();
        let mut event = |event: Event<'_>| {
            if let Event::Layer(_) = event {
                bar.inc(1);
            }
        };
        let pruned =
            self.counted(|| start(self.model, self.plan, &settings, self.samples, &mut event));
        bar.finish_and_clear();
        Ok(pruned?)
    }

    /// The stage that a recipe describes.
    fn stage<'s>(
        &'s self,
        stage: &crate::recipe::Refine,
        pipeline: &'s [Stage],
    ) -> Option<Refine<'s>> {
        let scope = stage.scope.unwrap_or(Scope::Row);
        Some(match stage.stage? {
            Kind::Swap => {
                let shrinkage = stage.shrinkage? as f32;
                Refine::Swap(Swap { scope, limit: stage.limit?, shrinkage })
            }
            Kind::Rebuild => {
                let (Share(alpha), Rounds(rounds)) = (stage.alpha?, stage.rounds?);
                let (at, retain) = (stage.gradient?, stage.retain?);
                Refine::Rebuild(Rebuild { alpha, scope, at, rounds, retain, pipeline })
            }
            Kind::Reconstruct => Refine::Reconstruct(Reconstruct {
                method: match stage.method? {
                    Values::LeastSquares => Method::LeastSquares {
                        damping: stage.damping?,
                        shrinkage: stage.shrinkage? as f32,
                    },
                    Values::Gradient => {
                        Method::Gradient { passes: stage.passes?, rate: stage.rate? as f32 }
                    }
                },
                dtype: self.loaded.recipe.output.dtype,
                scratch: self.scratch,
            }),
        })
    }

    /// Refines the masks, with a report of each group.
    fn refined(&self, initial: Pruned, groups: &mut Vec<GroupReport>) -> Result<Pruned, Error> {
        let recipe = &self.loaded.recipe;
        let pipeline = self.loaded.pipeline()?;
        let stages: Vec<_> =
            recipe.refine.iter().filter_map(|stage| self.stage(stage, &pipeline)).collect();
        let refinement = Refinement {
            stages: &stages,
            blend: recipe.streams.blend as f32,
            statistics: recipe.streams.statistics,
            start: single_pass(recipe).then(|| self.start()),
        };
        let all = self.plan.layers.iter().map(|groups| groups.len() as u64).sum();
        let bar = bar("refinement", all, self.quiet);
        let mut event = |event: Event<'_>| {
            if let Event::Group(report) = event {
                for stage in &report.stages {
                    tracing::info!(
                        layer = report.layer,
                        group = report.group,
                        stage = stage.stage,
                        before = stage.before.calibration,
                        after = stage.after.calibration,
                        held_out_before = stage.before.held_out,
                        held_out_after = stage.after.held_out,
                        accepted = stage.accepted,
                        "refined"
                    );
                }
                groups.push(report.clone());
                bar.inc(1);
            }
        };
        let (model, plan, samples) = (self.model, self.plan, self.samples);
        let pruned =
            self.counted(|| refine(model, plan, &refinement, samples, initial, &mut event));
        bar.finish_and_clear();
        Ok(pruned?)
    }
}

/// Whether initial masks are made and refined in one pass.
pub(super) fn single_pass(recipe: &Recipe) -> bool {
    recipe.mask.passes == 1 && !recipe.refine.is_empty()
}

/// What the metrics of rebuilds need, if there are any.
pub(super) fn calibration_needs(loaded: &Loaded) -> Result<Option<Needs>, Error> {
    let rebuilds = |stage: &crate::recipe::Refine| stage.stage == Some(Kind::Rebuild);
    if !loaded.recipe.refine.iter().any(rebuilds) {
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
