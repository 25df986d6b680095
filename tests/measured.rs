//! What is measured of a model: that it is of what was written, and how certain it is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use serde_json::Value;
use util::{Run, barber};

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
