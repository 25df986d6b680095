//! What comes from outside does not act on the terminal, nor on who reads what Barber writes.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{fs, path::Path};

use serde_json::Value;
use util::{Run, barber, command, output, recipe, tiny};

/// A title for the window, a cleared screen, a colour by C1 codes, and letters turned around.
const HOSTILE: &str = "\u{1b}]0;PWNED\u{7}\u{1b}[2J\u{9b}31m\u{202e}\u{2066}x\r\u{7f}";

/// That nothing of what was printed acts on a terminal.
#[track_caller]
fn is_clean(run: &Run) {
    for text in [&run.stdout, &run.stderr] {
        let acts = |c: char| {
            let turns =
                ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c);
            turns || c.is_control() && !"\n\t".contains(c)
        };
        assert!(!text.contains(acts), "{text:?}");
    }
    assert_ne!(run.status, 101);
}

/// A text in a string of TOML.
fn toml(text: &str) -> String {
    text.chars().map(|c| format!("\\U{:08x}", u32::from(c))).collect()
}

#[test]
fn of_configurations_and_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let set = tiny(dir.path(), |tensors, config| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert(format!("{HOSTILE}\nverified"), norm);
        config["model_type"] = format!("llama{HOSTILE}").into();
    });
    let model = set.strip_prefix("model.path=").unwrap();
    let shown = barber(&["inspect", model, "--tensors"]);
    assert_eq!(shown.status, 0, "{}", shown.stderr);
    is_clean(&shown);
    assert!(shown.stdout.contains("PWNED\\u0007\\u001b[2J"), "{}", shown.stdout);
    assert!(!shown.stdout.lines().any(|line| line.starts_with("verified")), "{}", shown.stdout);
    let json = barber(&["inspect", model, "--json"]);
    is_clean(&json);
    let found: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(found["model_type"], format!("llama{HOSTILE}"));
    is_clean(&barber(&["prune", &recipe(dir.path(), ""), "--set", &set]));
    is_clean(&barber(&["init", model, "--output", dir.path().join("r.toml").to_str().unwrap()]));
}

#[test]
fn of_names_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join(HOSTILE);
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(util::TINY).join(file), model.join(file)).unwrap();
    }
    let shown = model.to_str().unwrap();
    is_clean(&barber(&["inspect", shown]));
    is_clean(&barber(&["inspect", &format!("{shown}/nowhere")]));
    is_clean(&barber(&["eval", shown, "--text", "nowhere"]));
    is_clean(&barber(&["check", shown]));
    is_clean(&barber(&["prune", &format!("{shown}.toml")]));
    is_clean(&barber(&["compare", shown]));
    let target = recipe(dir.path(), "");
    is_clean(&barber(&["prune", &target, "-v", "--set", &format!("model.path={shown}")]));
    // Arguments that are refused, too.
    is_clean(&barber(&[shown]));
    is_clean(&barber(&["inspect", "model", shown]));
}

#[test]
fn of_recipes() {
    let dir = tempfile::tempdir().unwrap();
    let escaped = toml(HOSTILE);
    for lines in [
        format!("\"{escaped}\" = 1"),
        format!("preset = \"{escaped}\""),
        format!("metric = [{{ use = \"{escaped}\" }}]"),
        format!("blocks = [{{ name = \"{escaped}\", layers = [\"q_proj\"] }}]"),
        format!("sparsity.exclude = [\"{escaped}[\"]"),
        // As it stands in the file, it is shown with question marks of as many bytes.
        format!("sparsity.pattern = '2:4' # {HOSTILE} \\u001b[2J"),
        "sparsity.pattern = '\u{202e}PWNED \\u001b[2J'".to_owned(),
    ] {
        let run = barber(&["check", &recipe(dir.path(), &lines)]);
        assert_eq!(run.status, 2, "{lines}: {}", run.stdout);
        is_clean(&run);
    }
    let target = recipe(dir.path(), "");
    is_clean(&barber(&["check", &target, "--set", &format!("mask.init={HOSTILE}")]));
    is_clean(&barber(&["check", &target, "--set", HOSTILE]));
    is_clean(&output(
        command(Path::new(env!("CARGO_BIN_EXE_barber")))
            .args(["check", &target])
            .env("BARBER_MASK__INIT", HOSTILE),
    ));
    // With colours there are only those of the message.
    let run =
        barber(&["check", &target, "--color", "always", "--set", &format!("mask.init={HOSTILE}")]);
    assert!(run.stderr.contains('\u{1b}'), "{}", run.stderr);
    let plain = console::strip_ansi_codes(&run.stderr).into_owned();
    is_clean(&Run { stderr: plain, ..run });
    let study = dir.path().join("study.toml");
    fs::write(&study, format!("recipe = \"{escaped}\"\nseeds = [1]\ncase = [{{ name = \"a\" }}]\nmethod = [{{ name = \"{escaped}\" }}]")).unwrap();
    is_clean(&barber(&["study", study.to_str().unwrap()]));
}

#[test]
fn of_reports() {
    let dir = tempfile::tempdir().unwrap();
    let target = recipe(dir.path(), "");
    assert_eq!(barber(&["prune", &target]).status, 0);
    let out = dir.path().join("out");
    let file = out.join("barber-report.json");
    let mut report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let hostile = |value: &mut Value| *value = format!("{HOSTILE}\nthe result is fine").into();
    hostile(&mut report["matrices"][0]["tensor"]);
    hostile(&mut report["matrices"][1]["pattern"]);
    report["outputs"][HOSTILE] = "0".into();
    fs::write(&file, report.to_string()).unwrap();
    let out = out.to_str().unwrap();
    for command in ["compare", "verify", "reproduce"] {
        let run = barber(&[command, out]);
        is_clean(&run);
        assert!(
            !run.stdout.lines().any(|line| line.starts_with("the result is")),
            "{}",
            run.stdout
        );
        let json = barber(&[command, out, "--json"]);
        is_clean(&json);
    }
}

#[test]
fn a_model_card_is_what_it_looks_like() {
    let dir = tempfile::tempdir().unwrap();
    let name = "a\n`````\n---\n<script>alert(1)<\u{2f}script>.txt".replace('/', "_");
    let text = dir.path().join(name);
    fs::copy("recipes/quickstart/evaluation.txt", &text).unwrap();
    let path = toml(text.to_str().unwrap());
    let run = barber(&[
        "prune",
        "recipes/quickstart.toml",
        "--set",
        &format!("output.path={}", dir.path().join("out").display()),
        "--set",
        &format!("evaluate.perplexity=[\"{path}\"]"),
        "--set",
        "evaluate.segments=1",
        "--set",
        "calibration.samples=2",
    ]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let card = fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    // What is not in the block of code has no markup of the name's.
    let (before, block) = card.split_once("toml\n").unwrap();
    let fence = before.rsplit('\n').next().unwrap();
    assert!(fence.len() > 5 && fence.chars().all(|c| c == '`'), "{fence}");
    assert!(block.trim_end().ends_with(fence) && block.matches(fence).count() == 1, "{block}");
    assert!(!before.contains("<script>"), "{before}");
    let page = fs::read_to_string(dir.path().join("out/barber-report.html")).unwrap();
    assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
}

#[test]
fn names_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for (lines, key) in [
        ("blocks = [{ name = \"a\\n````\\n\", layers = [\"q_proj\"] }]", "`blocks.0.name`"),
        (
            "evaluate.perplexity = [{ path = \"x\", name = \"a\\u0007\" }]",
            "`evaluate.perplexity.0.name`",
        ),
    ] {
        let run = barber(&["check", &recipe(dir.path(), lines)]);
        assert!(run.status == 2 && run.stderr.contains(key), "{}", run.stderr);
        assert!(util::flat(&run.stderr).contains("control character"), "{}", run.stderr);
    }
}
