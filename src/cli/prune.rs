//! `barber prune`: a recipe from its text to a checkpoint.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use barber_metric::Needs;
use bytesize::ByteSize;

use super::{
    Error,
    check::expected,
    evaluate::{Asked, measure, tokens},
    on_device,
    phases::Phases,
    progress::bar,
    show,
    summary::Summary,
};
use crate::{
    calibration::{Samples, Text, Tokens, samples, segments},
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
        Allocation, Alpha, Event, GroupReport, Method, Rebuild, Reconstruct, Refine, Refinement,
        Sampled, Stage, Start, Swap, allocate, refine, start,
    },
    recipe::{Calibration, Evaluate, Kind, Loaded, Recipe, Rounds, Share, Values, load},
    report::{self, Matrix, Report, Size, Stages, TaskReport, TextReport},
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

/// The phase in which no masks are made.
pub(super) const EVALUATION: &str = "evaluation";

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
    let plan = plan(loaded, &model)?;
    let target = recipe.output.path.as_deref().unwrap_or(Path::new(""));
    let output = Output::create(target, arguments.force, reader.path())?;
    let tests = Tests::read(recipe, &model)?;
    let mut run =
        Run::prepare(loaded, plan, &mut model, &tests, available, output.scratch(), quiet)?;
    if !quiet {
        introduce(recipe, run.model, &run.plan);
    }

    let mut phases = Phases::default();
    let dense =
        phases.run(EVALUATION, || tests.measure(run.model, &Pruned::default(), "dense", quiet))?;
    let Made { allocation, pruned, initial, refined, groups } = run.prune(true, &mut phases)?;

    let changed = phases.run("writing", || {
        let bytes = reader.names().filter_map(|name| reader.tensor(name).ok());
        let bar = bar("writing", bytes.map(|tensor| tensor.bytes.len() as u64).sum(), quiet);
        let changed =
            output.write(&reader, recipe.output.dtype, &pruned, |bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        Ok::<_, Error>(changed)
    })?;
    let perplexity = tests.texts.iter().enumerate().map(|(i, (text, _))| TextReport {
        text: text.label(),
        found: Stages {
            dense: dense.perplexity[i],
            initial: initial.as_ref().map(|found| found.perplexity[i]),
            refined: refined.as_ref().map(|found| found.perplexity[i]),
        },
    });
    let accuracy = tests.tasks.iter().enumerate().map(|(i, asked)| TaskReport {
        task: asked.task.name.into(),
        found: Stages {
            dense: dense.accuracy[i],
            initial: initial.as_ref().map(|found| found.accuracy[i]),
            refined: refined.as_ref().map(|found| found.accuracy[i]),
        },
    });
    let prunable: usize = pruned.masks.values().map(|mask| mask.dims().len()).sum();
    let kept: usize = pruned.masks.values().map(|mask| mask.kept()).sum();
    let report = Report {
        barber: env!("CARGO_PKG_VERSION").into(),
        model: recipe.model.path.clone(),
        output: output.target().to_owned(),
        prunable_weights: prunable,
        pruned_weights: prunable - kept,
        changed_weights: changed,
        allocation,
        perplexity: perplexity.collect(),
        tasks: accuracy.collect(),
        matrices: Matrix::all(&run.plan, &run.model.decoder, &pruned.masks, &groups),
        groups,
        seconds: phases.seconds,
        memory: phases.memory,
        size: Size { dense: size(reader.weight_files())?, pruned: written(output.scratch())? },
        operations: run.work.get(),
        least_operations: run.least_operations,
        recipe: loaded.settings().map_err(|e| Error::Report(e.to_string()))?,
        inputs: digests(recipe, &reader)?,
    };
    let mut resolved = recipe.clone();
    resolved.model.revision = located.commit;
    finish(resolved, &report, output)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::Report(e.to_string()))?);
    } else {
        println!("{}", Summary(&report));
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

/// What the models of a run are tested on.
pub(super) struct Tests {
    /// Texts, in segments.
    pub(super) texts: Texts,
    /// Tasks, with their questions.
    pub(super) tasks: Vec<Asked>,
    tokens: Tokens,
}

impl Tests {
    /// Those that a recipe names.
    pub(super) fn read<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Self, Error> {
        let tokens = tokens(model, recipe.evaluate.special_tokens);
        Ok(Self { texts: texts(recipe, model)?, tasks: tasks(recipe)?, tokens })
    }

    /// What they say of a model as pruning left it, which the progress bars call `name`.
    pub(super) fn measure<D: Ops>(
        &self,
        model: &Model<'_, D>,
        pruned: &Pruned,
        name: &str,
        quiet: bool,
    ) -> Result<Found, Error> {
        let mut found = Found::default();
        for (_, segments) in &self.texts {
            let name = format!("perplexity, {name}");
            found.perplexity.push(measure(model, pruned, segments, &name, quiet)?);
        }
        for asked in &self.tasks {
            let name = format!("{}, {name}", asked.task.name);
            found.accuracy.push(asked.answer(model, pruned, &self.tokens, &name, quiet)?);
        }
        Ok(found)
    }
}

/// What was measured of one model.
#[derive(Default)]
pub(super) struct Found {
    /// Text by text.
    pub(super) perplexity: Vec<Perplexity>,
    /// Task by task.
    pub(super) accuracy: Vec<Accuracy>,
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

/// A run of a recipe on a model, ready to go.
pub(super) struct Run<'a, D: Ops> {
    loaded: &'a Loaded,
    model: &'a Model<'a, D>,
    plan: Plan,
    tests: &'a Tests,
    /// The calibration samples.
    ids: Vec<Vec<u32>>,
    scratch: &'a Path,
    quiet: bool,
    /// The operations of matrix products so far.
    work: Cell<u64>,
    /// Those that the masks need.
    least_operations: f64,
}

/// What a run made, and what was measured of it.
#[derive(Default)]
pub(super) struct Made {
    /// The share of each layer that is pruned, where it is not the same of all.
    allocation: Vec<f64>,
    /// The last masks.
    pruned: Pruned,
    /// Of the initial masks.
    pub(super) initial: Option<Found>,
    /// Of the refined ones, if there is a refinement.
    pub(super) refined: Option<Found>,
    groups: Vec<GroupReport>,
}

impl<'a, D: Ops> Run<'a, D> {
    /// Reads the calibration samples, and sees to where they wait: in what is left of so many bytes
    /// of memory that are `available`, or in scratch files.
    pub(super) fn prepare(
        loaded: &'a Loaded,
        plan: Plan,
        model: &'a mut Model<'_, D>,
        tests: &'a Tests,
        available: u64,
        scratch: &'a Path,
        quiet: bool,
    ) -> Result<Self, Error> {
        let recipe = &loaded.recipe;
        let ids = calibrate(recipe, model)?;
        let expected = estimate(&model.decoder, &plan, &expected(loaded, model, &tests.texts)?);
        let left = left(recipe, available, expected.memory)?;
        model.executor.storage = Storage::new(recipe.executor.stream_dtype, left, scratch);
        let (work, least_operations) = (Cell::default(), expected.pruning);
        Ok(Self { loaded, model, plan, tests, ids, scratch, quiet, work, least_operations })
    }
}

impl<D: Ops> Run<'_, D> {
    /// Makes the masks and measures the last ones, and those before their refinement if `both`.
    pub(super) fn prune(&mut self, both: bool, phases: &mut Phases) -> Result<Made, Error> {
        let recipe = &self.loaded.recipe;
        let refines = !recipe.refine.is_empty();
        let (tests, model, quiet) = (self.tests, self.model, self.quiet);
        let measured = |phases: &mut Phases, pruned: &Pruned, name: &str| {
            phases.run(EVALUATION, || tests.measure(model, pruned, name, quiet).map(Some))
        };
        let mut made = Made::default();
        if let Some(allocation) = recipe.allocation() {
            (self.plan, made.allocation) =
                phases.run("allocation", || self.allocated(allocation))?;
        }
        if !single_pass(recipe) {
            made.pruned = phases.run("initial masks", || self.initial())?;
            if both || !refines {
                made.initial = measured(phases, &made.pruned, "initial masks")?;
            }
        }
        if refines {
            let initial = std::mem::take(&mut made.pruned);
            made.pruned = phases.run("refinement", || self.refined(initial, &mut made.groups))?;
            made.refined = measured(phases, &made.pruned, "refined")?;
        }
        Ok(made)
    }

    /// Allocates the zeros to the layers; returns each layer's share.
    fn allocated(&self, allocation: Allocation) -> Result<(Plan, Vec<f64>), Error> {
        let bar = bar("allocation", self.plan.layers.len() as u64, self.quiet);
        let mut plan = self.plan.clone();
        let budget = (allocation, self.loaded.recipe.sparsity.ratio);
        let (start, samples) = (self.start(), self.samples());
        let shares = self.counted(|| {
            allocate(self.model, &mut plan, budget, &start, samples, &mut || bar.inc(1))
        });
        bar.finish_and_clear();
        Ok((plan, shares?))
    }

    fn samples(&self) -> Sampled<'_> {
        Sampled { ids: &self.ids, held_out: self.loaded.recipe.calibration.held_out }
    }

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
            self.counted(|| start(self.model, &self.plan, &settings, self.samples(), &mut event));
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
        let (model, plan, samples) = (self.model, &self.plan, self.samples());
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

/// The bytes of some files.
fn size(files: impl Iterator<Item = impl AsRef<Path>>) -> Result<u64, Error> {
    let length = |file: &Path| {
        let found = fs::metadata(file).map(|found| found.len());
        found.map_err(|source| Error::File { path: file.to_owned(), source })
    };
    files.map(|file| length(file.as_ref())).sum()
}

/// The bytes of the weights that were written to a directory.
fn written(dir: &Path) -> Result<u64, Error> {
    let failed = |source| Error::File { path: dir.to_owned(), source };
    let files = fs::read_dir(dir).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()));
    let files = files.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    size(files.iter().filter(|file| file.extension().is_some_and(|e| e == "safetensors")))
}

/// Adds the report and the resolved recipe, and gives the output its name.
fn finish(recipe: Recipe, report: &Report, output: Output) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Report(e.to_string());
    let json = serde_json::to_string_pretty(report).map_err(|e| failed(&e))?;
    output.add_file(report::JSON, format!("{json}\n").as_bytes())?;
    let page = report::page(report).map_err(|e| failed(&e))?;
    output.add_file(report::HTML, page.as_bytes())?;
    let resolved = recipe.absolute().map_err(|e| failed(&e))?;
    let resolved = resolved.to_toml().map_err(|e| failed(&e))?;
    output.add_file("barber-recipe.toml", resolved.as_bytes())?;
    output.finish()?;
    Ok(())
}
