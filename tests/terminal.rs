//! The program on a terminal, in a pipe and for other programs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use util::{Run, barber, command, flat, output, recipe};

const BARBER: &str = env!("CARGO_BIN_EXE_barber");

fn succeeds(run: &Run) -> &str {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    &run.stdout
}

fn json(run: &Run) -> Value {
    serde_json::from_str(succeeds(run)).unwrap()
}

/// Prunes the tiny LLaMA; where it is then.
fn pruned(dir: &Path, sets: &[&str]) -> String {
    let recipe = recipe(dir, "");
    let mut arguments = vec!["prune", &recipe, "--force"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    succeeds(&barber(&arguments));
    dir.join("out").display().to_string()
}

#[test]
fn inspect_tells_patterns_apart() {
    let dir = tempfile::tempdir().unwrap();
    for (sets, pattern, sparsity) in [
        (&["sparsity.pattern=2:4"][..], "2:4", 0.5),
        (&["sparsity.pattern=4:8"], "4:8", 0.5),
        (&["sparsity.pattern=1:4"], "1:4", 0.75),
        (&["sparsity.ratio=0.6"], "unstructured", 0.6),
        (&["sparsity.ratio=0"], "dense", 0.0),
    ] {
        let out = pruned(dir.path(), sets);
        let report = json(&barber(&["inspect", &out, "--json"]));
        assert_eq!(report["model_type"], "llama");
        let layers = &report["layers"];
        assert_eq!(layers["pattern"], pattern, "{report}");
        assert!((layers["sparsity"].as_f64().unwrap() - sparsity).abs() < 1e-3, "{report}");
        assert_eq!(report["total"]["pattern"], if pattern == "dense" { "dense" } else { "mixed" });
        for tensor in report["tensors"].as_array().unwrap() {
            let name = tensor["name"].as_str().unwrap();
            let expected = match name {
                _ if name.ends_with("_proj.weight") => pattern.into(),
                _ if name.contains("norm") => Value::Null,
                _ => "dense".into(),
            };
            assert_eq!(tensor["pattern"], expected, "{tensor}");
        }
        let shown = barber(&["inspect", &out]);
        assert!(succeeds(&shown).contains("all layers"), "{}", shown.stdout);
        assert!(shown.stdout.contains(pattern), "{}", shown.stdout);
        assert!(!shown.stdout.contains("q_proj"));
        assert!(shown.stdout.lines().all(|line| line.chars().count() <= 80));
        let tensors = barber(&["inspect", &out, "--tensors"]);
        assert!(succeeds(&tensors).contains("model.layers.1.self_attn.q_proj "));
        assert!(tensors.stdout.lines().all(|line| line.chars().count() <= 80));
    }
    // Of a model with images the ends of long names are left.
    for (model, name) in [
        ("mistral3", "…_projector.patch_merger.merging_layer"),
        ("gemma3-images", "all vision_tower.encoder.layers"),
    ] {
        let shown = barber(&["inspect", &format!("tests/fixtures/logits/{model}")]);
        assert!(succeeds(&shown).contains(name), "{}", shown.stdout);
    }
    for model in families() {
        let shown = barber(&["inspect", &model]);
        assert!(succeeds(&shown).contains("layers"), "{}", shown.stdout);
        assert!(shown.stdout.lines().all(|line| line.chars().count() <= 80), "{}", shown.stdout);
    }
    let missing = barber(&["inspect", "nowhere"]);
    assert_eq!(missing.status, 1);
    assert!(flat(&missing.stderr).contains("no checkpoint at nowhere"), "{}", missing.stderr);
}

/// The families' small checkpoints.
fn families() -> Vec<String> {
    let dirs = fs::read_dir("tests/fixtures/logits").unwrap();
    dirs.map(|dir| dir.unwrap().path().display().to_string()).collect()
}

/// A file of as many samples, and as long ones, as a recipe wants; as a setting.
fn samples(dir: &Path, recipe: &str) -> String {
    let number = |key: &str| {
        let line = recipe.lines().find_map(|line| line.strip_prefix(&format!("{key} = "))).unwrap();
        line.split_whitespace().next().unwrap().parse::<usize>().unwrap()
    };
    let path = dir.join("ids.json");
    let rows = vec![vec![1; number("sequence_length")]; number("samples") + 100];
    fs::write(&path, serde_json::json!({ "token_ids": rows }).to_string()).unwrap();
    format!("calibration.source={}", path.display())
}

#[test]
fn init_writes_a_recipe_that_can_be_checked() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("calibration.txt"), "for the user to put there").unwrap();
    for model in families() {
        let path = dir.path().join(format!("{}.toml", model.replace('/', "-")));
        let target = path.display().to_string();
        let run = barber(&["init", &model, "--output", &target]);
        assert!(succeeds(&run).contains("calibration.source"), "{}", run.stdout);
        // These checkpoints have no tokenizer.
        assert!(flat(&run.stdout).contains("tokenizer.json: missing"), "{}", run.stdout);
        let text = fs::read_to_string(&path).unwrap();
        let source = samples(dir.path(), &text);
        let check = ["check", &target, "--set", &source];
        let checked = barber(&check);
        assert!(succeeds(&checked).contains("preset = \"best\""));
        // What it takes is what `check` says.
        let memory = checked.stdout.split("memory    ").nth(1).unwrap();
        let memory = memory.split(" at the peak").next().unwrap();
        assert!(flat(&text).contains(&flat(memory)), "{memory}\n{text}");
        let comments = text.lines().filter(|line| line.starts_with('#'));
        assert!(comments.into_iter().all(|line| line.chars().count() <= 100), "{text}");
        // And what stands there as comments can be said, too.
        let said =
            text.replace("# [[", "[[").replace("# tensors", "tensors").replace("# ratio", "ratio");
        let said =
            said.replace("# use", "use").replace("# scope", "scope").replace("# alpha", "alpha");
        let said = said.replace("# selection", "selection").replace("# exclude", "exclude");
        assert!(said.matches("\n[[").count() == 2, "{said}");
        fs::write(&path, said).unwrap();
        let checked = barber(&check);
        assert!(succeeds(&checked).contains("refine.0.use = \"rebuild\""), "{}", checked.stdout);
    }
}

#[test]
fn init_finds_its_files_and_replaces_none() {
    let dir = tempfile::tempdir().unwrap();
    let here = std::env::current_dir().unwrap();
    let link = |name: &str, to: &str| {
        std::os::unix::fs::symlink(here.join(to), dir.path().join(name)).unwrap();
    };
    link("Tiny-Model", "recipes/quickstart/model");
    link("c.txt", "recipes/quickstart/calibration.txt");
    link("e.txt", "recipes/quickstart/evaluation.txt");
    let at = |arguments: &[&str]| {
        output(command(Path::new(BARBER)).current_dir(dir.path()).args(arguments))
    };
    let model = "Tiny-Model";
    let arguments = ["init", model, "--calibration", "c.txt", "--text", "e.txt"];
    assert!(!succeeds(&at(&arguments)).contains("calibration.source"));
    let again = at(&arguments);
    assert_eq!(again.status, 1);
    assert!(again.stderr.contains("--force"), "{}", again.stderr);
    let written = dir.path().join("tiny-model.toml");
    fs::write(&written, "mine").unwrap();
    succeeds(&at(&["init", model, "--calibration", "c.txt", "--force"]));
    assert!(fs::read_to_string(&written).unwrap().starts_with("# A recipe for tiny-model"));
    // From another directory the paths lead back.
    fs::create_dir(dir.path().join("recipes")).unwrap();
    let target = "recipes/r.toml";
    succeeds(&at(&[&arguments[..], &["--output", target]].concat()));
    let text = fs::read_to_string(dir.path().join(target)).unwrap();
    assert!(text.contains("\"../c.txt\"") && text.contains("[\"../e.txt\"]"), "{text}");
    let sets = ["--set", "calibration.samples=8", "--set", "calibration.sequence_length=64"];
    let run = at(&[&["prune", target, "--set", "evaluate.sequence_length=64"], &sets[..]].concat());
    succeeds(&run);
    assert!(dir.path().join("recipes/tiny-model-pruned/model.safetensors").is_file());
}

#[test]
fn a_forecast_is_given_before_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let set = ["--set", &format!("output.path={out}")];
    let recipe = "recipes/quickstart.toml";
    let takes = "\ntakes     a few seconds on this machine\n";
    let checked = barber(&["check", recipe]);
    assert!(succeeds(&checked).contains(takes), "{}", checked.stdout);
    let seconds = &json(&barber(&["check", recipe, "--json"]))["estimated_seconds"];
    let seconds = seconds.as_f64().unwrap();
    assert!(seconds > 0.0 && seconds.is_finite(), "{seconds}");
    // Where the device is not, the rest is said all the same.
    let gpu = barber(&["check", recipe, "--set", "executor.device=cuda:99"]);
    assert!(succeeds(&gpu).contains("the time cannot be measured here"), "{}", gpu.stdout);
    let run = barber(&[&["prune", recipe][..], &set].concat());
    assert!(succeeds(&run).contains(takes), "{}", run.stdout);
    let swept = ["--set", "sweep.sparsity.ratio=[0.5, 0.6]"];
    let checked = barber(&[&["check", recipe][..], &swept].concat());
    assert!(flat(succeeds(&checked)).contains("for the first of the 2 runs"), "{}", checked.stdout);
}

#[test]
fn init_says_what_is_missing_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let here = std::env::current_dir().unwrap().join("recipes/quickstart");
    let at = |arguments: &[&str]| {
        output(command(Path::new(BARBER)).current_dir(dir.path()).args(arguments))
    };
    fs::write(dir.path().join("model-Q4.gguf"), "GGUF").unwrap();
    let run = at(&["init", "model-Q4.gguf"]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("give the model that it was made from"), "{}", run.stderr);
    // A text with too few tokens for the recipe is said at once; it is written all the same.
    fs::write(dir.path().join("short.txt"), "too short a text").unwrap();
    let model = here.join("model").display().to_string();
    let run = at(&["init", &model, "--calibration", "short.txt"]);
    assert!(flat(succeeds(&run)).contains("short.txt: too little text"), "{}", run.stdout);
    let text = fs::read_to_string(dir.path().join("model.toml")).unwrap();
    for expected in ["samples = 32\n", "128 × 2048"] {
        assert!(text.contains(expected), "{text}");
    }
    let tokens = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split(['=', '#']).nth(1).unwrap().trim().parse::<usize>().unwrap()
    };
    assert!(tokens("sequence_length") <= 256, "{text}");
}

/// The names of the commands, as `--help` lists them.
fn commands() -> Vec<String> {
    let help = barber(&["--help"]);
    let listed = succeeds(&help).split("Commands:\n").nth(1).unwrap();
    let lines = listed.lines().take_while(|line| line.starts_with("  "));
    let names: Vec<String> =
        lines.filter_map(|line| line[2..].split(' ').next().map(Into::into)).collect();
    names.into_iter().filter(|name: &String| !name.is_empty() && name != "help").collect()
}

#[test]
fn every_command_has_help_and_the_same_options() {
    let names = commands();
    for name in ["init", "check", "prune", "eval", "inspect", "study", "metrics", "man"] {
        assert!(names.iter().any(|known| known == name), "{name} in {names:?}");
    }
    for name in names {
        let help = barber(&[&name, "--help"]);
        for option in ["--quiet", "--verbose", "--color"] {
            assert!(succeeds(&help).contains(option), "{name}: {}", help.stdout);
        }
    }
}

#[test]
fn shells_get_completions() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let run = barber(&["completions", shell]);
        for name in commands() {
            assert!(succeeds(&run).contains(&name), "{shell}: {name}");
        }
    }
    // What bash completes, asked as it does.
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("barber");
    fs::write(&script, barber(&["completions", "bash"]).stdout).unwrap();
    let ask = format!(
        "source '{}'; COMP_WORDS=(barber ins); COMP_CWORD=1; _barber barber ins barber; \
         echo \"${{COMPREPLY[@]}}\"",
        script.display()
    );
    let run = output(Command::new("bash").args(["-c", &ask]));
    assert_eq!(succeeds(&run).trim(), "inspect", "{}", run.stderr);
    assert_eq!(barber(&["completions", "tcsh"]).status, 2);
}

#[test]
fn every_command_has_a_manual_page() {
    let page = barber(&["man"]);
    assert!(succeeds(&page).contains(".TH barber 1"), "{}", page.stdout);
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("share/man1");
    succeeds(&barber(&["man", "--output", pages.to_str().unwrap()]));
    assert_eq!(fs::read_to_string(pages.join("barber.1")).unwrap(), page.stdout);
    let mut names = commands();
    for name in &names {
        let page = fs::read_to_string(pages.join(format!("barber-{name}.1"))).unwrap();
        assert!(page.contains(&format!(".TH barber-{name} 1")), "{page}");
    }
    names.push("barber".into());
    assert_eq!(fs::read_dir(&pages).unwrap().count(), names.len());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let run = barber(&["man", "--output", file.to_str().unwrap()]);
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains("file"), "{}", run.stderr);
}

#[test]
fn a_reader_who_has_seen_enough_is_no_error() {
    let mut child = Command::new(BARBER)
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    // But what could not be written is one.
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    for argument in ["metrics", "--help"] {
        let full = full.try_clone().unwrap();
        let done = Command::new(BARBER).arg(argument).stdout(full).output().unwrap();
        assert_eq!(done.status.code(), Some(1));
        assert!(String::from_utf8(done.stderr).unwrap().contains("cannot be printed"));
    }
}

#[test]
fn quiet_and_verbose_mean_the_same_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str], log: Option<&str>| {
        let mut command = command(Path::new(BARBER));
        command.args(["prune", &recipe(dir.path(), ""), "--force"]).args(arguments);
        if let Some(log) = log {
            command.env("BARBER_LOG", log);
        }
        output(&mut command)
    };
    let usual = run(&[], None);
    assert!(succeeds(&usual).starts_with("model "), "{}", usual.stdout);
    // No progress where there is no terminal.
    assert_eq!(usual.stderr, "");
    let quiet = run(&["-q"], None);
    assert!(succeeds(&quiet).starts_with("pruned "), "{}", quiet.stdout);
    assert_eq!(quiet.stderr, "");
    let verbose = run(&["-v"], None);
    assert!(succeeds(&verbose).starts_with("model "));
    assert_eq!(verbose.stderr.matches(" INFO refined ").count(), 4, "{}", verbose.stderr);
    assert!(!verbose.stderr.contains("q_proj"), "{}", verbose.stderr);
    let more = run(&["-vv"], None);
    assert_eq!(more.stderr.matches("q_proj").count(), 2, "{}", more.stderr);
    // The options go before the variable.
    assert_eq!(run(&[], Some("info")).stderr, verbose.stderr);
    assert_eq!(run(&["-q"], Some("info")).stderr, "");
    assert_eq!(run(&["-v"], Some("error")).stderr, verbose.stderr);
    let wrong = run(&[], Some("llm_barber=loud"));
    assert_eq!(wrong.status, 2);
    assert!(wrong.stderr.contains("BARBER_LOG"), "{}", wrong.stderr);
    assert_eq!(run(&["-q", "-v"], None).status, 2);
    // JSON is all that there is on standard output, however much is said.
    let run = run(&["--json", "-v"], None);
    assert_eq!(json(&run)["groups"].as_array().unwrap().len(), 4, "{}", run.stdout);
}

#[test]
fn what_is_found_can_be_had_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let checked = json(&barber(&["check", &recipe, "--json"]));
    let settings = checked["recipe"].as_array().unwrap();
    let init = settings.iter().find(|setting| setting["key"] == "mask.init").unwrap();
    assert_eq!((&init["value"], checked["layers"].as_u64()), (&"\"magnitude\"".into(), Some(2)));
    assert_eq!(checked["matrices"].as_array().unwrap().len(), 14);
    assert!(checked["memory"].as_f64().unwrap() > 0.0);
    let metrics = json(&barber(&["metrics", "--json"]));
    let names: Vec<&str> =
        metrics.as_array().unwrap().iter().map(|metric| metric["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"weight-gradient"), "{names:?}");
}

#[test]
fn colours_are_for_terminals_and_can_be_had_elsewhere() {
    let run = |arguments: &[&str], no_color: bool| {
        let mut command = command(Path::new(BARBER));
        command.args(["inspect", "nowhere"]).args(arguments).env_remove("NO_COLOR");
        if no_color {
            command.env("NO_COLOR", "1");
        }
        let done = command.output().unwrap();
        assert_eq!(done.status.code(), Some(1));
        String::from_utf8(done.stderr).unwrap()
    };
    assert!(!run(&[], false).contains('\x1b'));
    assert!(run(&["--color", "always"], false).contains('\x1b'));
    assert!(run(&["--color", "always"], true).contains('\x1b'));
    assert!(!run(&["--color=never"], false).contains('\x1b'));
}

/// What a terminal of so many columns gets of a command, standard error as well, by util-linux's
/// `script`.
#[cfg(target_os = "linux")]
fn on_terminal(columns: usize, arguments: &str, colours: bool) -> String {
    let mut script = command(Path::new("script"));
    let run = format!("stty cols {columns} rows 24; '{BARBER}' {arguments}");
    script.args(["--quiet", "--return", "--command", &run, "/dev/null"]);
    script.env("TERM", "xterm").env_remove("NO_COLOR");
    if !colours {
        script.env("NO_COLOR", "1");
    }
    let done = script.stdin(Stdio::null()).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    String::from_utf8(done.stdout).unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn no_line_is_wider_than_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let fits = |columns: usize, arguments: &str| {
        let shown = on_terminal(columns, arguments, false);
        let widest = shown.lines().max_by_key(|line| console::measure_text_width(line)).unwrap();
        assert!(console::measure_text_width(widest) <= columns, "{arguments}: {widest}");
        shown
    };
    fits(80, "--help");
    commands().iter().for_each(|name| drop(fits(80, &format!("{name} --help"))));
    let out = dir.path().join("out").display().to_string();
    let mut fewer = Vec::new();
    for columns in [80, 60] {
        let set = format!("--force --set output.path={out} --set calibration.samples=8");
        fits(columns, &format!("prune recipes/quickstart.toml --quiet {set}"));
        fits(columns, "check recipes/quickstart.toml");
        fits(columns, "metrics");
        fits(columns, &format!("inspect {out} --tensors --quiet"));
        fewer.push(fits(columns, &format!("inspect {out} --quiet")));
        fits(columns, &format!("compare {out} {out}"));
        fits(columns, &format!("verify {out} --quiet"));
        fits(
            columns,
            &format!("eval {out} --text recipes/quickstart/evaluation.txt --segments 2 --quiet"),
        );
    }
    // No word is broken, and nothing is left out.
    let words = |shown: &str| {
        let mut words: Vec<_> = shown.split_whitespace().map(str::to_owned).collect();
        words.sort_unstable();
        words.dedup();
        words
    };
    assert_eq!(words(&fewer[0]), words(&fewer[1]));
    // In a pipe a table is as wide as it is, unless COLUMNS says how wide it may be.
    let compare = |columns: &str| {
        let mut compare = command(Path::new(BARBER));
        compare.args(["compare", &out, &out]).env("COLUMNS", columns);
        let shown = output(&mut compare).stdout;
        shown.lines().map(console::measure_text_width).max().unwrap()
    };
    assert!(compare("") > 80 && compare("200") > 80 && compare("50") <= 50);
}

#[test]
#[cfg(target_os = "linux")]
fn a_terminal_shows_progress() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let prune =
        format!("prune recipes/quickstart.toml --force --set output.path={}", out.display());
    let shown = on_terminal(80, &prune, false);
    for phase in ["dense, evaluation.txt", "refinement"] {
        assert!(shown.contains(phase), "{phase}: {shown}");
    }
    assert!(shown.contains("layer 1/3") && shown.contains(" left"), "{shown}");
    // Nothing of it stays: what is drawn last is the summary, and no line is wider than the terminal.
    let last = shown.rsplit("\x1b[2K").next().unwrap();
    assert!(last.contains("written   "), "{shown}");
    let lines = shown.split(['\r', '\n']).filter(|line| line.contains('─'));
    let widest = lines.map(console::measure_text_width).max().unwrap();
    assert!(widest <= 80, "{widest}: {shown}");
    assert!(!shown.contains("\x1b[36m"), "{shown}");
    assert!(on_terminal(80, &prune, true).contains("\x1b[36m"));
    let quiet = on_terminal(80, &format!("{prune} --quiet"), true);
    assert!(!quiet.contains("refinement  ") && !quiet.contains('\x1b'), "{quiet}");
    assert!(quiet.starts_with("pruned "), "{quiet}");
}

/// A device that takes nothing.
#[cfg(target_os = "linux")]
fn full() -> fs::File {
    fs::File::options().write(true).open("/dev/full").unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn an_error_that_cannot_be_printed_has_its_status() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    for (arguments, status) in [
        (&["check", "nothing.toml"][..], 2),
        (&["inspect", "nowhere"], 1),
        (&["nonsense"], 2),
        (&["check", &recipe, "--set", "mask.init=x"], 2),
        // Log lines are lost, and the run is not.
        (&["prune", &recipe, "-vv"], 0),
    ] {
        let mut command = command(Path::new(BARBER));
        let done = command.args(arguments).stderr(full()).output().unwrap();
        assert_eq!(done.status.code(), Some(status), "{arguments:?}");
        let _ = fs::remove_dir_all(dir.path().join("out"));
        // Closed, as `2>&-` does.
        let mut closed = util::command(Path::new("sh"));
        closed.args(["-c", "exec \"$@\" 2>&-", "sh", BARBER]).args(arguments);
        assert_eq!(closed.output().unwrap().status.code(), Some(status), "{arguments:?}");
        let _ = fs::remove_dir_all(dir.path().join("out"));
        // A pipe whose reader is gone.
        let mut child = util::command(Path::new(BARBER))
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(status), "{arguments:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_is_honoured_whatever_becomes_of_its_message() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let rounds = "refine=[{ use = 'rebuild', scope = 'group', rounds = 10000, alpha = 0.001 }]";
        let mut command = command(Path::new(BARBER));
        command.args(["prune", "recipes/quickstart.toml", "--set", rounds]);
        command.args(["--set", &format!("output.path={}", out.display())]);
        let mut child = command.stdout(full()).stderr(full()).spawn().unwrap();
        let partial = dir.path().join("out.partial");
        while !partial.is_dir() {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let id = child.id().to_string();
        Command::new("kill").args([&format!("-{signal}"), &id]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status));
    }
}

/// The message of a command that is refused as a mistake of the user's.
#[track_caller]
fn mistaken(arguments: &[&str]) -> String {
    let run = barber(arguments);
    assert_eq!(run.status, 2, "{arguments:?}: {}{}", run.stdout, run.stderr);
    flat(&run.stderr)
}

#[test]
fn what_another_command_takes_is_pointed_to() {
    let dir = tempfile::tempdir().unwrap();
    let target = recipe(dir.path(), "");
    let out = pruned(dir.path(), &[]);
    let study = "recipes/study-smollm2.toml";
    for command in ["prune", "check"] {
        for (given, expected) in [
            (study, format!("run `barber study {study}`")),
            (util::TINY, format!("`barber init {}` writes one", util::TINY)),
            ("org/model", "`barber init org/model` writes one".into()),
            (&out, format!("its own is {out}/barber-recipe.toml")),
        ] {
            let message = mistaken(&[command, given]);
            assert!(message.contains(&expected), "no {expected:?} in {message}");
        }
    }
    assert!(mistaken(&["study", &target]).contains(&format!("run `barber prune {target}`")));
    for command in ["inspect", "init"] {
        assert!(mistaken(&[command, &target]).contains("takes a model's directory"));
    }
    let nothing = mistaken(&["eval", util::TINY]);
    assert!(nothing.contains("--text FILE") && nothing.contains("--task NAME=FILE"), "{nothing}");
}

#[test]
fn an_option_that_is_a_key_is_pointed_to() {
    for (option, key) in [
        ("--ratio", "sparsity.ratio"),
        ("--ratio=0.5", "sparsity.ratio"),
        ("--pattern", "sparsity.pattern"),
        ("--sequence-length", "calibration.sequence_length"),
        ("--samples", "calibration.samples"),
        ("--model", "model.path"),
        ("--init", "mask.init"),
        ("--seed", "calibration.seed"),
    ] {
        let message = mistaken(&["prune", "recipes/quickstart.toml", option, "0.5"]);
        let expected = format!("--set {key}=VALUE");
        assert!(message.contains(&expected), "no {expected:?} in {message}");
    }
    assert!(!mistaken(&["inspect", "m", "--ratio"]).contains("--set"));
    assert!(!mistaken(&["prune", "r.toml", "--nonsense"]).contains("--set "));
}

#[test]
fn paths_that_no_shell_has_expanded_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let target = recipe(dir.path(), "");
    for key in ["output.path", "model.path", "calibration.source", "evaluate.tasks.piqa"] {
        for value in ["~/x", "~"] {
            let message = mistaken(&["check", &target, "--set", &format!("{key}={value}")]);
            let expected = format!("`{key}`: `~` is not expanded");
            assert!(message.contains(&expected), "no {expected:?} in {message}");
        }
        if key != "model.path" {
            let message = mistaken(&["check", &target, "--set", &format!("{key}=")]);
            assert!(message.contains(&format!("`{key}`: is an empty path")), "{message}");
        }
    }
    let text = "evaluate.perplexity=['~/x.txt']";
    assert!(mistaken(&["check", &target, "--set", text]).contains("`evaluate.perplexity.0"));
    for arguments in [
        &["inspect", "~/model"][..],
        &["init", util::TINY, "--output=~/r.toml"],
        &["eval", util::TINY, "--task=piqa=~/piqa.jsonl"],
    ] {
        assert!(mistaken(arguments).contains("`~` is not expanded"));
    }
    assert!(!Path::new("~").exists());
}

#[test]
fn settings_with_one_underscore_are_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let target = recipe(dir.path(), "");
    let mut command = command(Path::new(BARBER));
    command.args(["check", &target]).env("BARBER_SPARSITY_RATIO", "0.7");
    command.env("BARBER_MASK__INIT", "magnitude");
    let run = output(&mut command);
    assert!(succeeds(&run).contains("sparsity.ratio = 0.5"), "{}", run.stdout);
    let warnings: Vec<&str> = run.stderr.lines().collect();
    assert_eq!(warnings.len(), 1, "{}", run.stderr);
    let expected = "BARBER_SPARSITY_RATIO; did you mean BARBER_SPARSITY__RATIO?";
    assert!(warnings[0].contains(expected), "{}", run.stderr);
}

#[test]
fn figures_at_the_ends_are_figures() {
    let dir = tempfile::tempdir().unwrap();
    let target = recipe(dir.path(), "");
    let nothing = barber(&["prune", &target, "--set", "sparsity.ratio=0"]);
    assert!(!succeeds(&nothing).contains("NaN"), "{}", nothing.stdout);
    assert!(nothing.stdout.contains(", 0% of "), "{}", nothing.stdout);
    let most = ["--set", "sparsity.ratio=0.999", "--set", "refine=[{ use = 'reconstruct' }]"];
    let most = barber(&[&["prune", &target, "--force"][..], &most].concat());
    assert!(succeeds(&most).contains(", 99.9% of "), "{}", most.stdout);
    assert!(!most.stdout.contains("100%") && most.stdout.contains("\nreconstruct "));
    for file in ["README.md", "barber-report.html"] {
        let text = fs::read_to_string(dir.path().join("out").join(file)).unwrap();
        assert!(text.contains("99.9% pruned"), "{file}");
    }
}
