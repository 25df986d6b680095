//! Recipes as their users and their editors meet them: the schema, messages, recipes built on
//! others, sweeps.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{fs, path::Path};

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::Value;
use util::{barber, flat, tensors};

const SCHEMA: &str = "recipes/barber.schema.json";

/// The published schema, compiled.
struct Schema(Schemas, SchemaIndex);

impl Schema {
    fn read() -> Self {
        let schema: Value = serde_json::from_str(&fs::read_to_string(SCHEMA).unwrap()).unwrap();
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource(SCHEMA, schema).unwrap();
        let index = compiler.compile(SCHEMA, &mut schemas).unwrap();
        Self(schemas, index)
    }

    /// What it says against a recipe.
    fn refuses(&self, recipe: &str) -> Option<String> {
        let recipe: Value = toml::from_str(recipe).unwrap();
        self.0.validate(&recipe, self.1).err().map(|error| error.to_string())
    }
}

/// The recipes that come with Barber.
fn published() -> Vec<String> {
    let files = fs::read_dir("recipes").unwrap().map(|entry| entry.unwrap().path());
    let recipe = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.ends_with(".toml") && !name.starts_with("study")
    };
    let recipes: Vec<String> =
        files.filter(|path| recipe(path)).map(|path| path.display().to_string()).collect();
    assert!(recipes.len() >= 10);
    recipes
}

#[test]
fn the_published_schema_is_up_to_date() {
    let run = barber(&["schema"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(fs::read_to_string(SCHEMA).unwrap() == run.stdout, "cargo run -- schema > {SCHEMA}");
}

#[test]
fn every_published_recipe_follows_the_schema() {
    let schema = Schema::read();
    for path in published() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("#:schema ./barber.schema.json\n"), "{path}");
        assert_eq!(schema.refuses(&text), None, "{path}");
    }
}

/// Goes through all keys of a schema.
fn keys(schema: &Value, path: &str, found: &mut dyn FnMut(&str, &Value)) {
    for (name, key) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        found(&path, key);
        keys(key, &path, found);
        keys(&key["items"], &path, found);
    }
    for alternative in schema["oneOf"].as_array().into_iter().flatten() {
        keys(alternative, path, found);
    }
}

#[test]
fn every_key_of_the_schema_is_described() {
    let schema: Value = serde_json::from_str(&fs::read_to_string(SCHEMA).unwrap()).unwrap();
    let mut paths = Vec::new();
    keys(&schema, "", &mut |path, key| {
        let help = key["description"].as_str().unwrap_or_default();
        assert!(!help.is_empty(), "{path} has no description");
        if let Some(default) = key.get("default") {
            assert!(help.ends_with(&format!("Default: `{default}`.")), "{path}: {help}");
        }
        paths.push(path.to_owned());
    });
    // A section, a stage's default, a metric's parameter.
    for path in [".sparsity.ratio", ".refine.limit", ".metric.power", ".evaluate.tasks.piqa"] {
        assert!(paths.iter().any(|found| found == path), "no {path} in {paths:?}");
    }
    let words = |pointer: &str| {
        let words = schema.pointer(pointer).unwrap()["enum"].as_array().unwrap();
        words.iter().map(|word| word.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(words("/properties/preset"), ["paper", "best", "fast", "reconstructed"]);
    let init = words("/properties/mask/properties/init");
    assert_eq!(init, ["magnitude", "wanda", "sparsegpt", "alps", "metric", "none"]);
    let scope = words("/properties/refine/items/properties/scope");
    assert_eq!(scope, ["model", "group", "layer", "row", "column"]);
    assert_eq!(schema.pointer("/properties/refine/items/properties/limit/default").unwrap(), 100);
}

/// What an editor underlines `barber check` refuses, and the other way round, but for what takes more
/// than one key to tell.
#[test]
fn the_schema_and_the_program_agree() {
    let schema = Schema::read();
    let fine = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";
    for (line, accepted) in [
        ("", true),
        ("sparsity.ratio = 0", true),
        ("sparsity.ratio = 1", false),
        ("sparsity.ratio = -0.1", false),
        ("sparsity.ratio = '0.5'", false),
        ("sparsity.ratoi = 0.5", false),
        ("sparsty.ratio = 0.5", false),
        ("sparsity.pattern = '2:4'", true),
        ("sparsity.pattern = '02:04'", true),
        ("sparsity.pattern = '2-4'", false),
        ("sparsity.pattern = '0:4'", false),
        ("sparsity.spread = 1", false),
        ("sparsity.outlier = 0", false),
        ("sparsity.exclude = 'lm_head'", false),
        ("sparsity.allocation = 'owl'", true),
        ("sparsity.allocation = 'owls'", false),
        ("calibration.samples = 0", false),
        ("calibration.samples = 131072", true),
        ("calibration.samples = 16777217", false),
        ("calibration.held_out = 0", true),
        ("calibration.sequence_length = 1", false),
        ("calibration.seed = -1", false),
        ("calibration.selection = 'packed'", true),
        ("mask.passes = 3", false),
        ("mask.init = 'sparsegpt'", true),
        ("mask.init = 'SparseGPT'", false),
        ("streams.blend = 1", true),
        ("streams.blend = 1.5", false),
        ("preset = 'best'", true),
        ("preset = 'worst'", false),
        ("executor.device = 'cuda:12'", true),
        ("executor.device = 'cuda'", false),
        ("executor.memory = '6 GiB'", true),
        ("executor.memory = 6000000000", true),
        ("executor.memory = []", false),
        ("output.dtype = 'f8'", false),
        ("refine = [{ use = 'swap', limit = 5 }]", true),
        ("refine = [{ limit = 5 }]", false),
        ("refine = [{ use = 'rebuild', alpha = 'auto' }]", true),
        ("refine = [{ use = 'rebuild', alpha = 'always' }]", false),
        ("refine = [{ use = 'rebuild', alpha = 1.5 }]", false),
        ("refine = [{ use = 'rebuild', rounds = 'until-converged' }]", true),
        ("refine = [{ use = 'rebuild', rounds = 0 }]", false),
        ("refine = [{ use = 'reconstruct', damping = -1 }]", false),
        ("metric = [{ use = 'magnitude', power = 2 }]", true),
        ("metric = [{ use = 'magnitude', pwer = 2 }]", false),
        ("metric = [{ use = 'magnitude', power = 'two' }]", false),
        ("metric = [{ use = 'normalise', over = 'column' }]", true),
        ("metric = [{ use = 'normalise', over = 'columns' }]", false),
        ("metric = [{ use = 'magnitud' }]", false),
        ("metric = [{ power = 2 }]", false),
        ("mask = { init = 'metric', metric = [{ use = 'ria' }] }", true),
        ("mask = { init = 'metric', metric = [{ use = 'ria', pwer = 1 }] }", false),
        ("blocks = [{ name = 'a', layers = ['q_proj'] }]", true),
        ("blocks = [{ name = 'a' }]", false),
        ("override = [{ tensors = '*.q_proj', ratio = 0.1 }]", true),
        ("override = [{ tensors = ['*.q_proj'], pattern = '2:4' }]", true),
        ("override = [{ tensors = '*', ratio = 1 }]", false),
        ("override = [{ ratio = 0.1 }]", false),
        ("evaluate.perplexity = ['a', { path = 'b', join = ' ' }]", true),
        ("evaluate.perplexity = [{ name = 'b' }]", false),
        ("evaluate.perplexity = [{ path = 'b', jon = ' ' }]", false),
        ("evaluate.tasks.piqa = 'p'", true),
        ("evaluate.tasks.pica = 'p'", false),
    ] {
        let text = format!("{fine}{line}\n");
        let refused = schema.refuses(&text);
        assert_eq!(refused.is_none(), accepted, "{line}: {refused:?}");
        let loaded = llm_barber::recipe::load_text(Path::new("r.toml"), &text, [], &[]);
        assert_eq!(loaded.is_ok(), accepted, "{line}: {loaded:?}");
    }
}

/// Writes recipes into a directory; the path of the one called `top.toml`.
fn recipes(dir: &Path, recipes: &[(&str, &str)]) -> String {
    for (name, text) in recipes {
        fs::write(dir.join(name), text).unwrap();
    }
    dir.join("top.toml").display().to_string()
}

/// The quickstart on little text, as a recipe to build on.
fn base() -> String {
    let quickstart = std::env::current_dir().unwrap().join("recipes/quickstart.toml");
    format!(
        "extends = '{}'\n[calibration]\nsamples = 8\nsequence_length = 64\n[evaluate]\nsegments = 4\n\
         sequence_length = 64\n[output]\npath = 'out'\n",
        quickstart.display()
    )
}

#[test]
fn a_recipe_is_built_on_another() {
    let dir = tempfile::tempdir().unwrap();
    let top = "extends = 'base.toml'\n[[refine]]\nuse = 'swap'\nlimit = 3\n";
    let path = recipes(dir.path(), &[("base.toml", &base()), ("top.toml", top)]);
    let check = barber(&["check", &path, "--json"]);
    assert_eq!(check.status, 0, "{}", check.stderr);
    let check: serde_json::Value = serde_json::from_str(&check.stdout).unwrap();
    for (key, source) in [
        ("model.path", "recipes/quickstart.toml line "),
        ("calibration.samples", "base.toml line 3"),
        ("refine.0.limit", "top.toml line 4"),
        ("mask.init", "recipes/quickstart.toml line "),
    ] {
        let mut settings = check["recipe"].as_array().unwrap().iter();
        let setting = settings.find(|setting| setting["key"] == key).unwrap();
        assert!(setting["source"].as_str().unwrap().contains(source), "{setting}");
    }
    let run = barber(&["prune", &path]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let out = dir.path().join("out");
    let resolved = fs::read_to_string(out.join("barber-recipe.toml")).unwrap();
    assert!(!resolved.contains("extends") && resolved.contains("limit = 3"), "{resolved}");
    // It says the same without what it was built on.
    let again = out.join("barber-recipe.toml").display().to_string();
    let run = barber(&[
        "prune",
        &again,
        "--set",
        &format!("output.path={}", dir.path().join("b").display()),
    ]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(tensors(&out), tensors(&dir.path().join("b")));

    let path = recipes(dir.path(), &[("base.toml", "extends = 'top.toml'\n"), ("top.toml", top)]);
    let run = barber(&["check", &path]);
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("in a circle"), "{}", run.stderr);
    assert!(flat(&run.stderr).contains("base.toml:1:11"), "{}", run.stderr);
}

const SWEEP: &str = "[sweep]\nmask.init = ['sparsegpt', 'magnitude']\nrefine.0.alpha = [0.1, 1]\n\
                     refine.0.retain = [true]\n";

#[test]
fn a_sweep_is_run_shared_and_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let sweep = format!("{}{SWEEP}", base());
    let path = recipes(dir.path(), &[("top.toml", &sweep)]);
    let out = dir.path().join("out");
    let names = [
        "init=sparsegpt,alpha=0.1,retain=true",
        "init=sparsegpt,alpha=1,retain=true",
        "init=magnitude,alpha=0.1,retain=true",
        "init=magnitude,alpha=1,retain=true",
    ];
    // A part of it first.
    let part = barber(&["prune", &path, "--set", "sweep.mask.init=['sparsegpt']"]);
    assert_eq!(part.status, 0, "{}", part.stderr);
    let first =
        |name: &str| fs::metadata(out.join(name).join("config.json")).unwrap().modified().unwrap();
    let before = names[..2].iter().map(|name| first(name)).collect::<Vec<_>>();
    let run = barber(&["prune", &path]);
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    assert!(
        run.stdout.contains("run 2 of 2: init=magnitude,alpha=1,retain=true"),
        "{}",
        run.stdout
    );
    let after = names[..2].iter().map(|name| first(name)).collect::<Vec<_>>();
    assert_eq!(before, after);
    let table = run.stdout.split("What came of each run").nth(1).unwrap();
    for name in names {
        assert!(table.contains(name), "no {name} in {table}");
    }
    let page = fs::read_to_string(out.join("barber-sweep.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains(names[3]));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 5);

    // Everything is there: as JSON, and nothing is run.
    let json = barber(&["prune", &path, "--json"]);
    assert_eq!(json.status, 0, "{}", json.stderr);
    let found: Value = serde_json::from_str(&json.stdout).unwrap();
    let runs = found["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|run| run["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    assert_eq!(runs[3]["settings"]["refine.0.alpha"], "1");

    // What is shared changes nothing: each run is what it is alone.
    let path = recipes(dir.path(), &[("top.toml", &base())]);
    for (name, run) in names.iter().zip(runs) {
        let alone = dir.path().join(format!("alone-{name}"));
        let mut sets = vec![format!("output.path={}", alone.display())];
        for (key, value) in run["settings"].as_object().unwrap() {
            sets.push(format!("{key}={}", value.as_str().unwrap()));
        }
        let mut arguments = vec!["prune", &path, "--json"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let single = barber(&arguments);
        assert_eq!(single.status, 0, "{}", single.stderr);
        assert_eq!(tensors(&out.join(name)), tensors(&alone), "{name}");
        let single: Value = serde_json::from_str(&single.stdout).unwrap();
        for key in ["perplexity", "groups", "operations"] {
            assert_eq!(run["report"][key], single[key], "{name}: {key}");
        }
    }

    // With other settings a run is no longer done, and replaced only by force.
    let path = recipes(dir.path(), &[("top.toml", &sweep.replace("samples = 8", "samples = 9"))]);
    let run = barber(&["prune", &path]);
    assert_eq!(run.status, 1);
    let message = flat(&run.stderr);
    assert!(message.contains(names[0]) && message.contains("--force"), "{message}");
    let run =
        barber(&["prune", &path, "--force", "--set", "sweep.mask.init=['magnitude']", "--json"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(
        serde_json::from_str::<Value>(&run.stdout).unwrap()["runs"].as_array().unwrap().len(),
        2
    );
}

#[test]
fn a_sweep_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipes(dir.path(), &[("top.toml", &format!("{}{SWEEP}", base()))]);
    let check = barber(&["check", &path]);
    assert_eq!(check.status, 0, "{}", check.stderr);
    assert!(check.stdout.contains("sweep     4 runs"), "{}", check.stdout);
    assert!(check.stdout.contains("  init=magnitude,alpha=0.1,retain=true\n"), "{}", check.stdout);
    let line = check.stdout.lines().find(|line| line.starts_with("refine.0.alpha")).unwrap();
    assert!(line.contains("0.1") && line.ends_with("top.toml line 12, swept"), "{line}");
    // What is wrong with one value is shown, and nothing is run.
    let wrong = format!("{}{}", base(), SWEEP.replace("'magnitude'", "'magnitud'"));
    let path = recipes(dir.path(), &[("top.toml", &wrong)]);
    let run = barber(&["prune", &path]);
    assert_eq!(run.status, 2);
    let message = flat(&run.stderr);
    for expected in ["`mask.init` cannot be `magnitud`", "top.toml:11:", "did you mean `magnitude`"]
    {
        assert!(message.contains(expected), "{message}");
    }
    assert!(!dir.path().join("out").exists());
    // A study's runs are no sweeps.
    let study = "recipe = 'top.toml'\nseeds = [0]\n[[case]]\nname = 'c'\n[[method]]\nname = 'm'\n";
    let fine = format!("{}{SWEEP}", base());
    recipes(dir.path(), &[("study.toml", study), ("top.toml", &fine)]);
    let run = barber(&["study", &dir.path().join("study.toml").display().to_string()]);
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("makes 4 runs"), "{}", run.stderr);
}

#[test]
fn what_is_wrong_with_a_later_run_is_said_before_the_first_one() {
    let dir = tempfile::tempdir().unwrap();
    for (sweep, status, run, expected) in [
        ("sparsity.pattern = ['2:4', '5:10']", 2, "pattern=5", "the pattern 5:10 does not divide"),
        ("executor.memory = ['2 GiB', '1 KiB']", 2, "memory=1", "executor.memory is too little"),
        ("sparsity.exclude = [['lm_head'], ['typo']]", 2, "exclude=", "no tensor of the model"),
        ("calibration.samples = [2, 9000]", 1, "samples=9000", "calibration.txt"),
    ] {
        let text = format!("{}[sweep]\n{sweep}\n", base());
        let path = recipes(dir.path(), &[("top.toml", &text)]);
        for command in ["prune", "check"] {
            let found = barber(&[command, &path]);
            let message = flat(&found.stderr);
            assert_eq!(found.status, status, "{command}: {message}");
            assert!(message.contains(expected) && message.contains(run), "{command}: {message}");
            assert!(!dir.path().join("out").exists(), "{sweep}");
        }
    }
}

#[test]
fn a_check_says_what_has_no_effect_and_what_is_pruned_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipes(dir.path(), &[("top.toml", &base())]);
    let sets = [
        "--set",
        "refine=[{ use = 'swap' }]",
        "--set",
        "metric=[{ use = 'gradient' }]",
        "--set",
        "override=[{ tensors = '*.down_proj', ratio = 0.25 }]",
    ];
    let check = barber(&[&["check", &path][..], &sets].concat());
    assert_eq!(check.status, 0, "{}", check.stderr);
    let said = flat(&check.stderr);
    assert!(
        said.contains("`metric` (--set metric=[{ use = 'gradient' }]) has no effect"),
        "{said}"
    );
    let json = barber(&[&["check", &path, "--json"][..], &sets].concat());
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    let number = |key: &str| json[key].as_f64().unwrap();
    let (mut weights, mut pruned) = (0.0, 0.0);
    for matrix in json["matrices"].as_array().unwrap() {
        let shape: f64 = (0..2).map(|i| matrix["shape"][i].as_f64().unwrap()).product();
        weights += shape;
        pruned += shape * matrix["ratio"].as_f64().unwrap();
    }
    assert_eq!((number("prunable_weights"), number("pruned_weights")), (weights, pruned));
    let all: usize = tensors(Path::new("recipes/quickstart/model"))
        .values()
        // Norms are none.
        .filter(|(_, shape, _)| shape.len() > 1)
        .map(|(_, shape, _)| shape.iter().product::<usize>())
        .sum();
    assert_eq!(number("model_weights"), all as f64);
    assert!(pruned < 0.5 * weights && weights < all as f64);
    let line = format!(
        "sparsity  {:.1}% of the {weights} weights above, {:.1}% of all {all} weights of the model",
        100.0 * pruned / weights,
        100.0 * pruned / all as f64
    );
    assert!(flat(&check.stdout).contains(&flat(&line)), "no {line:?} in {}", check.stdout);
    // The run says the same.
    let run = barber(&[&["prune", &path][..], &sets].concat());
    let share =
        format!("{:.1}% of {weights} weights pruned, with 1 override", 100.0 * pruned / weights);
    assert!(flat(&run.stdout).contains(&share), "no {share} in {}", run.stdout);
}
