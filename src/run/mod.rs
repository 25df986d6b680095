//! A pruning run, from a recipe to a checkpoint: [`prune`], which the command line calls, too.

mod checkpointing;
mod checkpoints;
mod convert;
mod devices;
mod error;
mod forecast;
mod inputs;
mod measure;
mod phases;
mod progress;
mod reproduce;
mod schedule;
mod scratch;
mod shared;
#[cfg(test)]
mod tests;
mod together;
mod verify;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use bytesize::ByteSize;
use dfdx::tensor::Cpu;
use rayon::prelude::*;
use serde_json::Value;
use toml::Table;

pub(crate) use self::verify::recipe;
use self::{
    checkpointing::{Checkpointing, Phase},
    inputs::inputs,
    together::together,
};
pub(crate) use self::{
    checkpoints::Checkpoints,
    devices::{OnRanks, Outlook, Rates, Seconds},
    forecast::Forecast,
    inputs::Digests,
    measure::{Asked, Found, PARTS, Tests, check_text, measure, parts, tokens},
    progress::{Notes, Progress},
    shared::{Shared, of_beginning},
    together::alike,
};
pub use self::{
    convert::{Converted, convert},
    error::Error,
    reproduce::{Difference, Reproduced, reproduce},
    schedule::ScheduledPhase,
    scratch::ScratchDir,
    verify::{Dense, Finding, Verified, verify},
    watch::Watch,
};
use crate::{
    calibration::{self, Extent, Samples, Text, samples},
    checkpoint::{Existing, Form, Output, Pruned, RECIPE, Reader, digest, mask_bytes},
    dtype::Dtype,
    estimate::Run as Expected,
    evaluate::STATES,
    executor::{
        Executor, Storage,
        ops::{Ops, Products},
    },
    family::Decoder,
    journal::{self, Identity},
    model::Model,
    permutation,
    plan::Plan,
    progress::Steps,
    prune::{
        Allocation, InitialMasks, MetricStep, ModelState, Pass, Pruning, Refinement, Sampled,
        SavedStage, Side, SparseModel, allocate, initial_masks, permute, pipeline, refine,
        refine_model,
    },
    ranks::Ranks,
    recipe::{Calibration, Loaded, Recipe},
    report::{
        self, GenerationReport, Matrix, OutputError, Report, Size, Sizes, Stages, StructureReport,
        TaskReport, TextReport,
    },
    version::Version,
};

/// Calls a function with the device that a recipe names, whose products have the precision, and the
/// bytes of the device's free memory for one of the ranks on a machine.
macro_rules! on_device {
    ($device:expr, $precision:expr, $ranks:expr, $run:ident($($argument:expr),*)) => {{
        let precision: $crate::precision::Precision = $precision;
        let neighbours = $ranks.neighbours();
        #[cfg(not(feature = "cuda"))]
        let _ = precision;
        match $device {
            $crate::recipe::Device::Cpu => $run(
                dfdx::tensor::Cpu::default(),
                $crate::executor::available_memory() / neighbours.count as u64,
                $($argument),*
            ),
            #[cfg(feature = "cuda")]
            $crate::recipe::Device::Cuda(number) => {
                match $crate::executor::cuda(number, precision, neighbours) {
                    Ok((device, memory)) => $run(device, memory, $($argument),*),
                    Err(problem) => Err($crate::run::Error::Device(problem).into()),
                }
            }
            #[cfg(not(feature = "cuda"))]
            $crate::recipe::Device::Cuda(_) => Err($crate::run::Error::NoCuda.into()),
        }
    }};
}
pub(crate) use on_device;

/// Name of the phase that permutes inner channels.
pub(crate) const PERMUTATION: &str = "permutation";
/// Name of the phase that measures models.
pub(crate) const EVALUATION: &str = "evaluation";

/// How a run treats existing files, when it saves its state, and who watches it.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// Replace the output directory if it exists, and discard the state of an interrupted run.
    pub force: bool,
    /// Continue an interrupted run to the same output, if there is one.
    pub resume: bool,
    /// Minimum time between two saves of the run's state. Saves are farther apart where they would
    /// take more than a fiftieth of the time. Zero: after each layer. `None`: never.
    pub save_every: Option<Duration>,
    /// The watcher; `&()` for none.
    pub watch: &'a dyn Watch,
    /// The ranks that share the run.
    pub ranks: &'a Ranks,
}

impl Default for Settings<'_> {
    fn default() -> Self {
        let save_every = Some(Duration::from_secs(30));
        Self { force: false, resume: false, save_every, watch: &(), ranks: &Ranks::ONE }
    }
}

/// Prunes a checkpoint as a recipe says, and writes the pruned checkpoint, the report and the
/// resolved recipe to the recipe's `output.path`.
///
/// # Errors
/// If the recipe does not fit the model, something cannot be read, run or written, or the output
/// exists and may not be replaced. An incomplete output never has the output's name; the saved
/// state is beside it. After an error, the other ranks may still wait: [`Ranks::abort`] ends them.
pub fn prune(loaded: &Loaded, settings: &Settings<'_>) -> Result<Report, Error> {
    prune_among(loaded, settings, &mut Shared::default())
}

/// [`prune`] with data that runs of a sweep or study share.
pub(crate) fn prune_among(
    loaded: &Loaded,
    settings: &Settings<'_>,
    shared: &mut Shared,
) -> Result<Report, Error> {
    let of = &loaded.recipe.executor;
    on_device!(of.device, of.precision, settings.ranks, prune_on(loaded, settings, shared))
}

/// Runs on a device with `available` bytes of free memory.
fn prune_on<D: Ops>(
    device: D,
    available: u64,
    loaded: &Loaded,
    settings: &Settings<'_>,
    shared: &mut Shared,
) -> Result<Report, Error> {
    let (recipe, watch, ranks) = (&loaded.recipe, settings.watch, settings.ranks);
    let checkpoints = together(ranks, || Checkpoints::open(recipe, watch))?;
    let executor = Executor { ranks: ranks.clone(), ..Executor::from(device) };
    let mut model = together(ranks, || Ok(Model::<D>::new(&checkpoints.dense, executor)?))?;
    let (plan, resolved) = together(ranks, || {
        let plan = plan(loaded, &model)?;
        loaded.find_texts()?;
        Ok((plan, checkpoints.resolved(recipe)?))
    })?;
    let identity = || identity(&resolved, &checkpoints, &mut Digests::default());
    let identified = match ranks.size() {
        1 => None,
        _ => Some(together(ranks, identity)?),
    };
    alike(ranks, identified.as_slice())?;
    let identity = || identified.map_or_else(identity, Ok);
    let target = recipe.output.path.as_deref().unwrap_or(Path::new(""));
    let created = together(ranks, || {
        let existing = Existing { force: settings.force, resume: settings.resume };
        let inputs = loaded.inputs().chain(checkpoints.sparse_files());
        let bytes = least_bytes(recipe, &model, &plan)?;
        let create = || Output::create(target, existing, &checkpoints.dense, inputs, bytes);
        Ok(ranks.is_first().then(create).transpose()?)
    })?;
    let output = together(ranks, || Ok(created.map_or_else(|| Output::of_other(target), Ok)?))?;
    if ranks.of_first(output.is_complete()) {
        return at_first(ranks, &output, || completed(&identity()?, &output, watch));
    }
    let (tests, ids) = together(ranks, || {
        checkpoints.compare(&model, &plan, recipe.mask.retain, watch)?;
        let tests = shared.tests(recipe, || Tests::read(recipe, &model))?;
        Ok((tests, shared.samples(recipe, || calibrate(recipe, &model))?))
    })?;
    let place = (available, output.scratch());
    let run = together(ranks, || {
        let run = Run::prepare(loaded, plan, &mut model, &tests, ids, place, watch)?;
        Ok(run.with_zeros_of(checkpoints.sparse.as_ref()))
    })?;
    let identity = together(ranks, identity)?;
    let open = || {
        let (scratch, every) = (output.scratch(), settings.save_every);
        Ok(Checkpointing::open(scratch, identity.clone(), every, ranks)?)
    };
    // The first rank removes what an interrupted save left.
    let opened = together(ranks, || ranks.is_first().then(open).transpose())?;
    let checkpointing = together(ranks, || opened.map_or_else(open, Ok))?;
    if settings.resume {
        watch.resumes(output.left_over()?.as_deref());
    }
    finished(run, resolved, checkpointing, &output, shared).map_err(|error| error.leaves(&output))
}

/// The report of a run whose result the first rank writes with `write`, and the others wait for.
fn at_first(
    ranks: &Ranks,
    output: &Output,
    write: impl FnOnce() -> Result<Report, Error>,
) -> Result<Report, Error> {
    let report = together(ranks, || ranks.is_first().then(write).transpose())?;
    report.map_or_else(|| report::read(output.target()).map_err(Error::NoReport), Ok)
}

/// All that determines the result of a run.
pub(crate) fn identity(
    resolved: &Recipe,
    checkpoints: &Checkpoints,
    digests: &mut Digests,
) -> Result<Identity, Error> {
    let recipe = Table::try_from(resolved).map_err(|e| Error::Report(e.to_string()))?;
    Ok(Identity { recipe, inputs: digests.of(&inputs(resolved, checkpoints)?)? })
}

/// Renames a complete checkpoint to the output's name, if it is the result of this run.
fn completed(now: &Identity, output: &Output, watch: &dyn Watch) -> Result<Report, Error> {
    let dir = output.complete();
    let report = report::read(dir).map_err(Error::NoReport)?;
    if report.version != Version::current() {
        let (dir, by) = (output.scratch().to_owned(), report.version.to_string());
        return Err(journal::Error::OtherVersion { dir, by }.into());
    }
    let path = dir.join(RECIPE);
    let recipe = fs::read_to_string(&path).map_err(|source| Error::File { path, source })?;
    let recipe = toml::from_str(&recipe).map_err(|e| Error::Report(e.to_string()))?;
    let written = Identity { recipe, inputs: report.inputs.clone() };
    written.check(now, output.scratch())?;
    watch.resumes(Some("all is written"));
    output.finish()?;
    Ok(report)
}

/// Runs to the end, and renames the checkpoint to the output's name.
fn finished<D: Ops>(
    run: Run<'_, D>,
    resolved: Recipe,
    checkpointing: Checkpointing,
    output: &Output,
    shared: &mut Shared,
) -> Result<Report, Error> {
    let (model, tests, watch) = (run.model, run.tests, run.watch);
    let inputs = checkpointing.inputs().clone();
    // What is saved is read by all ranks before the first one saves more.
    let mut progress = together(&model.executor.ranks, || {
        Progress::resumed(checkpointing, model, run.samples(), output.scratch())
    })?;
    let recipe = &run.loaded.recipe;
    watch.begin(recipe, model.reader, &model.decoder, &run.plan);
    if progress.notes.dense.is_none() {
        watch.takes(&|| run.forecast.time(&model.executor.device, &model.decoder));
    }
    shared.begin(recipe, &mut progress, output.scratch())?;
    if progress.notes.dense.is_none() {
        let dense = || tests.measure(&model.written(None), &Pruned::dense(), "dense", watch);
        progress.notes.dense = Some(progress.notes.phases.run(EVALUATION, dense)?);
        shared.keep_dense(recipe, &progress.notes);
        progress.keep((model, &run.plan))?;
    }
    let ordered = run.ordered(&mut progress)?;
    let model = &model.read_by(&ordered);
    let mut run = run.on(model);
    run.begin(true, &mut progress)?;
    shared.keep(recipe, &progress, output.scratch())?;
    run.end(&mut progress)?;
    if model.executor.ranks.size() > 1 {
        tracing::info!(bytes = model.executor.ranks.sent(), "sent to other ranks");
    }
    let Progress { pass: Pass { pruned, .. }, notes, .. } = progress;
    at_first(&model.executor.ranks, output, || {
        written(&run, resolved, inputs, output, pruned, notes)
    })
}

/// Writes the result of a run.
fn written<D: Ops>(
    run: &Run<'_, D>,
    resolved: Recipe,
    inputs: BTreeMap<PathBuf, String>,
    output: &Output,
    pruned: Pruned,
    mut notes: Notes,
) -> Result<Report, Error> {
    let (model, tests, watch) = (run.model, run.tests, run.watch);
    let recipe = &run.loaded.recipe;
    let removal = run.plan.removal.as_ref().map(|of| of.settled(&model.decoder, &pruned));
    let written = notes.phases.run("writing", || {
        let tensors = model.reader.names().filter_map(|name| model.reader.tensor(name).ok());
        let bytes = tensors.map(|tensor| tensor.length() as u64).sum();
        let bar = watch.bar("writing", Steps::Bytes(bytes));
        let crate::recipe::Output { format, dtype, masks, .. } = resolved.output;
        let form = Form { format, dtype, masks };
        let cuts = removal.as_ref().map(|of| of.cuts(&model.decoder, &pruned.masks));
        let result = (&pruned, cuts.as_ref());
        let written = output.write(model.reader, form, result, |bytes| bar.advance(bytes))?;
        Ok::<_, Error>(written)
    })?;
    let Notes {
        dense,
        initial,
        refined,
        permuted,
        allocation,
        groups,
        experts,
        steps,
        phases,
        products,
        ..
    } = notes;
    let dense = dense.unwrap_or_default();
    let perplexity = tests.texts.iter().enumerate().map(|(i, (text, _))| TextReport {
        text: text.label(),
        found: Stages {
            dense: dense.perplexity[i].clone(),
            initial: initial.as_ref().map(|found| found.perplexity[i].clone()),
            refined: refined.as_ref().map(|found| found.perplexity[i].clone()),
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
    let generations = tests.prompts.iter().enumerate().map(|(i, prompt)| GenerationReport {
        prompt: prompt.text.clone(),
        found: Stages {
            dense: dense.generations[i].clone(),
            initial: initial.as_ref().map(|found| found.generations[i].clone()),
            refined: refined.as_ref().map(|found| found.generations[i].clone()),
        },
    });
    let calibration = Extent::of_samples(&run.ids, recipe.calibration.held_out);
    let mut settled = recipe.clone();
    settled.calibration.sequence_length = resolved.calibration.sequence_length;
    settled.evaluate.sequence_length = resolved.evaluate.sequence_length;
    let matrices = Matrix::all(&run.plan, &model.decoder, &pruned.masks, &groups);
    let prunable: usize = matrices.iter().map(Matrix::weights).sum();
    let kept: usize = matrices.iter().map(|matrix| matrix.kept).sum();
    let report = Report {
        version: Version::current(),
        model: recipe.model.reference().0.to_owned(),
        quantisation: model.reader.quantisation()?.map(ToString::to_string),
        output: output.target().to_owned(),
        model_weights: model.reader.weights(),
        output_weights: written.weights,
        prunable_weights: prunable,
        pruned_weights: prunable - kept,
        changed_weights: written.changed,
        changed_biases: written.changed_biases,
        permuted: permuted.unwrap_or_default(),
        allocation,
        perplexity: perplexity.collect(),
        tasks: accuracy.collect(),
        generations: generations.collect(),
        structures: removal.map_or_else(Vec::new, |removal| {
            StructureReport::all(&removal, &model.decoder, &pruned.masks)
        }),
        output_error: OutputError::of(&groups),
        groups,
        experts,
        steps,
        seconds: phases.seconds,
        memory: phases.memory,
        calibration: (!run.ids.is_empty()).then_some(calibration),
        sizes: Sizes {
            format: resolved.output.format,
            dense: Size {
                weight_bytes: model.reader.weight_bytes(),
                directory_bytes: model.reader.directory_bytes()?,
            },
            output: Size {
                weight_bytes: written.weight_bytes,
                directory_bytes: written.directory_bytes,
            },
            pruned_matrices: matrices.len(),
            compressed_matrices: written.compressed,
        },
        operations: products.operations,
        product_seconds: products.seconds,
        least_operations: run.forecast.takes.pruning - run.forecast.takes.solving,
        recipe: run.loaded.settings_of(&settled).map_err(|e| Error::Report(e.to_string()))?,
        matrices,
        inputs,
        outputs: BTreeMap::new(),
    };
    output
        .add_file(report::CARD, report::card(&resolved, &report, model.reader.path()).as_bytes())?;
    finish(&resolved, report, output)
}

/// The plan of a recipe for a model. Checks that all other tensors are finite.
pub(crate) fn plan<D: Ops>(loaded: &Loaded, model: &Model<'_, D>) -> Result<Plan, Error> {
    let (decoder, reader) = (&model.decoder, model.reader);
    let plan = plan_of(loaded, decoder, reader.names(), reader.config())?;
    let pruned = (0..plan.layers.len()).flat_map(|layer| plan.matrices(decoder, layer));
    model.check_finite(&pruned.map(|(_, linear)| linear.weight.as_str()).collect())?;
    Ok(plan)
}

/// The plan of a recipe for a model with these tensors.
fn plan_of<'a>(
    loaded: &Loaded,
    decoder: &'a Decoder,
    names: impl Iterator<Item = &'a str>,
    config: &Value,
) -> Result<Plan, Error> {
    let blocks = loaded.recipe.blocks.iter();
    let blocks: Vec<_> = blocks.map(|block| (block.name.clone(), block.layers.clone())).collect();
    let matrices = decoder.projections().map(|linear| linear.weight.as_str());
    let rules = loaded.rules(names, matrices)?;
    let plan = match loaded.removal(&rules, decoder, config)? {
        Some(removal) => Plan::of_structures(decoder, removal)?,
        None => Plan::new(decoder, &blocks, |name| rules.of(name))?,
    };
    let pruned = (0..plan.layers.len()).flat_map(|layer| plan.matrices(decoder, layer));
    let widths = pruned
        .map(|(member, linear)| (linear.weight.as_str(), linear.dims.columns, member.rule.pattern));
    loaded.check_widths(&rules, widths)?;
    loaded.check_permutation(&plan, decoder)?;
    Ok(plan)
}

/// Least bytes of the tensors of a run's result, and of its masks.
fn least_bytes<D: Ops>(recipe: &Recipe, model: &Model<'_, D>, plan: &Plan) -> Result<u64, Error> {
    let cuts = plan.removal.as_ref().map(|of| of.smallest(&model.decoder));
    let crate::recipe::Output { format, dtype, .. } = recipe.output;
    let tensors = Output::least_bytes(model.reader, format, dtype, cuts.as_ref());
    Ok(tensors + masks(recipe, model, plan)?.unwrap_or(0))
}

/// Bytes of the file of masks that a run writes; `None` if it writes none.
pub(crate) fn masks<D: Ops>(
    recipe: &Recipe,
    model: &Model<'_, D>,
    plan: &Plan,
) -> Result<Option<u64>, Error> {
    if !recipe.output.masks {
        return Ok(None);
    }
    let layers = 0..plan.layers.len();
    let matrices = layers.flat_map(|layer| plan.matrices(&model.decoder, layer));
    let pruned: BTreeSet<&str> = matrices.map(|(_, linear)| linear.weight.as_str()).collect();
    Ok(Some(mask_bytes(model.reader, |name| pruned.contains(name))?))
}

/// The calibration text of a recipe and the samples to take from it; `None` if it needs none.
fn calibration<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Option<(Text, Samples)> {
    let source = recipe.calibration.source.as_deref().filter(|_| recipe.calibrates())?;
    let Calibration { samples, held_out, seed, selection, .. } = recipe.calibration;
    let sequence_length = model.decoder.sequence(recipe.calibration.sequence_length);
    let text = Text { field: Some(recipe.calibration.field.clone()), ..Text::from(source) };
    Some((text, Samples { count: samples, held_out, sequence_length, seed, selection }))
}

/// The calibration samples of a recipe.
pub(crate) fn calibrate<D: Ops>(
    recipe: &Recipe,
    model: &Model<'_, D>,
) -> Result<Vec<Vec<u32>>, Error> {
    let Some((text, wanted)) = calibration(recipe, model) else { return Ok(Vec::new()) };
    let tokens = tokens(model, recipe.calibration.special_tokens);
    let samples = samples(&text, wanted, &tokens)?;
    let longest = samples.iter().map(Vec::len).max().unwrap_or(0);
    model.within("calibration samples", longest, "calibration.sequence_length")?;
    Ok(samples)
}

/// Number and lengths of a recipe's calibration samples, known before they are read.
pub(crate) fn extent<D: Ops>(recipe: &Recipe, model: &Model<'_, D>) -> Result<Extent, Error> {
    let Some((text, wanted)) = calibration(recipe, model) else { return Ok(Extent::default()) };
    Ok(calibration::extent(&text, wanted, model.decoder.vocab_size)?)
}

/// Checks that a run's samples exist and that the recipe allows the memory that it needs.
///
/// # Errors
/// If the samples cannot be read, or the memory is too little.
pub(crate) fn foresee<D: Ops>(
    loaded: &Loaded,
    model: &Model<'_, D>,
    plan: &Plan,
    tests: &Tests,
    shared: &mut Shared,
) -> Result<(), Error> {
    let recipe = &loaded.recipe;
    let samples = shared.samples(recipe, || calibrate(recipe, model))?;
    let calibration = Extent::of_samples(&samples, recipe.calibration.held_out);
    allowed(recipe, Forecast::new(loaded, model, plan, tests, calibration)?.takes.memory)?;
    Ok(())
}

/// Checks a run before it begins: its recipe fits its model, its texts, tasks and samples exist,
/// its output can be written, and the recipe allows the memory that it needs.
///
/// # Errors
/// The first of these checks that fails.
pub(crate) fn look_ahead(
    loaded: &Loaded,
    shared: &mut Shared,
    watch: &dyn Watch,
) -> Result<(), Error> {
    let recipe = &loaded.recipe;
    let checkpoints = Checkpoints::open(recipe, watch)?;
    let model = Model::new(&checkpoints.dense, Cpu::default())?;
    let plan = plan(loaded, &model)?;
    loaded.find_texts()?;
    if let Some(output) = &recipe.output.path {
        let inputs = loaded.inputs().chain(checkpoints.sparse_files());
        let bytes = least_bytes(recipe, &model, &plan)?;
        Output::check(output, &checkpoints.dense, inputs, bytes)?;
    }
    let tests = shared.tests(recipe, || Tests::read(recipe, &model))?;
    foresee(loaded, &model, &plan, &tests, shared)
}

/// Bytes of `executor.memory` beyond what the run needs; `None` if the recipe does not set it.
fn allowed(recipe: &Recipe, needed: f64) -> Result<Option<u64>, Error> {
    let Some(given) = recipe.executor.memory else { return Ok(None) };
    let needed = needed as u64;
    match given.as_u64().checked_sub(needed) {
        Some(left) => Ok(Some(left)),
        None => Err(Error::Memory { needed: ByteSize(needed) }),
    }
}

/// Bytes of memory left for hidden states between layers.
fn left(recipe: &Recipe, available: u64, needed: f64) -> Result<u64, Error> {
    let left = allowed(recipe, needed)?.or_else(|| available.checked_sub(needed as u64));
    Ok(left.unwrap_or_else(|| {
        tracing::warn!(
            "the run needs about {} of memory, but {} are free",
            ByteSize(needed as u64),
            ByteSize(available)
        );
        0
    }))
}

/// A run of a recipe on a model, ready to begin.
pub(crate) struct Run<'a, D: Ops> {
    loaded: &'a Loaded,
    model: &'a Model<'a, D>,
    plan: Plan,
    /// The metric pipeline for initial masks.
    initial_pipeline: Vec<MetricStep>,
    /// The sparse checkpoint whose zeros are the initial masks, if there is one.
    sparse: Option<&'a Reader>,
    tests: &'a Tests,
    /// The calibration samples.
    ids: Rc<Vec<Vec<u32>>>,
    scratch: &'a Path,
    watch: &'a dyn Watch,
    forecast: Forecast,
}

impl<'a, D: Ops> Run<'a, D> {
    /// Prepares a run whose hidden states are kept in what is left of `available` bytes of memory,
    /// and beyond that in files in the directory `scratch`.
    pub(crate) fn prepare(
        loaded: &'a Loaded,
        plan: Plan,
        model: &'a mut Model<'_, D>,
        tests: &'a Tests,
        ids: Rc<Vec<Vec<u32>>>,
        (available, scratch): (u64, &'a Path),
        watch: &'a dyn Watch,
    ) -> Result<Self, Error> {
        let recipe = &loaded.recipe;
        let calibration = Extent::of_samples(&ids, recipe.calibration.held_out);
        let forecast = Forecast::new(loaded, model, &plan, tests, calibration)?;
        let left = left(recipe, available, forecast.takes.memory)?;
        let spill = ScratchDir::new(scratch);
        model.executor.storage = Storage::new(recipe.executor.stream_dtype, left, spill);
        watch.expect(&forecast.phases);
        let initial_pipeline = loaded.initial_pipeline()?;
        Ok(Self {
            loaded,
            model,
            plan,
            initial_pipeline,
            sparse: None,
            tests,
            ids,
            scratch,
            watch,
            forecast,
        })
    }

    /// The run with initial masks from the zeros of a sparse checkpoint, if there is one.
    pub(crate) fn with_zeros_of(self, sparse: Option<&'a Reader>) -> Self {
        Self { sparse, ..self }
    }
}

impl<'a, D: Ops> Run<'a, D> {
    /// The run on the same model, read in another order.
    fn on<'b>(self, model: &'b Model<'b, D>) -> Run<'b, D>
    where
        'a: 'b,
    {
        let run: Run<'b, D> = self;
        Run { model, ..run }
    }

    /// Makes and refines the masks from where `progress` is, and measures the result; if `both`,
    /// also measures the model with its initial masks.
    pub(crate) fn prune(self, both: bool, progress: &mut Progress<D>) -> Result<(), Error> {
        let ordered = self.ordered(progress)?;
        let model = self.model.read_by(&ordered);
        let mut run = self.on(&model);
        run.begin(both, progress)?;
        run.end(progress)
    }

    /// The checkpoint with its inner channels in the order in which masks lose least, if the recipe
    /// permutes them.
    fn ordered(&self, progress: &mut Progress<D>) -> Result<Reader, Error> {
        if self.loaded.recipe.sparsity.permute && progress.notes.permuted.is_none() {
            let bar = self.watch.bar(PERMUTATION, Steps::Layers(self.plan.layers.len()));
            let before = Products::so_far();
            let notes = &mut progress.notes;
            let found = notes.phases.run(PERMUTATION, || {
                permute(self.model, &self.plan, self.samples(), &mut || bar.advance(1))
            });
            notes.products += Products::so_far() - before;
            notes.permuted = Some(found?);
            drop(bar);
            progress.keep((self.model, &self.plan))?;
        }
        let permuted = progress.notes.permuted.as_deref().unwrap_or_default();
        Ok(self.model.reader.reordered(permutation::orders(&self.model.decoder, permuted)?))
    }

    /// Makes the initial masks, and all that comes before them.
    fn begin(&mut self, both: bool, progress: &mut Progress<D>) -> Result<(), Error> {
        let recipe = &self.loaded.recipe;
        let (refines, single) = (!recipe.refine.is_empty(), single_pass(recipe));
        if let Some(allocation) = recipe.allocation() {
            self.allocate(allocation, &mut progress.notes)?;
        }
        if progress.phase() == Phase::InitialMasks {
            if !single {
                self.initial(progress, !refines)?;
            }
            progress.enter(Phase::Refinement);
        }
        if !single && (both || !refines) && progress.notes.initial.is_none() {
            progress.notes.initial = Some(self.measured(progress, "initial masks")?);
            progress.keep((self.model, &self.plan))?;
        }
        Ok(())
    }

    /// Refines the masks, if the recipe has stages and they are not done.
    fn end(&self, progress: &mut Progress<D>) -> Result<(), Error> {
        if !self.loaded.recipe.refine.is_empty() && progress.notes.refined.is_none() {
            let (groups, model) = self.loaded.recipe.stages();
            if !groups.is_empty() {
                self.refined(progress)?;
            }
            if !model.is_empty() {
                self.refined_as_a_whole(progress)?;
            }
            progress.notes.refined = Some(self.measured(progress, "refined")?);
            progress.keep((self.model, &self.plan))?;
        }
        Ok(())
    }

    /// Measures the model as it would be written now.
    fn measured(&self, progress: &mut Progress<D>, name: &str) -> Result<Found, Error> {
        let Progress { pass, notes, .. } = progress;
        let written = self.model.written(self.loaded.recipe.output.dtype);
        let mut measure = |model: &Model<'_, D>| {
            let found = || self.tests.measure(model, &pass.pruned, name, self.watch);
            notes.phases.run(EVALUATION, found)
        };
        match &self.plan.removal {
            Some(removal) => {
                let (decoder, pruned) = (&self.model.decoder, &pass.pruned);
                let cuts = removal.settled(decoder, pruned).cuts(decoder, &pruned.masks);
                measure(&written.smaller(&cuts)?)
            }
            None => measure(&written),
        }
    }

    /// Allocates the ratio to the layers, unless that is done.
    fn allocate(&mut self, allocation: Allocation, notes: &mut Notes) -> Result<(), Error> {
        if notes.allocation.is_empty() {
            let bar = self.watch.bar("allocation", Steps::Layers(self.plan.layers.len()));
            let mut plan = self.plan.clone();
            let budget = (allocation, self.loaded.recipe.sparsity.ratio);
            let (initial, samples) = (self.initial_masks(), self.samples());
            let before = Products::so_far();
            let allocate = || {
                allocate(self.model, &mut plan, budget, &initial, samples, &mut || bar.advance(1))
            };
            let ratios = notes.phases.run("allocation", allocate);
            notes.products += Products::so_far() - before;
            drop(bar);
            notes.allocation = ratios?;
            notes.counts = plan.counts(&self.model.decoder);
        }
        self.plan.count(&self.model.decoder, &notes.counts);
        Ok(())
    }

    fn samples(&self) -> Sampled<'_> {
        Sampled { ids: &self.ids, held_out: self.loaded.recipe.calibration.held_out }
    }

    fn initial_masks(&self) -> InitialMasks<'_> {
        let Recipe { mask, output, .. } = &self.loaded.recipe;
        let side = self.loaded.recipe.streams.statistics;
        let metric = (&self.initial_pipeline[..], mask.scope);
        let sparse = self.sparse.map(|reader| SparseModel { reader, retain: mask.retain });
        let (dtype, scratch) = (output.dtype, self.scratch);
        InitialMasks { init: mask.init, metric, sparse, side, dtype, scratch }
    }

    /// Makes the initial masks; `ends` says whether the run ends with them.
    fn initial(&self, progress: &mut Progress<D>, ends: bool) -> Result<(), Error> {
        let bar = self.watch.bar("initial masks", Steps::Layers(self.plan.layers.len()));
        bar.advance(progress.pass.layer as u64);
        let (model, plan, settings) = (self.model, &self.plan, self.initial_masks());
        progress.go((model, plan), &*bar, ends, |from, observer| {
            initial_masks(model, plan, &settings, self.samples(), from, observer)
        })
    }

    /// Refines the masks, group by group.
    fn refined(&self, progress: &mut Progress<D>) -> Result<(), Error> {
        let recipe = &self.loaded.recipe;
        let pipeline = self.loaded.pipeline()?;
        let refinement = Refinement {
            stages: recipe.stages().0,
            pipeline: &pipeline,
            blend: recipe.streams.blend as f32,
            statistics: recipe.streams.statistics,
            initial: single_pass(recipe).then(|| self.initial_masks()),
            dtype: recipe.output.dtype,
            scratch: self.scratch,
        };
        let bar = self.watch.bar("refinement", Steps::Layers(self.plan.layers.len()));
        bar.advance(progress.pass.layer as u64);
        let (model, plan) = (self.model, &self.plan);
        progress.go((model, plan), &*bar, true, |from, observer| {
            refine(model, plan, &refinement, self.samples(), from, observer)
        })
    }

    /// Refines the masks of the whole model.
    fn refined_as_a_whole(&self, progress: &mut Progress<D>) -> Result<(), Error> {
        let stages = self.loaded.recipe.stages().1;
        let steps = stages.iter().map(|stage| stage.steps()).sum::<usize>();
        let bar = self.watch.bar("end to end", Steps::Parts(steps as u64));
        let (model, plan) = (self.model, &self.plan);
        let mut saved = progress.take_stage();
        if saved.is_none() {
            progress.notes.steps.clear();
        }
        bar.advance(progress.notes.steps.iter().filter(|step| step.step > 0).count() as u64);
        progress.go((model, plan), &*bar, true, |from, observer| {
            let (samples, pruned, scratch) = (self.samples(), from.pruned, self.scratch);
            let dtype = self.loaded.recipe.output.dtype;
            let state = ModelState { model, plan, samples, dtype, scratch, pruned };
            let saved = saved.as_mut().map(|(stage, state)| (*stage, state as &mut dyn SavedStage));
            refine_model(state, stages, saved, observer)
        })?;
        progress.changed(plan);
        Ok(())
    }
}

/// Whether initial masks are made and refined in one pass.
pub(crate) fn single_pass(recipe: &Recipe) -> bool {
    recipe.mask.passes == 1 && !recipe.stages().0.is_empty()
}

/// The expected memory and work of a run on some ranks that measures segments of these lengths; the
/// checkpoint has weights of this format.
pub(crate) fn expected<'a>(
    loaded: &'a Loaded,
    decoder: &Decoder,
    segments: impl Iterator<Item = usize> + Clone,
    calibration: Extent,
    (ranks, weights): (usize, Dtype),
) -> Result<Expected<'a>, Error> {
    let recipe = &loaded.recipe;
    let single = single_pass(recipe);
    let metrics = pipeline::needs(&loaded.pipeline()?);
    let pruning = Pruning {
        calibration,
        init: recipe.mask.init,
        initial_needs: recipe.initial_needs(),
        single,
        stages: recipe.stages().0,
        model_stages: recipe.stages().1,
        metrics,
        dense: recipe.streams.blend > 0.0 || recipe.streams.statistics == Side::Dense,
        statistics: recipe.streams.statistics,
        stream_size: recipe.executor.stream_dtype.size(),
        weight_size: recipe.output.dtype.unwrap_or(weights).size(),
        ranks,
    };
    Ok(Expected {
        pruning,
        allocation: recipe.allocation().map(|allocation| allocation.by),
        permutes: recipe.sparsity.permute,
        evaluated: (segments.clone().sum(), if recipe.refine.is_empty() || single { 2 } else { 3 }),
        evaluated_at_once: STATES / decoder.hidden_size,
        evaluated_longest: segments.max().unwrap_or(0),
    })
}

/// The files in a directory.
fn files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::File { path: dir.to_owned(), source };
    let files = fs::read_dir(dir).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()));
    files.collect::<Result<_, _>>().map_err(failed)
}

/// Writes the resolved recipe and the report, and renames the checkpoint to the output's name.
fn finish(resolved: &Recipe, mut report: Report, output: &Output) -> Result<Report, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Report(e.to_string());
    let resolved = resolved.to_toml().map_err(|e| failed(&e))?;
    output.add_file(RECIPE, resolved.as_bytes())?;
    let digested = |file: PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, digest(&file)?))
    };
    let outputs: Result<_, Error> =
        files(output.staging())?.into_par_iter().map(digested).collect();
    report.outputs = outputs?;
    let json = serde_json::to_string_pretty::<dyn erased_serde::Serialize>(&report)
        .map_err(|e| failed(&e))?;
    output.add_file(report::JSON, format!("{json}\n").as_bytes())?;
    // The page is made from the JSON, so that it can be made again from the report.
    let read = serde_json::from_slice(json.as_bytes()).map_err(|e| failed(&e))?;
    let page = report::page(&read).map_err(|e| failed(&e))?;
    output.add_file(report::HTML, page.as_bytes())?;
    output.finish()?;
    Ok(report)
}
