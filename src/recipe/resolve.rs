//! Resolves a recipe: merges its text with the layers above and below, and checks the values.

use std::{collections::BTreeMap, path::Path};

use figment::value::Value;

use super::{
    Allocate, Calibration, Device, Mask, Model, Recipe, RecipeError, Scope, Sparsity,
    diagnose::{read_all, take_unknown},
    error::{Fault, Problem, segments},
    extends::files,
    keys::key,
    layers::{Layer, merge},
    loaded::{Loaded, Source},
    permute,
    pipeline::{initial_pipeline, pipeline},
    prompts, refine, rules,
    schema::{EXTENDS, SWEEP},
    sections::{MODELS, MOST},
    structure,
    sweep::{Point, points},
    text::read,
};
use crate::{
    hub::is_name,
    limits::{GLOB, GLOBS, SEQUENCE, TOKENS},
    precision::Precision,
};

/// Resolves the recipe in a file, under `BARBER_*` environment variables and `key=value`
/// assignments.
///
/// # Errors
/// All errors of the recipe; a sweep is an error, too.
pub fn load(path: &Path, sets: &[String]) -> Result<Loaded, RecipeError> {
    only(load_runs(path, sets)?)
}

/// Resolves the recipe in a file like [`load`], and returns the runs of its sweep in order, each
/// with its own directory as `output.path`. A recipe without a sweep is one run.
///
/// # Errors
/// All errors of the recipe.
pub fn load_runs(path: &Path, sets: &[String]) -> Result<Vec<Loaded>, RecipeError> {
    let text = read(path, "a recipe, such as recipes/quickstart.toml")?;
    // Variables of other programs may be anything but Unicode.
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    runs(path, &text, variables, sets)
}

/// Environment variables that look like misspelt settings, each with the correct name.
pub fn misspelt_settings() -> Vec<(String, String)> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter_map(|name| Layer::meant(&name).map(|meant| (name, meant))).collect()
}

/// The only run of a recipe without a sweep.
fn only(mut runs: Vec<Loaded>) -> Result<Loaded, RecipeError> {
    let count = runs.len();
    let first = runs.swap_remove(0);
    if first.point.settings.is_empty() {
        return Ok(first);
    }
    let why = format!("makes {count} runs, but only one is wanted here");
    let problem = Problem::at(SWEEP, Fault::Value(why));
    Err(first.source.error(vec![problem.help("`barber prune` and `barber check` take a sweep")]))
}

/// Resolves a recipe from its text; `path` is its file, which need not exist.
///
/// ```
/// use std::path::Path;
/// use llm_barber::recipe::load_text;
///
/// let text = "
///     model.path = 'model'
///     calibration.source = 'text.txt'
///     [output]
///     path = 'out'
/// ";
/// let sets = ["sparsity.ratio=0.6".to_owned()];
/// let loaded = load_text(Path::new("recipes/my.toml"), text, [], &sets).unwrap();
/// assert_eq!(loaded.recipe.model.path, Path::new("recipes/model"));
/// assert_eq!(loaded.recipe.sparsity.ratio, 0.6);
/// assert_eq!(loaded.origin("sparsity.ratio"), "--set sparsity.ratio=0.6");
/// assert_eq!(loaded.origin("output.path"), "recipes/my.toml line 5");
/// assert_eq!(loaded.origin("mask.init"), "default");
/// ```
///
/// # Errors
/// All errors of the recipe.
pub fn load_text(
    path: &Path,
    text: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Loaded, RecipeError> {
    only(runs(path, text, variables, sets)?)
}

/// Resolves all runs of a recipe, at least one.
pub(super) fn runs(
    path: &Path,
    text: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Vec<Loaded>, RecipeError> {
    let name = path.display().to_string();
    let fail = |problems| RecipeError::new(&name, problems);
    let mut layers = files(path, text).map_err(fail)?;
    let mut problems = Vec::new();
    let variables =
        variables.into_iter().filter_map(|(name, value)| Layer::variable(&name, &value));
    for layer in variables.chain(sets.iter().map(|set| Layer::set(set))) {
        match layer {
            Ok(layer) => layers.push(layer),
            Err(problem) => problems.push(problem),
        }
    }
    let points = points(&layers).map_err(|of_sweep| fail([&problems[..], &of_sweep].concat()))?;
    let mut runs = Vec::new();
    for (point, own) in points {
        match resolve(&name, [&layers[..], &own].concat(), point) {
            Ok(run) => runs.push(run),
            Err(found) => {
                // Most errors are the same in all runs.
                let is_new = |new: &Problem| !problems.iter().any(|known| new.is(known));
                let new: Vec<_> = found.into_iter().filter(is_new).collect();
                problems.extend(new);
            }
        }
    }
    if problems.is_empty() { Ok(runs) } else { Err(fail(problems)) }
}

/// Resolves the layers that a recipe's author gave, those of a sweep's point last. The error lists
/// all problems.
fn resolve(name: &str, given: Vec<Layer>, point: Point) -> Result<Loaded, Vec<Problem>> {
    let mut problems = Vec::new();
    let named = given.iter().rev().find_map(Layer::named_preset).map(str::to_owned);
    let mut layers = vec![Layer::defaults()];
    match named.as_deref().map(Layer::preset).transpose() {
        // The preset is above the defaults and below all values of the author.
        Ok(preset) => layers.extend(preset),
        Err(problem) => problems.push(problem),
    }
    layers.extend(given);
    let (merged, values, unmerged) = merge(layers);
    problems.extend(unmerged);
    if values.contains_key(EXTENDS) {
        // `extends` in a file was followed and removed before.
        let why = "only a recipe's file can extend another recipe".to_owned();
        problems.push(
            Problem::at(EXTENDS, Fault::Value(why))
                .help("write it in the file, or give its values"),
        );
    }
    let source = Source { name: name.into(), merged, values: values.into() };
    let mut known = source.values.clone();
    if let Value::Dict(_, known) = &mut known {
        known.remove(EXTENDS);
        known.remove(SWEEP);
    }
    take_unknown(&mut known, &mut Vec::new(), &mut problems);
    problems.extend(refine::check(&mut known));
    let (recipe, mistyped) = read_all(&mut known, Value::deserialize::<Recipe>);
    problems.extend(mistyped);
    let Some(mut recipe) = recipe else { return Err(source.located(problems)) };
    // A value that was removed because it is wrong is not reported as missing.
    let mut found = Vec::new();
    settle_ratio(&source, &mut recipe, &mut found);
    check(&recipe, &mut found);
    rules::check(&recipe, &mut found);
    structure::check(&recipe, &mut found);
    permute::check(&recipe, &mut found);
    prompts::check(&recipe.evaluate.generate, &mut found);
    found.extend(pipeline(&recipe.metric).err().unwrap_or_default());
    found.extend(initial_pipeline(&recipe).err().unwrap_or_default());
    found.extend(recipe.paths_mut().into_iter().filter_map(|(key, path)| misread(&key, path)));
    found.retain(|new| !problems.iter().any(|known| new.path.starts_with(&known.path)));
    problems.extend(found);
    if !problems.is_empty() {
        return Err(source.located(problems));
    }
    for (key, path) in recipe.paths_mut() {
        if let Some(dir) = source.layer_of(&segments(&key)).and_then(Layer::dir) {
            let joined = dir.join(&*path);
            // A model's name on the hub looks like a path.
            if !MODELS.contains(&&*key) || joined.is_dir() || !is_name(path) {
                *path = joined;
            }
        }
    }
    if let Some(path) = recipe.output.path.as_mut().filter(|_| !point.name.is_empty()) {
        path.push(&point.name);
    }
    Ok(Loaded { recipe, point, source })
}

/// The ratio that the pattern implies, unless the recipe gives another.
fn settle_ratio(source: &Source, recipe: &mut Recipe, problems: &mut Vec<Problem>) {
    let Some(implied) = recipe.sparsity.pattern.ratio() else { return };
    let path = ["sparsity".to_owned(), "ratio".to_owned()];
    let given = source.value(&path).is_some();
    if given && (recipe.sparsity.ratio - implied).abs() > 1e-9 {
        let why = format!(
            "the pattern {} prunes {implied}, not {}",
            recipe.sparsity.pattern, recipe.sparsity.ratio
        );
        problems.push(
            Problem::new(path.to_vec(), Fault::Value(why))
                .help(format!("leave it out, or write {implied}"))
                .against("sparsity.pattern"),
        );
    }
    recipe.sparsity.ratio = implied;
}

/// The problem of an empty path, or of one that starts with `~`.
fn misread(at: &str, path: &Path) -> Option<Problem> {
    let wrong = |why: &str, help: &str| Problem::at(at, Fault::Value(why.into())).help(help);
    let empty = path.as_os_str().is_empty();
    // These keys are reported as missing.
    if empty && at != "model.path" && !at.starts_with("evaluate.perplexity") {
        let help = key(&segments(at)).map_or("give a path, or leave the key out", |key| &key.help);
        return Some(wrong("is an empty path", help));
    }
    path.starts_with("~").then(|| {
        wrong(
            "`~` is not expanded in a recipe",
            "write the directory in full, or ./~ for a directory of that name",
        )
    })
}

/// Checks what the types cannot.
fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let mut wrong = |key: &str, why: String, help: &str| {
        problems.push(Problem::at(key, Fault::Value(why)).help(help));
    };
    let ratio = recipe.sparsity.ratio;
    if !(0.0..1.0).contains(&ratio) {
        wrong(
            "sparsity.ratio",
            format!("must be at least 0 and below 1, got {ratio}"),
            "0.5 prunes half of the weights",
        );
    }
    let Sparsity { pattern, allocation, spread, outlier, .. } = recipe.sparsity;
    if allocation != Allocate::Uniform && pattern.ratio().is_some() {
        let why = format!("the pattern {pattern} prunes all layers alike");
        let problem = Problem::at("sparsity.allocation", Fault::Value(why));
        let problem = problem.help("leave it out, or set the pattern to `unstructured`");
        problems.push(problem.against("sparsity.pattern"));
    }
    if recipe.executor.device == Device::Cpu && recipe.executor.precision != Precision::F32 {
        let why = "is a precision of a GPU's products".to_owned();
        let problem = Problem::at("executor.precision", Fault::Value(why));
        let problem = problem.help("leave it out, or set executor.device, such as to \"cuda:0\"");
        problems.push(problem.against("executor.device"));
    }
    let format = recipe.output.format;
    if let Some(stored) = format.pattern.filter(|stored| *stored != pattern) {
        let help = format!("prune with sparsity.pattern = \"{stored}\", or write another format");
        let why =
            format!("{format} stores the pattern {stored}, and sparsity.pattern is {pattern}");
        let problem = Problem::at("output.format", Fault::Value(why)).help(help);
        problems.push(problem.against("sparsity.pattern"));
    }
    if recipe.output.masks && !format.is_dense() {
        let why = format!("{format} has the masks in the weights' own files");
        let problem = Problem::at("output.masks", Fault::Value(why));
        let problem = problem.help("leave it out, or set output.format to \"dense\"");
        problems.push(problem.against("output.format"));
    }
    let mut wrong = |key: &str, why: String, help: &str| {
        problems.push(Problem::at(key, Fault::Value(why)).help(help));
    };
    if !(0.0..1.0).contains(&spread) {
        wrong(
            "sparsity.spread",
            format!("must be at least 0 and below 1, got {spread}"),
            "0.08 is usual",
        );
    }
    if !(outlier.is_finite() && outlier > 0.0) {
        wrong("sparsity.outlier", format!("must be > 0, got {outlier}"), "5 is usual");
    }
    if !(1..=2).contains(&recipe.mask.passes) {
        let help = "2 makes all initial masks before the refinement, 1 makes and refines them \
                    layer by layer";
        wrong("mask.passes", format!("must be 1 or 2, got {}", recipe.mask.passes), help);
    }
    let Mask { init, metric, scope, .. } = &recipe.mask;
    let help = "set `mask.init` to `metric`, or leave this out";
    match init {
        of if of.metrics => {}
        _ if !metric.is_empty() => wrong("mask.metric", format!("`{init}` uses no metrics"), help),
        _ if scope.is_some() => wrong("mask.scope", format!("`{init}` has its own scope"), help),
        _ => {}
    }
    let Model { dense, dense_revision, .. } = &recipe.model;
    match (dense, init) {
        (None, _) if dense_revision.is_some() => {
            let help = "set `model.dense` to the dense model, or leave this out";
            wrong("model.dense_revision", "has no effect without `model.dense`".into(), help);
        }
        (None, init) if init.zeros && !recipe.refine.is_empty() => {
            let why = format!(
                "`{init}` takes the zeros of `model.path`, which is also the reference: no stage \
                 could bring a weight back"
            );
            let help = "set `model.dense` to the dense model that the sparse one was made of; or \
                        leave out the stages: `refine = []`";
            wrong("mask.init", why, help);
        }
        (None, _) if recipe.mask.retain => {
            let help = "set `model.dense` to the dense model that the sparse one at `model.path` was \
                        made of, or leave this out";
            wrong("mask.retain", "has no effect without `model.dense`".into(), help);
        }
        (Some(_), init) if !init.zeros => {
            let help = "set `mask.init` to `none`, which takes the zeros of `model.path`, or leave \
                        `model.dense` out";
            let why = format!("`{init}` chooses the masks by `model.path` alone");
            let problem = Problem::at("model.dense", Fault::Value(why)).help(help);
            problems.push(problem.against("mask.init"));
        }
        _ => {}
    }
    let mut wrong = |key: &str, why: String, help: &str| {
        problems.push(Problem::at(key, Fault::Value(why)).help(help));
    };
    if let Some(scope @ (Scope::Model | Scope::Group | Scope::Column)) = scope {
        let why = format!("initial masks cannot have the scope `{scope}`");
        wrong("mask.scope", why, "`row`, or `layer` for the whole matrix");
    }
    if !(0.0..=1.0).contains(&recipe.streams.blend) {
        let help = "0 takes the pruned model's hidden states alone, 1 the dense ones";
        wrong("streams.blend", format!("must be from 0 to 1, got {}", recipe.streams.blend), help);
    }
    let sizes = [
        ("calibration.samples", recipe.calibration.samples, 1),
        ("calibration.held_out", recipe.calibration.held_out, 0),
        ("calibration.sequence_length", recipe.calibration.sequence_length.unwrap_or(2), 2),
        ("evaluate.sequence_length", recipe.evaluate.sequence_length.unwrap_or(2), 2),
        ("evaluate.segments", recipe.evaluate.segments.unwrap_or(1), 1),
        ("evaluate.questions", recipe.evaluate.questions.unwrap_or(1), 1),
    ];
    for (key, size, least) in sizes {
        if !(least..=MOST).contains(&size) {
            let help = format!("it must be from {least} to {MOST}");
            wrong(key, format!("{size} is out of range"), &help);
        }
    }
    let Calibration { samples, held_out, .. } = recipe.calibration;
    let sequence_length = recipe.calibration.sequence_length.unwrap_or(SEQUENCE);
    if samples.saturating_add(held_out).saturating_mul(sequence_length) > TOKENS {
        let help = format!("all samples together have at most {TOKENS} tokens");
        wrong("calibration.samples", format!("{samples} × {sequence_length} tokens"), &help);
    }
    let exclude = recipe.sparsity.exclude.iter().enumerate();
    let exclude = exclude.map(|(i, glob)| (format!("sparsity.exclude.{i}"), glob));
    let overrides = recipe.overrides.iter().enumerate().flat_map(|(i, of)| {
        of.tensors.iter().map(move |glob| (format!("override.{i}.tensors"), glob))
    });
    let mut all = 0;
    for (key, glob) in exclude.chain(overrides) {
        let help = "a glob such as `*.down_proj`";
        all += glob.len();
        if glob.len() > GLOB {
            wrong(
                &key,
                format!("the glob has {} bytes, at most {GLOB} are allowed", glob.len()),
                help,
            );
        } else if all > GLOBS {
            wrong(&key, format!("more than {GLOBS} bytes of globs"), help);
            break;
        } else if let Err(error) = globset::Glob::new(glob) {
            wrong(&key, error.to_string(), help);
        }
    }
    let blocks = recipe.blocks.iter().map(|block| Some(&block.name)).enumerate();
    let blocks = blocks.map(|(i, name)| (format!("blocks.{i}.name"), name));
    let texts = recipe.evaluate.perplexity.iter().map(|text| text.name.as_ref()).enumerate();
    let texts = texts.map(|(i, name)| (format!("evaluate.perplexity.{i}.name"), name));
    for (key, name) in blocks.chain(texts) {
        if let Some(name) = name.filter(|name| name.contains(char::is_control)) {
            let why = format!("{name:?} has a line break or another control character");
            wrong(&key, why, "a name is one line of letters, digits and signs");
        }
    }
    let mut seen: BTreeMap<&str, String> = BTreeMap::new();
    for (i, block) in recipe.blocks.iter().enumerate() {
        if block.name.is_empty() || block.layers.is_empty() {
            let empty = if block.name.is_empty() { "name" } else { "layers" };
            let problem =
                Problem::at(&format!("blocks.{i}.{empty}"), Fault::Value("is empty".into()));
            problems.push(problem.help("a block has a name and the linear layers that it groups"));
        }
        for (j, layer) in block.layers.iter().enumerate() {
            let at = format!("blocks.{i}.layers.{j}");
            if let Some(other) = seen.get(layer.as_str()) {
                let problem = Problem::at(&at, Fault::Value(format!("`{layer}` is in two blocks")));
                let problem = problem.help("leave the layer in one block");
                problems.push(problem.against(other));
            }
            seen.insert(layer, at);
        }
    }
    let missing = [
        ("model.path", recipe.model.path.as_os_str().is_empty()),
        ("calibration.source", recipe.calibrates() && recipe.calibration.source.is_none()),
        ("output.path", recipe.output.path.is_none()),
        ("mask.metric", recipe.mask.init.metrics && recipe.mask.metric.is_empty()),
    ];
    let missing = missing.into_iter().map(|(at, missing)| (at.to_owned(), missing));
    let texts = recipe.evaluate.perplexity.iter().enumerate();
    let texts = texts.map(|(i, text)| {
        (format!("evaluate.perplexity.{i}.path"), text.path.as_os_str().is_empty())
    });
    for (at, _) in missing.chain(texts).filter(|(_, missing)| *missing) {
        let problem = Problem::at(&at, Fault::Missing);
        let help = key(&problem.path).map_or("", |key| key.help.as_str());
        problems.push(problem.help(help));
    }
    if recipe.metric.is_empty() && recipe.refine.iter().any(|stage| stage.uses_metrics()) {
        let help = "leave `metric` out for the paper's weight-gradient";
        problems.push(Problem::at("metric", Fault::Value("is empty".into())).help(help));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::{Alpha, Refine};

    const FINE: &str = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";

    fn load(text: &str, sets: &[&str]) -> Result<Loaded, RecipeError> {
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        load_text(Path::new("dir/r.toml"), text, [], &sets)
    }

    #[test]
    fn later_layers_win() {
        let text = format!("{FINE}sparsity.ratio = 0.4\nevaluate.segments = 3\n");
        let variables = [("BARBER_SPARSITY__RATIO", "0.5"), ("BARBER_CALIBRATION__SEED", "7")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let sets = ["sparsity.ratio=0.6".to_owned()];
        let loaded = load_text(Path::new("r.toml"), &text, variables, &sets).unwrap();
        assert_eq!(loaded.recipe.sparsity.ratio, 0.6);
        assert_eq!(loaded.recipe.calibration.seed, 7);
        assert_eq!(loaded.recipe.evaluate.segments, Some(3));
        assert_eq!(
            loaded.origin("calibration.seed"),
            "environment variable BARBER_CALIBRATION__SEED"
        );
        assert_eq!(loaded.origin("evaluate.segments"), "r.toml line 5");
        assert_eq!(loaded.origin("calibration.samples"), "default");
    }

    #[test]
    fn paths_are_relative_to_what_gives_them() {
        let loaded = load(FINE, &["output.path=elsewhere"]).unwrap();
        assert_eq!(loaded.recipe.model.path, Path::new("dir/m"));
        assert_eq!(loaded.recipe.output.path.as_deref(), Some(Path::new("elsewhere")));
    }

    #[test]
    fn a_pattern_implies_its_ratio() {
        let ratio =
            |text: &str| load(&format!("{FINE}{text}"), &[]).map(|l| l.recipe.sparsity.ratio);
        assert_eq!(ratio("sparsity.pattern = '1:4'").unwrap(), 0.75);
        assert_eq!(ratio("sparsity.pattern = '2:4'\nsparsity.ratio = 0.5").unwrap(), 0.5);
        assert!(ratio("sparsity.pattern = '2:4'\nsparsity.ratio = 0.6").is_err());
    }

    #[test]
    fn every_problem_has_its_key_its_line_and_help() {
        for (line, key, help) in [
            ("sparsity.ratoi = 0.5", "sparsity.ratoi", "`ratio`"),
            ("sparsty.ratio = 0.5", "sparsty", "`sparsity`"),
            ("sparsity.ratio = 'half'", "sparsity.ratio", "fraction"),
            ("sparsity.ratio = 1.5", "sparsity.ratio", "half"),
            ("sparsity.pattern = '4:2'", "sparsity.pattern", "N:M"),
            ("mask.init = 'wandaa'", "mask.init", "`wanda`"),
            ("calibration.samples = -1", "calibration.samples", "samples"),
            ("calibration.sequence_length = 1", "calibration.sequence_length", "from 2"),
            ("preset = 'bset'", "preset", "`best`"),
            ("sparsity.allocation = 'owls'", "sparsity.allocation", "`owl`"),
            (
                "sparsity.allocation = 'owl'\nsparsity.pattern = '2:4'",
                "sparsity.allocation",
                "unstructured",
            ),
            ("refine = [{ use = 'swap' }]\nmask.init = 'none'", "mask.init", "`model.dense`"),
            ("model.dense = 'd'", "model.dense", "`none`"),
            ("model.dense_revision = 'main'", "model.dense_revision", "`model.dense`"),
            ("sparsity.spread = 1", "sparsity.spread", "0.08"),
            ("sparsity.outlier = 0", "sparsity.outlier", "5"),
            ("streams.statistics = 'dens'", "streams.statistics", "`dense`"),
            ("mask.passes = 3", "mask.passes", "layer by layer"),
            ("mask.init = 'metric'", "mask.metric", "one after the other"),
            ("mask.metric = [{ use = 'ria' }]", "mask.metric", "`mask.init`"),
            ("mask.scope = 'layer'", "mask.scope", "`mask.init`"),
            ("mask.retain = true", "mask.retain", "`model.dense`"),
            (
                "mask = { init = 'metric', metric = [{ use = 'rai' }] }",
                "mask.metric.0.use",
                "`ria`",
            ),
            (
                "mask = { init = 'metric', metric = [{ use = 'ria', pwer = 1 }] }",
                "mask.metric.0.pwer",
                "`power`",
            ),
            (
                "mask = { init = 'metric', metric = [{ use = 'gradient' }] }",
                "mask.metric.0.use",
                "no error",
            ),
            (
                "mask = { init = 'metric', scope = 'column', metric = [{ use = 'ria' }] }",
                "mask.scope",
                "`layer`",
            ),
            ("streams.blend = -0.1", "streams.blend", "dense"),
            ("refine = [{ use = 'swp' }]", "refine.0.use", "`swap`"),
            ("refine = [{ limit = 3 }]", "refine.0.use", "`rebuild`"),
            ("refine = [{ use = 'swap' }, 'swap']", "refine.1", "table"),
            ("refine = ['swap', { use = 'rebuild', alpha = 2 }]", "refine.1.alpha", "to 1"),
            ("refine = [{ use = 'swp' }, 3]", "refine.1", "table"),
            ("refine = [{ use = 'rebuild', scope = 'colum' }]", "refine.0.scope", "`column`"),
            ("refine = [{ use = 'rebuild', alpha = 1.01 }]", "refine.0.alpha", "to 1"),
            ("refine = [{ use = 'rebuild', alpha = 'atuo' }]", "refine.0.alpha", "auto"),
            ("refine = [{ use = 'rebuild', rounds = 0 }]", "refine.0.rounds", "converged"),
            ("refine = [{ use = 'rebuild', rounds = 1.5 }]", "refine.0.rounds", "converged"),
            ("refine = [{ use = 'rebuild', limit = 5 }]", "refine.0.limit", "`swap`"),
            ("refine = [{ use = 'swap', scope = 'group' }]", "refine.0.scope", "`row`"),
            ("refine = [{ use = 'end-to-end' }, { use = 'swap' }]", "refine.1.use", "first"),
            ("refine = [{ use = 'end-to-end', lambda = 0 }]", "refine.0.lambda", "default"),
            ("refine = [{ use = 'end-to-end', fraction = 2 }]", "refine.0.fraction", "rows"),
            ("refine = [{ use = 'end-to-end', steps = 0 }]", "refine.0.steps", "default"),
            ("refine = [{ use = 'end-to-end', momentum = 1 }]", "refine.0.momentum", "alone"),
            ("refine = [{ use = 'reconstruct', damping = -1 }]", "refine.0.damping", "0.01"),
            ("refine = [{ use = 'reconstruct', method = 'ls' }]", "refine.0.method", "`gradient`"),
            ("refine = [{ use = 'reconstruct', rate = 0.1 }]", "refine.0.rate", "`method`"),
            (
                "refine = [{ use = 'reconstruct', method = 'gradient', rate = 0 }]",
                "refine.0.rate",
                "0.002",
            ),
            ("output.dtype = 'f8'", "output.dtype", "`f16`"),
            ("blocks = [{ name = 'a', layer = ['q_proj'] }]", "blocks.0.layer", "`layers`"),
            ("metric = [{ use = 'weight-gradiant' }]", "metric.0.use", "`weight-gradient`"),
            ("metric = [{ use = 'magnitude', pwer = 2 }]", "metric.0.pwer", "`power`"),
            ("metric = [{ use = 'magnitude', power = 'x' }]", "metric.0.power", ""),
            ("metric = [{ power = 2 }]", "metric.0.use", "metric"),
            ("evaluate.tasks.arc_eazy = 'a'", "evaluate.tasks.arc_eazy", "`arc_easy`"),
            ("sparsity.exclude = ['[']", "sparsity.exclude.0", "glob"),
            ("override = [{ tensors = '[', ratio = 0.1 }]", "override.0.tensors", "glob"),
            ("override = [{ tensors = 3, ratio = 0.1 }]", "override.0.tensors", "glob"),
            ("override = [{ ratio = 0.1 }]", "override.0.tensors", "glob"),
            ("override = [{ tensors = '*' }]", "override.0", "`ratio`"),
            ("override = [{ tensors = '*', ratio = 1 }]", "override.0.ratio", "30%"),
            ("override = [{ tensors = '*', scope = 'row' }]", "override.0.scope", "stage"),
            (
                "override = [{ tensors = '*', ratio = 0.3, pattern = '2:4' }]",
                "override.0.ratio",
                "unstructured",
            ),
            ("override = [{ tensor = '*', ratio = 0.3 }]", "override.0.tensor", "`tensors`"),
            ("executor.precision = 'tf32'", "executor.precision", "cuda:0"),
        ] {
            let error = load(&format!("{FINE}{line}\n"), &[]).expect_err(line);
            let problems: Vec<_> = error.problems().iter().collect();
            let problem = problems.iter().find(|p| p.key() == key);
            let problem = problem.unwrap_or_else(|| panic!("{line}: {problems:?}"));
            assert!(problem.help.as_deref().unwrap_or("").contains(help), "{line}: {problem:?}");
            let excerpt = problem.excerpt().unwrap_or_else(|| panic!("{line}: {problem:?}"));
            assert!(line.contains(excerpt), "{line}: {excerpt}");
        }
    }

    /// The texts of a program's problems, one paragraph each.
    fn shown(text: &str, variables: &[(&str, &str)], sets: &[&str]) -> String {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        let error = load_text(Path::new("r.toml"), text, variables, &sets).unwrap_err();
        let theme = miette::GraphicalTheme::unicode_nocolor();
        let handler = miette::GraphicalReportHandler::new_themed(theme).with_wrap_lines(false);
        let mut shown = String::new();
        handler.render_report(&mut shown, &error).unwrap();
        shown.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }

    #[test]
    fn messages_show_the_line_the_key_the_source_and_what_to_do() {
        let of_file = shown(&format!("{FINE}[sparsity]\nratoi = 0.5\n"), &[], &[]);
        assert_eq!(
            of_file,
            "
  × unknown key `sparsity.ratoi`
   ╭─[r.toml:5:1]
 4 │ [sparsity]
 5 │ ratoi = 0.5
   · ──┬──
   ·   ╰── unknown key
   ╰────
  help: did you mean `ratio`?
"
            .trim_start_matches('\n')
        );
        let of_set = shown(FINE, &[], &["refine=[{ use = 'swap', limit = 'ten' }]"]);
        assert_eq!(
            of_set,
            "
  × `refine.0.limit` is the string \"ten\", expected a whole number from 0 on
   ╭─[command line:1:39]
 1 │ --set refine=[{ use = 'swap', limit = 'ten' }]
   ·                                       ──┬──
   ·                                         ╰── here
   ╰────
  help: For `swap`: maximum number of swaps per row.
"
            .trim_start_matches('\n')
        );
        let of_environment = shown(FINE, &[("BARBER_MASK__INIT", "wandaa")], &[]);
        for expected in [
            "× `mask.init` cannot be `wandaa`",
            "╭─[environment:1:19]",
            "1 │ BARBER_MASK__INIT=wandaa",
            "help: did you mean `wanda`? There is `magnitude`, `wanda`, `sparsegpt`, `alps`, `metric` or `none`",
        ] {
            assert!(of_environment.contains(expected), "{of_environment}");
        }
        let misspelt = shown(FINE, &[("BARBER_MSAK__INIT", "wanda")], &[]);
        assert!(misspelt.contains("unknown key `msak`"), "{misspelt}");
        assert!(misspelt.contains("did you mean `mask`?"), "{misspelt}");
        assert!(misspelt.contains("──"), "{misspelt}");
    }

    #[test]
    fn conflicts_show_both_keys() {
        let same = shown(&format!("{FINE}[sparsity]\npattern = '2:4'\nratio = 0.6\n"), &[], &[]);
        for expected in ["the pattern 2:4 prunes 0.5, not 0.6", "╰── here", "╰── with this"]
        {
            assert!(same.contains(expected), "{same}");
        }
        let other = shown(&format!("{FINE}sparsity.ratio = 0.6\n"), &[], &["sparsity.pattern=2:4"]);
        let expected = "not 0.6; `sparsity.pattern` is from --set sparsity.pattern=2:4";
        assert!(other.contains(expected), "{other}");
        let refine = "refine = [{ use = 'swap', alpha = 0.1 }]\n";
        let stage = shown(&format!("{FINE}{refine}"), &[], &[]);
        assert!(stage.contains("with this") && stage.contains("a key of `rebuild`"), "{stage}");
        let preset = shown(&format!("{FINE}preset = 'fast'\n"), &[], &["refine.0.alpha=0.1"]);
        assert!(preset.contains("`refine.0.use` is from preset `fast`"), "{preset}");
    }

    #[test]
    fn all_problems_are_found_at_once() {
        let text = format!(
            "{FINE}sparsity = {{ ratio = 'half', spread = 2, patern = '2:4' }}\nmask.passes = 'two'\n\
             calibration.samples = 0\nevaluate.special_tokens = 1\n\
             refine = [{{ use = 'swap', limit = 'x', alpha = 1 }}, {{ use = 'swp' }}]\n\
             metric = [{{ use = 'magnitude', pwer = 1, power = 'x' }}, {{ use = 'magnitud' }}]\n"
        );
        let error = load(&text, &["streams.blend=2", "sparsity.outlier=0"]).unwrap_err();
        let mut keys: Vec<_> = error.problems().iter().map(Problem::key).collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "calibration.samples",
                "evaluate.special_tokens",
                "mask.passes",
                "metric.0.power",
                "metric.0.pwer",
                "metric.1.use",
                "refine.0.alpha",
                "refine.0.limit",
                "refine.1.use",
                "sparsity.outlier",
                "sparsity.patern",
                "sparsity.ratio",
                "sparsity.spread",
                "streams.blend",
            ]
        );
        for problem in error.problems() {
            assert!(problem.excerpt().is_some_and(|piece| !piece.is_empty()), "{problem:?}");
            assert!(problem.help.is_some(), "{problem:?}");
        }
        // What has the wrong type is not missing too.
        let error = load("model.path = 3\ncalibration.source = 'c'\noutput.path = 'o'", &[]);
        assert_eq!(error.unwrap_err().problems().len(), 1);
    }

    #[test]
    fn presets_are_below_all_that_the_user_says() {
        let text = format!("preset = 'best'\n{FINE}");
        let loaded = load(&text, &["streams.blend=0.2"]).unwrap();
        assert_eq!(loaded.recipe.streams.blend, 0.2);
        assert_eq!(loaded.recipe.refine[0].name(), "swap");
        assert_eq!(loaded.origin("refine.0.use"), "preset `best`");
        assert_eq!(loaded.origin("streams.blend"), "--set streams.blend=0.2");
        let loaded = load(&text, &["preset=paper", "refine.0.alpha=auto"]).unwrap();
        let Refine::Rebuild(rebuild) = &loaded.recipe.refine[0] else { panic!("a rebuild") };
        assert_eq!(rebuild.alpha, Alpha::Auto);
        assert_eq!(loaded.recipe.streams.blend, 0.0);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = load("", &[]).unwrap_err();
        let keys: Vec<_> = error.problems().iter().map(Problem::key).collect();
        assert_eq!(keys, ["model.path", "calibration.source", "output.path"]);
        assert!(load("model.path = 'm'\noutput.path = 'o'\nmask.init = 'magnitude'", &[]).is_ok());
    }

    #[test]
    fn syntax_errors_have_their_line() {
        let error = load("model.path = 'm'\n[sparsity\n", &[]).unwrap_err();
        assert_eq!(error.problems()[0].origin.as_deref(), Some("dir/r.toml line 2"));
    }

    #[test]
    fn assignments_are_checked_as_the_file_is() {
        let error = load(FINE, &["sparsity.ratoi=0.5"]).unwrap_err();
        assert_eq!(error.problems()[0].key(), "sparsity.ratoi");
        assert_eq!(error.problems()[0].origin.as_deref(), Some("--set sparsity.ratoi=0.5"));
        assert_eq!(error.problems()[0].excerpt(), Some("sparsity.ratoi"));
        assert!(load(FINE, &["sparsity"]).is_err());
        assert!(load(FINE, &["metric.0.power=0.5"]).unwrap().pipeline().is_ok());
    }

    #[test]
    fn a_resolved_recipe_is_a_recipe() {
        let text = format!(
            "{FINE}[[refine]]\nuse = 'rebuild'\nscope = 'group'\nrounds = 'until-converged'\nalpha = 'auto'\n\
             [[refine]]\nuse = 'swap'\n[[metric]]\nuse = 'gradient'\npower = 0.5\n"
        );
        let recipe = load(&text, &[]).unwrap().recipe;
        let again = load_text(Path::new("r.toml"), &recipe.to_toml().unwrap(), [], &[]).unwrap();
        assert_eq!(again.recipe, recipe);
    }
}
