//! A run: a recipe from its text to a checkpoint.
//!
//! [`prune`] is all of it; the command line calls it too.

mod device;
mod error;
mod measure;
mod phases;
mod watch;

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use barber_metric::Needs;
use bytesize::ByteSize;

pub(crate) use self::{
    device::on_device,
    measure::{Asked, Found, Tests, Texts, measure, texts, tokens},
    phases::Phases,
};
pub use self::{error::Error, watch::Watch};
use crate::{
    calibration::{Samples, Text, samples},
    checkpoint::{Output, Pruned, Reader, digest},
    estimate::{Run as Expected, estimate},
    evaluate::STATES,
    executor::{
        Storage,
        ops::{Ops, operations},
    },
    hub::locate,
    mask::Scope,
    model::Model,
    plan::Plan,
    prune::{
        Allocation, Event, GroupReport, Method, Rebuild, Reconstruct, Refine, Refinement, Sampled,
        Side, Stage, Start, Swap, allocate, refine, start,
    },
    recipe::{Calibration, Kind, Loaded, Recipe, Rounds, Share, Values},
    report::{self, Matrix, Report, Size, Stages, TaskReport, TextReport},
};

/// The phase in which no masks are made.
pub(crate) const EVALUATION: &str = "evaluation";

/// How a run deals with what is there, and who watches it.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// Replace the output directory if it exists.
    pub force: bool,
    /// Who watches; `&()` for nobody.
    pub watch: &'a dyn Watch,
}

impl Default for Settings<'_> {
    fn default() -> Self {
        Self { force: false, watch: &() }
    }
}

/// Prunes a checkpoint as a recipe says, and writes the pruned one to the recipe's `output.path`,
/// with the report and the resolved recipe beside its weights.
///
/// # Errors
/// If the recipe does not fit the model, something cannot be read, run or written, or the output is
/// there and may not be replaced. Nothing half-written is left.
pub fn prune(loaded: &Loaded, settings: &Settings<'_>) -> Result<Report, Error> {
    on_device!(loaded.recipe.executor.device, prune_on(loaded, settings))
}

/// Runs on a device with so many bytes of memory free.
fn prune_on<D: Ops>(
    device: D,
    available: u64,
    loaded: &Loaded,
    settings: &Settings<'_>,
) -> Result<Report, Error> {
    let (recipe, watch) = (&loaded.recipe, settings.watch);
    let new = |file: &str, bytes| watch.bar(file, bytes);
    let located = locate(&recipe.model.path, recipe.model.revision.as_deref(), &new)?;
    let reader = Reader::open(&located.dir)?;
    let mut model = Model::new(&reader, device)?;
    let plan = plan(loaded, &model)?;
    let target = recipe.output.path.as_deref().unwrap_or(Path::new(""));
    let output = Output::create(target, settings.force, reader.path())?;
    let tests = Tests::read(recipe, &model)?;
    let mut run =
        Run::prepare(loaded, plan, &mut model, &tests, available, output.scratch(), watch)?;
    watch.begin(recipe, &run.model.decoder, &run.plan);

    let mut phases = Phases::default();
    let dense =
        phases.run(EVALUATION, || tests.measure(run.model, &Pruned::default(), "dense", watch))?;
    let Made { allocation, pruned, initial, refined, groups } = run.prune(true, &mut phases)?;

    let changed = phases.run("writing", || {
        let bytes = reader.names().filter_map(|name| reader.tensor(name).ok());
        let bar = watch.bar("writing", bytes.map(|tensor| tensor.bytes.len() as u64).sum());
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
    Ok(report)
}

pub(crate) fn plan<D: Ops>(loaded: &Loaded, model: &Model<'_, D>) -> Result<Plan, Error> {
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
pub(crate) struct Run<'a, D: Ops> {
    loaded: &'a Loaded,
    model: &'a Model<'a, D>,
    plan: Plan,
    /// What scores weights for initial masks.
    initial_pipeline: Vec<Stage>,
    tests: &'a Tests,
    /// The calibration samples.
    ids: Vec<Vec<u32>>,
    scratch: &'a Path,
    watch: &'a dyn Watch,
    /// The operations of matrix products so far.
    work: Cell<u64>,
    /// Those that the masks need.
    least_operations: f64,
}

/// What a run made, and what was measured of it.
#[derive(Default)]
pub(crate) struct Made {
    /// The share of each layer that is pruned, where it is not the same of all.
    allocation: Vec<f64>,
    /// The last masks.
    pruned: Pruned,
    /// Of the initial masks.
    pub(crate) initial: Option<Found>,
    /// Of the refined ones, if there is a refinement.
    pub(crate) refined: Option<Found>,
    groups: Vec<GroupReport>,
}

impl<'a, D: Ops> Run<'a, D> {
    /// Reads the calibration samples, and sees to where they wait: in what is left of so many bytes
    /// of memory that are `available`, or in scratch files.
    pub(crate) fn prepare(
        loaded: &'a Loaded,
        plan: Plan,
        model: &'a mut Model<'_, D>,
        tests: &'a Tests,
        available: u64,
        scratch: &'a Path,
        watch: &'a dyn Watch,
    ) -> Result<Self, Error> {
        let recipe = &loaded.recipe;
        let ids = calibrate(recipe, model)?;
        let expected = estimate(&model.decoder, &plan, &expected(loaded, model, &tests.texts)?);
        let left = left(recipe, available, expected.memory)?;
        model.executor.storage = Storage::new(recipe.executor.stream_dtype, left, scratch);
        let (work, least_operations) = (Cell::default(), expected.pruning);
        let initial_pipeline = loaded.initial_pipeline()?;
        Ok(Self {
            loaded,
            model,
            plan,
            initial_pipeline,
            tests,
            ids,
            scratch,
            watch,
            work,
            least_operations,
        })
    }
}

impl<D: Ops> Run<'_, D> {
    /// Makes the masks and measures the last ones, and those before their refinement if `both`.
    pub(crate) fn prune(&mut self, both: bool, phases: &mut Phases) -> Result<Made, Error> {
        let recipe = &self.loaded.recipe;
        let refines = !recipe.refine.is_empty();
        let (tests, model, watch) = (self.tests, self.model, self.watch);
        let measured = |phases: &mut Phases, pruned: &Pruned, name: &str| {
            phases.run(EVALUATION, || tests.measure(model, pruned, name, watch).map(Some))
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
        let bar = self.watch.bar("allocation", self.plan.layers.len() as u64);
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
        let metric = (&self.initial_pipeline[..], mask.scope.unwrap_or(Scope::Row));
        Start { init: mask.init, metric, side, dtype: output.dtype, scratch: self.scratch }
    }

    fn initial(&self) -> Result<Pruned, Error> {
        let bar = self.watch.bar("initial masks", self.plan.layers.len() as u64);
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
        let bar = self.watch.bar("refinement", all);
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
pub(crate) fn single_pass(recipe: &Recipe) -> bool {
    recipe.mask.passes == 1 && !recipe.refine.is_empty()
}

/// What the metrics of rebuilds need, if there are any.
pub(crate) fn calibration_needs(loaded: &Loaded) -> Result<Option<Needs>, Error> {
    let rebuilds = |stage: &crate::recipe::Refine| stage.stage == Some(Kind::Rebuild);
    if !loaded.recipe.refine.iter().any(rebuilds) {
        return Ok(None);
    }
    let stages = loaded.pipeline()?;
    Ok(Some(stages.iter().fold(Needs::NOTHING, |needs, (_, stage)| needs.or(stage.needs()))))
}

/// What decides how much the run will take.
pub(crate) fn expected<D: Ops>(
    loaded: &Loaded,
    model: &Model<'_, D>,
    texts: &Texts,
) -> Result<Expected, Error> {
    let recipe = &loaded.recipe;
    let tokens = texts.iter().flat_map(|(_, segments)| segments).map(Vec::len).sum();
    let single = single_pass(recipe);
    let works = |of: Kind| recipe.refine.iter().any(|stage| stage.stage == Some(of));
    Ok(Expected {
        samples: recipe.calibration.samples + recipe.calibration.held_out,
        sequence_length: recipe.calibration.sequence_length,
        start: recipe.initial_needs(),
        refined: (!recipe.refine.is_empty()).then_some(single),
        rebuild: calibration_needs(loaded)?,
        swaps: works(Kind::Swap) || works(Kind::Reconstruct),
        dense: recipe.streams.blend > 0.0 || recipe.streams.statistics == Side::Dense,
        stream_size: recipe.executor.stream_dtype.size(),
        evaluated: (tokens, if recipe.refine.is_empty() || single { 2 } else { 3 }),
        evaluated_at_once: STATES / model.decoder.hidden_size,
    })
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
