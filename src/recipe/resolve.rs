//! From a recipe's text and what is layered over it to what it means.

use std::path::Path;

use figment::{Figment, error::Kind, value::Value};

use super::{
    Allocate, Calibration, Init, Mask, Pattern, Recipe, RecipeError, Scope, Sparsity,
    error::{Fault, Problem, alternatives, nearest},
    keys::{key, keys},
    layers::{Layer, merge},
    refine, rules,
    text::Text,
};
use crate::{
    evaluate::{TASKS, Task},
    hub::is_name,
    limits::{self, GLOB, GLOBS, TOKENS},
};

/// A resolved recipe, and where each of its values comes from.
#[derive(Debug)]
pub struct Loaded {
    /// What the recipe means. Paths of the file are relative to the file.
    pub recipe: Recipe,
    pub(super) source: Source,
}

/// What a recipe was resolved from.
#[derive(Debug)]
pub(super) struct Source {
    text: Text,
    figment: Figment,
    values: Value,
}

/// Resolves the recipe in a file, under `BARBER_*` environment variables and `key=value`
/// assignments.
///
/// # Errors
/// All that is wrong with it.
pub fn load(path: &Path, sets: &[String]) -> Result<Loaded, RecipeError> {
    let text = read(path, "a recipe, such as recipes/quickstart.toml")?;
    // Unicode or not, a variable of another program is none of our concern.
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    load_text(path, &text, variables, sets)
}

/// The text of a file that is `what` it should be.
pub(super) fn read(path: &Path, what: &str) -> Result<String, RecipeError> {
    let text = limits::read(path, limits::RECIPE).map_err(|e| e.to_string()).and_then(|bytes| {
        String::from_utf8(bytes)
            .map_err(|e| format!("not UTF-8 from byte {} on", e.utf8_error().valid_up_to()))
    });
    text.map_err(|why| {
        let name = path.display().to_string();
        let mut problem =
            Problem::new(Vec::new(), Fault::Read(why)).help(format!("give the path of {what}"));
        problem.origin = Some(name.clone());
        RecipeError::new(&name, None, vec![problem])
    })
}

/// Resolves the text of a recipe that is or could be in the file `path`.
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
/// All that is wrong with it.
pub fn load_text(
    path: &Path,
    text: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Loaded, RecipeError> {
    let name = path.display().to_string();
    let fail = |problems| RecipeError::new(&name, Some(text), problems);
    let (parsed, values) = Text::parse(&name, text).map_err(fail)?;
    let mut layers = vec![Layer::defaults(), Layer::file(path, values)];
    let mut problems = Vec::new();
    let variables =
        variables.into_iter().filter_map(|(name, value)| Layer::variable(&name, &value));
    for layer in variables.chain(sets.iter().map(|set| Layer::set(set))) {
        match layer {
            Ok(layer) => layers.push(layer),
            Err(problem) => problems.push(problem),
        }
    }
    let named = layers.iter().rev().find_map(Layer::named_preset).map(str::to_owned);
    match named.as_deref().map(Layer::preset).transpose() {
        // Above the defaults, below all that the user says.
        Ok(preset) => layers.splice(1..1, preset).for_each(drop),
        Err(problem) => problems.push(problem),
    }
    let (figment, values, unmerged) = merge(layers);
    problems.extend(unmerged);
    let source = Source { text: parsed, figment, values: values.into() };

    let mut known = source.values.clone();
    take_unknown(&mut known, &mut Vec::new(), &mut problems);
    let recipe = match known.deserialize::<Recipe>() {
        Ok(mut recipe) => {
            settle_ratio(&source, &mut recipe, &mut problems);
            refine::settle(&mut recipe, &mut problems);
            check(&recipe, &mut problems);
            rules::check(&recipe, &mut problems);
            recipe
        }
        Err(error) => {
            problems.extend(error.into_iter().map(typed));
            return Err(fail(source.locate(problems)));
        }
    };
    if !problems.is_empty() {
        return Err(fail(source.locate(problems)));
    }
    let mut recipe = recipe;
    let dir = path.parent().unwrap_or(Path::new(""));
    for (key, path) in recipe.paths_mut() {
        if source.is_from_file(&super::error::segments(&key)) {
            let joined = dir.join(&*path);
            // A model's name on the hub has the form of a path.
            if key != "model.path" || joined.is_dir() || !is_name(path) {
                *path = joined;
            }
        }
    }
    let loaded = Loaded { recipe, source };
    // The metrics' own parameters are part of the recipe too.
    loaded.pipeline()?;
    loaded.initial_pipeline()?;
    Ok(loaded)
}

impl Loaded {
    /// Where the value of a key comes from: `my.toml line 12`, `environment variable BARBER_…`,
    /// `--set …`, or `default`.
    pub fn origin(&self, key: &str) -> String {
        self.source.origin(&super::error::segments(key)).unwrap_or_else(|| "default".into())
    }
}

impl Source {
    fn value(&self, path: &[String]) -> Option<&Value> {
        path.iter().try_fold(&self.values, |value, segment| match value {
            Value::Array(_, items) => items.get(segment.parse::<usize>().ok()?),
            Value::Dict(_, dict) => dict.get(segment),
            _ => None,
        })
    }

    fn is_from_file(&self, path: &[String]) -> bool {
        self.value(path)
            .and_then(|value| match value {
                // A table has no tag of its own.
                Value::Dict(_, dict) => dict.values().next(),
                value => Some(value),
            })
            .and_then(|value| self.figment.get_metadata(value.tag()))
            .is_some_and(|metadata| metadata.source.is_some())
    }

    fn origin(&self, path: &[String]) -> Option<String> {
        let metadata = self.figment.get_metadata(self.value(path)?.tag())?;
        match self.text.place(path).filter(|_| metadata.source.is_some()) {
            Some(place) => Some(self.text.origin(place.value.start)),
            None => Some(metadata.name.to_string()),
        }
    }

    /// Gives each problem its origin, and its place in the text if it has one there.
    fn locate(&self, problems: Vec<Problem>) -> Vec<Problem> {
        problems.into_iter().map(|problem| self.locate_one(problem)).collect()
    }

    pub(super) fn error(&self, problems: Vec<Problem>) -> RecipeError {
        RecipeError::new(&self.text.name, Some(&self.text.text), self.locate(problems))
    }

    fn locate_one(&self, mut problem: Problem) -> Problem {
        if problem.origin.is_some() {
            return problem;
        }
        // What is missing is pointed at by the table that it is missing from.
        let mut path = problem.path.clone();
        while self.value(&path).is_none() && path.len() > 1 {
            path.pop();
        }
        // What is missing comes from nowhere, unless its table is in the file.
        problem.origin = self.origin(&path).filter(|origin| origin != "default");
        if self.is_from_file(&path) || (path.len() < problem.path.len()) {
            problem.span = self.text.place(&path).map(|place| match problem.fault {
                Fault::UnknownKey | Fault::Missing => place.key.clone(),
                _ => place.value.clone(),
            });
        }
        problem
    }
}

/// Removes the keys that no recipe has.
fn take_unknown(value: &mut Value, path: &mut Vec<String>, problems: &mut Vec<Problem>) {
    match value {
        Value::Dict(_, dict) => {
            // What a metric's parameters are, only the metric knows.
            let open = matches!(path.as_slice(), [first, ..] if first == "metric")
                || matches!(path.as_slice(), [first, second, ..] if first == "mask" && second == "metric");
            if !open && has_children(path) {
                let names: Vec<String> = dict.keys().cloned().collect();
                for name in names {
                    path.push(name.clone());
                    if key(path).is_none() {
                        dict.remove(&name);
                        problems.push(unknown(path.clone()));
                    }
                    path.pop();
                }
            }
            for (name, value) in dict.iter_mut() {
                path.push(name.clone());
                take_unknown(value, path, problems);
                path.pop();
            }
        }
        Value::Array(_, items) => {
            for (i, item) in items.iter_mut().enumerate() {
                path.push(i.to_string());
                take_unknown(item, path, problems);
                path.pop();
            }
        }
        _ => {}
    }
}

/// The names of the keys in the table at `path`.
fn children(path: &[String]) -> impl Iterator<Item = &'static str> {
    let segments = path.iter().map(|s| if s.parse::<usize>().is_ok() { "N" } else { s });
    let mut prefix = segments.collect::<Vec<_>>().join(".");
    if !prefix.is_empty() {
        prefix.push('.');
    }
    keys().iter().filter_map(move |key| {
        let name = key.path.strip_prefix(&prefix)?;
        (!name.contains('.')).then_some(name)
    })
}

fn has_children(path: &[String]) -> bool {
    children(path).next().is_some()
}

fn unknown(path: Vec<String>) -> Problem {
    let (name, table) = match path.split_last() {
        Some((name, table)) => (name.clone(), table.to_vec()),
        None => (String::new(), Vec::new()),
    };
    // It may stand in the wrong table.
    let elsewhere = keys()
        .iter()
        .find(|key| key.path.rsplit('.').next() == Some(&name) && key.path.contains('.'));
    let help = match (nearest(&name, children(&table)), elsewhere) {
        (Some(near), _) => format!("did you mean `{near}`?"),
        (None, Some(key)) => format!("there is `{}`", key.path),
        (None, None) => format!("known here: {}", alternatives(children(&table))),
    };
    Problem::new(path, Fault::UnknownKey).help(help)
}

/// A type error of figment's as a problem.
pub(super) fn typed(error: figment::Error) -> Problem {
    let mut path = error.path.clone();
    let (fault, help) = match error.kind {
        Kind::MissingField(name) => {
            path.push(name.into_owned());
            (Fault::Missing, None)
        }
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            (Fault::Type { found: found.to_string(), expected }, None)
        }
        Kind::UnknownVariant(found, known) => {
            let near = nearest(&found, known.iter().copied());
            let known = alternatives(known.iter().copied());
            let help = match near {
                Some(near) => format!("did you mean `{near}`? There is {known}"),
                None => format!("there is {known}"),
            };
            (Fault::Choice { found }, Some(help))
        }
        Kind::UnknownField(name, known) => {
            // figment has the key in the path where a map's own key is at fault.
            if path.last() != Some(&name) {
                path.push(name.clone());
            }
            let near = nearest(&name, known.iter().copied());
            let known = alternatives(known.iter().copied());
            let help = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None if known.is_empty() => "the metric has no parameters".into(),
                None => format!("known here: {known}"),
            };
            (Fault::UnknownKey, Some(help))
        }
        other => (Fault::Value(other.to_string()), None),
    };
    let help = help.or_else(|| key(&path).map(|key| key.help.clone()));
    let problem = Problem::new(path, fault);
    match help {
        Some(help) => problem.help(help),
        None => problem,
    }
}

/// The type errors of what stands at a key.
pub(super) fn typed_in(key: &str, error: figment::Error) -> Vec<Problem> {
    let prefix = |mut problem: Problem| {
        problem.path.splice(0..0, super::error::segments(key));
        problem
    };
    error.into_iter().map(typed).map(prefix).collect()
}

/// The ratio that the pattern implies, unless the recipe gives another.
fn settle_ratio(source: &Source, recipe: &mut Recipe, problems: &mut Vec<Problem>) {
    let Some(implied) = Sparsity::implied_ratio(recipe.sparsity.pattern) else { return };
    let path = ["sparsity".to_owned(), "ratio".to_owned()];
    let given = source.value(&path).is_some();
    if given && (recipe.sparsity.ratio - implied).abs() > 1e-9 {
        let Pattern::NofM { .. } = recipe.sparsity.pattern else { return };
        let why = format!(
            "{} is not what the pattern {} prunes",
            recipe.sparsity.ratio, recipe.sparsity.pattern
        );
        problems.push(
            Problem::new(path.to_vec(), Fault::Value(why))
                .help(format!("leave it out, or write {implied}")),
        );
    }
    recipe.sparsity.ratio = implied;
}

/// What no type can say.
fn check(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let mut wrong = |key: &str, why: String, help: &str| {
        problems.push(Problem::at(key, Fault::Value(why)).help(help));
    };
    let ratio = recipe.sparsity.ratio;
    if !(0.0..1.0).contains(&ratio) {
        wrong(
            "sparsity.ratio",
            format!("{ratio} is not a share of weights that can be pruned"),
            "it must be at least 0 and below 1; 0.5 prunes half of the weights",
        );
    }
    let Sparsity { pattern, allocation, spread, outlier, .. } = recipe.sparsity;
    if allocation != Allocate::Uniform && pattern != Pattern::Unstructured {
        let help = "leave it out, or prune unstructured";
        wrong("sparsity.allocation", format!("the pattern {pattern} has one ratio"), help);
    }
    let format = recipe.output.format;
    if let Some(stored) = format.pattern().filter(|stored| *stored != pattern) {
        let name = format.name();
        let help = format!("prune with sparsity.pattern = \"{stored}\", or write another format");
        let why = format!("{name} stores the pattern {stored}, and sparsity.pattern is {pattern}");
        wrong("output.format", why, &help);
    }
    if !(0.0..1.0).contains(&spread) {
        wrong("sparsity.spread", format!("{spread} is no spread"), "at least 0 and below 1: 0.08");
    }
    if !(outlier.is_finite() && outlier > 0.0) {
        wrong("sparsity.outlier", format!("{outlier} is no factor"), "5 is usual");
    }
    if !(1..=2).contains(&recipe.mask.passes) {
        let help = "2, all initial masks before the refinement, or 1, layer by layer";
        wrong("mask.passes", format!("{} passes", recipe.mask.passes), help);
    }
    let Mask { init, metric, scope, .. } = &recipe.mask;
    let help = "a pipeline of metrics scores the weights where `mask.init` is `metric`";
    match init {
        Init::Metric => {}
        _ if !metric.is_empty() => wrong("mask.metric", format!("`{init}` has no metrics"), help),
        _ if scope.is_some() => wrong("mask.scope", format!("`{init}` has its own scope"), help),
        _ => {}
    }
    if let Some(scope @ (Scope::Group | Scope::Column)) = scope {
        let why = format!("initial masks are not chosen in a `{scope}`");
        wrong("mask.scope", why, "`row`, or `layer` for the whole matrix");
    }
    if !(0.0..=1.0).contains(&recipe.streams.blend) {
        let help =
            "it must be from 0, the pruned model's hidden states alone, to 1, the dense ones";
        wrong("streams.blend", format!("{} is no share", recipe.streams.blend), help);
    }
    let sizes = [
        ("calibration.samples", recipe.calibration.samples, 1),
        ("calibration.held_out", recipe.calibration.held_out, 0),
        ("calibration.sequence_length", recipe.calibration.sequence_length, 2),
        ("evaluate.sequence_length", recipe.evaluate.sequence_length, 2),
        ("evaluate.segments", recipe.evaluate.segments.unwrap_or(1), 1),
        ("evaluate.questions", recipe.evaluate.questions.unwrap_or(1), 1),
    ];
    for (key, size, least) in sizes {
        if !(least..=1 << 24).contains(&size) {
            let help = format!("it must be from {least} to {}", 1 << 24);
            wrong(key, format!("{size} is out of range"), &help);
        }
    }
    let Calibration { samples, held_out, sequence_length, .. } = recipe.calibration;
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
            wrong(&key, format!("a glob of {} bytes; {GLOB} are most", glob.len()), help);
        } else if all > GLOBS {
            wrong(&key, format!("more than {GLOBS} bytes of globs"), help);
            break;
        } else if let Err(error) = globset::Glob::new(glob) {
            wrong(&key, error.to_string(), help);
        }
    }
    for name in recipe.evaluate.tasks.keys().filter(|name| Task::named(name).is_none()) {
        let known = || TASKS.iter().map(|task| task.name);
        let near = nearest(name, known()).map(|near| format!("did you mean `{near}`? "));
        let help = format!("{}known: {}", near.unwrap_or_default(), alternatives(known()));
        wrong(&format!("evaluate.tasks.{name}"), "is no task".into(), &help);
    }
    let mut seen: Vec<&str> = Vec::new();
    for (i, block) in recipe.blocks.iter().enumerate() {
        if block.name.is_empty() || block.layers.is_empty() {
            let empty = if block.name.is_empty() { "name" } else { "layers" };
            let help = "a block has a name and the linear layers that it groups";
            wrong(&format!("blocks.{i}.{empty}"), "is empty".into(), help);
        }
        for (j, layer) in block.layers.iter().enumerate() {
            if seen.contains(&layer.as_str()) {
                let why = format!("`{layer}` is in two blocks");
                wrong(&format!("blocks.{i}.layers.{j}"), why, "a layer is rebuilt with one block");
            }
            seen.push(layer);
        }
    }
    let missing = [
        ("model.path", recipe.model.path.as_os_str().is_empty()),
        ("calibration.source", recipe.calibrates() && recipe.calibration.source.is_none()),
        ("output.path", recipe.output.path.is_none()),
        ("mask.metric", recipe.mask.init == Init::Metric && recipe.mask.metric.is_empty()),
    ];
    for (path, _) in missing.into_iter().filter(|(_, missing)| *missing) {
        let help = keys().iter().find(|key| key.path == path).map_or("", |key| &key.help);
        problems.push(Problem::at(path, Fault::Missing).help(help));
    }
    let rebuilds = recipe.refine.iter().any(|of| of.stage == Some(super::Kind::Rebuild));
    if rebuilds && recipe.metric.is_empty() {
        let help = "leave `metric` out for the paper's weight-gradient";
        problems.push(Problem::at("metric", Fault::Value("is empty".into())).help(help));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("sparsity.ratio = 'half'", "sparsity.ratio", "share"),
            ("sparsity.ratio = 1.5", "sparsity.ratio", "below 1"),
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
            ("sparsity.spread = 1", "sparsity.spread", "0.08"),
            ("sparsity.outlier = 0", "sparsity.outlier", "5"),
            ("streams.statistics = 'dens'", "streams.statistics", "`dense`"),
            ("mask.passes = 3", "mask.passes", "layer by layer"),
            ("mask.init = 'metric'", "mask.metric", "pipeline"),
            ("mask.metric = [{ use = 'ria' }]", "mask.metric", "`mask.init`"),
            ("mask.scope = 'layer'", "mask.scope", "`mask.init`"),
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
            ("refine = [{ use = 'rebuild', scope = 'colum' }]", "refine.0.scope", "`column`"),
            ("refine = [{ use = 'rebuild', alpha = 1.01 }]", "refine.0.alpha", "to 1"),
            ("refine = [{ use = 'rebuild', alpha = 'atuo' }]", "refine.0.alpha", "auto"),
            ("refine = [{ use = 'rebuild', rounds = 0 }]", "refine.0.rounds", "converged"),
            ("refine = [{ use = 'rebuild', rounds = 1.5 }]", "refine.0.rounds", "converged"),
            ("refine = [{ use = 'rebuild', limit = 5 }]", "refine.0.limit", "`swap`"),
            ("refine = [{ use = 'swap', scope = 'group' }]", "refine.0.scope", "`row`"),
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
            ("override = [{ tensors = '*', ratio = 1 }]", "override.0.ratio", "below 1"),
            ("override = [{ tensors = '*', scope = 'row' }]", "override.0.scope", "stage"),
            (
                "override = [{ tensors = '*', ratio = 0.3, pattern = '2:4' }]",
                "override.0.ratio",
                "unstructured",
            ),
            ("override = [{ tensor = '*', ratio = 0.3 }]", "override.0.tensor", "`tensors`"),
        ] {
            let error = load(&format!("{FINE}{line}\n"), &[]).expect_err(line);
            let problems: Vec<_> = error.problems().iter().collect();
            let problem = problems.iter().find(|p| p.key() == key);
            let problem = problem.unwrap_or_else(|| panic!("{line}: {problems:?}"));
            assert!(problem.help.as_deref().unwrap_or("").contains(help), "{line}: {problem:?}");
            let span = problem.span().unwrap_or_else(|| panic!("{line}: no span: {problem:?}"));
            assert!(span.start >= FINE.len(), "{line}: {span:?}");
        }
    }

    #[test]
    fn presets_are_below_all_that_the_user_says() {
        let text = format!("preset = 'best'\n{FINE}");
        let loaded = load(&text, &["streams.blend=0.2"]).unwrap();
        assert_eq!(loaded.recipe.streams.blend, 0.2);
        assert_eq!(loaded.recipe.refine[0].stage, Some(super::super::Kind::Swap));
        assert_eq!(loaded.origin("refine.0.use"), "preset `best`");
        assert_eq!(loaded.origin("streams.blend"), "--set streams.blend=0.2");
        let loaded = load(&text, &["preset=paper", "refine.0.alpha=auto"]).unwrap();
        assert_eq!(
            loaded.recipe.refine[0].alpha,
            Some(super::super::Share(crate::prune::Alpha::Auto))
        );
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
        assert!(error.to_string().contains("--set sparsity.ratoi=0.5"), "{error}");
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
