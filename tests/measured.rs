//! What is measured of a model: that it is of what was written, and how certain it is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use serde_json::Value;
use util::{Run, barber, flat, recipe};

const TEXT: &str = "recipes/quickstart/evaluation.txt";

fn json(run: &Run) -> Value {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

/// The report of a short run of the quickstart's recipe to `dir`.
fn pruned(dir: &Path, sets: &[&str]) -> Value {
    let output = format!("output.path={}", dir.join("out").display());
    let short = ["calibration.samples=4", "evaluate.segments=5", &output];
    let mut arguments = vec!["prune", "recipes/quickstart.toml", "--json", "--force"];
    short.iter().chain(sets).for_each(|set| arguments.extend(["--set", set]));
    json(&barber(&arguments))
}

/// What `barber eval` says of what was written.
fn evaluated(dir: &Path, more: &[&str]) -> Value {
    let out = dir.join("out").display().to_string();
    let of =
        ["eval", &out, "--json", "--text", TEXT, "--sequence-length", "128", "--segments", "5"];
    json(&barber(&[&of, more].concat()))
}

#[test]
fn a_report_says_of_the_model_what_eval_says_of_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    for sets in [
        &["output.dtype=bf16"][..],
        &["output.dtype=f16", "refine=[]"],
        &["output.dtype=bf16", "mask.init=sparsegpt", "refine=[]"],
        &["output.dtype=bf16", "output.format=sparse-bitmask", "refine=[{ use = 'reconstruct' }]"],
        &["executor.stream_dtype=bf16"],
    ] {
        let report = pruned(dir.path(), sets);
        let found = &report["perplexity"][0]["final"];
        let eval = &evaluated(dir.path(), &[])["perplexity"][0];
        for key in ["perplexity", "perplexity_stderr", "cross_entropy", "losses"] {
            assert_eq!(found[key], eval[key], "{sets:?}: {key}");
            assert!(!eval[key].is_null());
        }
        let of = &report["perplexity"][0];
        let last = if of["refined"].is_null() { "initial" } else { "refined" };
        assert_eq!(of["final"], of[last]);
        let eval = json(&barber(&[
            "eval",
            "recipes/quickstart/model",
            "--json",
            "--text",
            TEXT,
            "--sequence-length",
            "128",
            "--segments",
            "5",
        ]));
        assert_eq!(
            report["perplexity"][0]["dense"]["perplexity"],
            eval["perplexity"][0]["perplexity"]
        );
    }
}

#[test]
fn answers_are_those_of_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let questions = std::path::absolute("tests/fixtures/tasks/arc_easy.jsonl").unwrap();
    let task = format!("evaluate.tasks.arc_easy='{}'", questions.display());
    let report = pruned(dir.path(), &["output.dtype=bf16", &task]);
    let asked = format!("arc_easy={}", questions.display());
    let eval = evaluated(dir.path(), &["--task", &asked]);
    let found = &report["tasks"][0]["final"];
    for key in ["acc", "acc_stderr", "questions"] {
        assert_eq!(found[key], eval["tasks"][0][key], "{key}");
        assert!(!found[key].is_null());
    }
}

const MODEL: &str = "recipes/quickstart/model";

/// What is said on the way, as one line.
fn said(run: &Run) -> String {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    flat(&run.stderr)
}

#[test]
fn sequences_are_as_long_as_the_model_knows_unless_more_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    // The model has 256 positions.
    let eval = |more: &[&str]| barber(&[&["eval", MODEL, "--json", "--text", TEXT], more].concat());
    let (left_out, as_long) = (eval(&[]), eval(&["--sequence-length", "256"]));
    assert_eq!(json(&left_out), json(&as_long));
    assert!(!left_out.stderr.contains("positions"), "{}", left_out.stderr);
    let longer = said(&eval(&["--sequence-length", "300", "--segments", "8"]));
    assert!(longer.contains("300 tokens, but the model is made for 256 positions"), "{longer}");
    assert!(longer.contains("--sequence-length to 256"), "{longer}");

    let recipe = dir.path().join("r.toml");
    let here = std::env::current_dir().unwrap();
    let text = format!(
        "model.path = '{}'\ncalibration = {{ source = '{}', samples = 2 }}\noutput.path = 'out'\n\
         evaluate = {{ perplexity = ['{}'], segments = 5 }}\n",
        here.join(MODEL).display(),
        here.join("recipes/quickstart/calibration.txt").display(),
        here.join(TEXT).display()
    );
    std::fs::write(&recipe, text).unwrap();
    let recipe = recipe.display().to_string();
    for command in ["check", "prune"] {
        let fine = barber(&[command, &recipe]);
        assert!(!said(&fine).contains("positions"), "{}", fine.stderr);
        for (key, what) in [
            ("calibration.sequence_length", "calibration samples of 257 tokens"),
            ("evaluate.sequence_length", "evaluation.txt: segments of 257 tokens"),
        ] {
            let set = format!("{key}=257");
            let more = format!("output.path={}", dir.path().join(key).display());
            let said = said(&barber(&[command, &recipe, "--set", &set, "--set", &more]));
            assert!(said.contains(what) && said.contains(&format!("{key} to 256")), "{said}");
        }
        assert_eq!(fine.stdout.contains("sequence_length = 256"), command == "check");
    }
    let resolved = std::fs::read_to_string(dir.path().join("out/barber-recipe.toml")).unwrap();
    assert_eq!(resolved.matches("sequence_length = 256").count(), 2, "{resolved}");
}

#[test]
fn a_table_of_positions_has_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.json");
    let row = |length: usize| (0..length).map(|i| i % 200).collect::<Vec<_>>();
    let write = |length| {
        let rows_of = serde_json::json!({ "token_ids": [row(20), row(length)] });
        std::fs::write(&rows, rows_of.to_string()).unwrap();
    };
    let recipe = dir.path().join("r.toml");
    let text = format!(
        "model.path = '{}'\ncalibration = {{ source = 'rows.json', samples = 2 }}\noutput.path = 'out'",
        std::env::current_dir().unwrap().join("tests/conformance/tiny-opt").display(),
    );
    std::fs::write(&recipe, text).unwrap();
    let recipe = recipe.display().to_string();
    write(128);
    said(&barber(&["check", &recipe]));
    write(129);
    for command in ["check", "prune"] {
        let run = barber(&[command, &recipe]);
        assert_eq!(run.status, 2, "{}", run.stderr);
        let error = flat(&run.stderr);
        assert!(
            error.contains("a sequence of 129 tokens, but the model has positions for 128"),
            "{error}"
        );
    }
    assert!(!dir.path().join("out").exists() && !dir.path().join("out.partial").exists());
}

#[test]
fn rows_of_token_ids_count_as_long_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipe(dir.path(), "");
    let estimate = |sets: &[&str]| {
        let mut arguments = vec!["check", &path, "--json", "--set", "calibration.held_out=1"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let mut found = json(&barber(&arguments));
        // Where values are from, and how fast the machine is.
        for key in ["recipe", "estimated_seconds"] {
            found.as_object_mut().unwrap().remove(key);
        }
        found
    };
    // The rows have 48 tokens, whatever the recipe says.
    assert_eq!(estimate(&[]), estimate(&["calibration.sequence_length=48"]));
    let run = barber(&["prune", &path, "--json", "--set", "calibration.held_out=1"]);
    let report = json(&run);
    let expected = serde_json::json!(
        { "samples": 4, "held_out": 1, "shortest": 48, "longest": 48, "tokens": 240 }
    );
    assert_eq!(report["calibration"], expected);
    let card = std::fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    let line = "- Calibration: 4 samples of 48 tokens of calibration.json, and 1 held out\n";
    assert!(card.contains(line), "{card}");
    let none = barber(&["prune", &path, "--json", "--force", "--set", "refine=[]"]);
    assert!(json(&none).get("calibration").is_none());
}

#[test]
fn a_text_too_short_for_held_out_samples_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string("recipes/quickstart/calibration.txt").unwrap();
    let short = dir.path().join("short.txt");
    std::fs::write(&short, &text[..1500]).unwrap();
    let source = format!("calibration.source={}", short.display());
    let output = format!("output.path={}", dir.path().join("out").display());
    let run = |samples: &str, held_out: &str| {
        barber(&[
            "prune",
            "recipes/quickstart.toml",
            "--set",
            &source,
            "--set",
            &output,
            "--force",
            "--set",
            "calibration.selection=random",
            "--set",
            "calibration.sequence_length=200",
            "--set",
            samples,
            "--set",
            held_out,
            "--set",
            "evaluate.perplexity=[]",
        ])
    };
    let error = run("calibration.samples=32", "calibration.held_out=4");
    assert_eq!(error.status, 1, "{}", error.stdout);
    let error = flat(&error.stderr);
    assert!(error.contains("at least 400, half of them for the held-out samples"), "{error}");
    said(&run("calibration.samples=2", "calibration.held_out=0"));
}

#[test]
fn a_perplexity_has_its_uncertainty_wherever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let output = format!("output.path={}", dir.path().join("out").display());
    let run = barber(&[
        "prune",
        "recipes/quickstart.toml",
        "--set",
        &output,
        "--set",
        "calibration.samples=4",
        "--set",
        "evaluate.segments=16",
    ]);
    assert!(!said(&run).contains("uncertain"), "{}", run.stderr);
    let out = dir.path().join("out");
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let report: Value = serde_json::from_str(&read("barber-report.json")).unwrap();
    let found = &report["perplexity"][0]["final"];
    let [value, error] =
        ["perplexity", "perplexity_stderr"].map(|key| found[key].as_f64().unwrap());
    assert!(error > 0.001 * value && error < 0.1 * value, "{value} ± {error}");
    // The error of a mean is that of the logarithm.
    let losses: Vec<f64> = found["losses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|of| of["nats"].as_f64().unwrap() / 127.0)
        .collect();
    let mean = losses.iter().sum::<f64>() / 16.0;
    let squares: f64 = losses.iter().map(|loss| (loss - mean).powi(2)).sum();
    assert!((value * (squares / 15.0 / 16.0).sqrt() / error - 1.0).abs() < 1e-9);
    assert!((mean.exp() / value - 1.0).abs() < 1e-9);
    assert!(run.stdout.contains(&format!("± {error:.4}")), "{}", run.stdout);
    let shown = format!("{value:.2} ± {error:.2}");
    assert!(read("README.md").contains(&shown), "{}", read("README.md"));
    let page = read("barber-report.html");
    assert!(page.contains(&format!("{value:.3} ± {error:.3}")), "{shown}");
    let path = out.display().to_string();
    let compared = barber(&["compare", &path]);
    assert!(compared.stdout.contains(&format!("{value:.3} ± {error:.3}")), "{}", compared.stdout);
    let evaluated =
        barber(&["eval", &path, "--text", TEXT, "--sequence-length", "128", "--segments", "16"]);
    let line = format!("perplexity {value:.4} ± {error:.4} on");
    assert!(evaluated.stdout.contains(&line), "{}", evaluated.stdout);

    // What says too little says so.
    for (segments, said_so) in [("1", true), ("7", true), ("8", false)] {
        let run = barber(&[
            "eval",
            MODEL,
            "--text",
            TEXT,
            "--sequence-length",
            "128",
            "--segments",
            segments,
        ]);
        assert_eq!(said(&run).contains("is uncertain"), said_so, "{}", run.stderr);
        assert_eq!(run.stdout.contains('±'), segments != "1", "{}", run.stdout);
    }
}
