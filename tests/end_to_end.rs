//! Swaps over the whole model, as a user runs them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use serde_json::Value;
use util::{barber, flat};

/// Prunes the quickstart to `out` with stages after swaps; returns its report.
fn pruned(out: &Path, stages: &str, pattern: &str) -> Value {
    let sets = [
        format!("refine=[{{ use = 'swap' }}{stages}]"),
        format!("output.path={}", out.display()),
        format!("sparsity.pattern={pattern}"),
        "preset=best".into(),
        "evaluate.generate=0".into(),
    ];
    let mut arguments = vec!["prune", "recipes/quickstart.toml", "--json"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    assert_eq!(run.status, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

/// The report of the quickstart with a stage after swaps.
fn report(stage: &str, pattern: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    pruned(&dir.path().join("out"), &format!(", {stage}"), pattern)
}

/// A finished stage never has a higher held-out objective than it began with, and lowers perplexity
/// where groups alone cannot.
#[test]
fn the_whole_models_predictions_come_nearer_to_the_dense_models() {
    for (pattern, kept) in [("unstructured", 0.5), ("2:4", 0.6)] {
        let report = report("{ use = 'end-to-end', steps = 40, lambda = 50 }", pattern);
        let steps = report["steps"].as_array().unwrap();
        let held_out: Vec<f64> =
            steps.iter().filter_map(|step| step["held_out"].as_f64()).collect();
        let best = held_out.iter().copied().reduce(f64::min).unwrap();
        assert!(best < kept * held_out[0], "{pattern}: {held_out:?}");
        // Two steps warm up.
        assert!(steps[..3].iter().all(|step| step["swaps"] == 0), "{steps:?}");
        assert!(steps[3]["swaps"].as_u64().unwrap() > 0, "{steps:?}");
        let found = &report["perplexity"][0];
        let [dense, refined] =
            ["dense", "refined"].map(|of| found[of]["perplexity"].as_f64().unwrap());
        // Swaps of groups alone leave it at 1.18 times the dense model's, and 1.49 times at 2:4.
        let most = if pattern == "2:4" { 1.3 } else { 1.1 };
        assert!(refined / dense < most, "{pattern}: {refined} {dense}");
    }
}

/// Steps that only raise the divergence leave the masks as they were.
#[test]
fn steps_that_do_harm_are_taken_back() {
    let report = report(
        "{ use = 'end-to-end', steps = 20, fraction = 1.0, lambda = 1e-6, momentum = 0 }",
        "unstructured",
    );
    let steps = report["steps"].as_array().unwrap();
    let first = steps[0]["held_out"].as_f64().unwrap();
    // The samples of the next steps tell, and λ follows.
    assert!(steps.iter().any(|step| step["kept"].as_f64().is_some_and(|kept| kept < 0.0)));
    assert!(steps[20]["lambda"].as_f64().unwrap() > 1e-6, "{steps:?}");
    let later = steps[1..].iter().filter_map(|step| step["held_out"].as_f64());
    assert!(later.clone().count() > 0 && later.clone().all(|found| found > first), "{steps:?}");
    let perplexity = report["perplexity"][0]["refined"]["perplexity"].as_f64().unwrap();
    assert!((perplexity - 2.198).abs() < 0.01, "{perplexity}");
}

/// How many weights each matrix keeps follows from the objective, and the model keeps as many.
#[test]
fn layers_share_what_the_model_keeps() {
    let kept = |scope: &str| -> Vec<u64> {
        let stage = format!("{{ use = 'end-to-end', scope = '{scope}', steps = 20, lambda = 50 }}");
        let report = report(&stage, "unstructured");
        let matrices = report["matrices"].as_array().unwrap().iter();
        matrices.map(|matrix| matrix["kept"].as_u64().unwrap()).collect()
    };
    let [row, layer, model] = ["row", "layer", "model"].map(kept);
    assert_eq!(row, layer);
    assert_ne!(row, model);
    let all = |kept: &[u64]| kept.iter().sum::<u64>();
    assert_eq!(all(&row), all(&model));
}

/// New values of the kept weights: the masks are those of the stage before, and zeros stay zeros.
#[test]
fn distillation_brings_the_predictions_nearer_and_leaves_the_masks() {
    let dir = tempfile::tempdir().unwrap();
    let pruned = |name: &str, stages: &str| {
        let out = dir.path().join(name);
        let report = pruned(&out, stages, "unstructured");
        let verified =
            barber(&["verify", out.to_str().unwrap(), "--dense", "recipes/quickstart/model"]);
        assert_eq!(verified.status, 0, "{}", verified.stderr);
        (report, util::tensors(&out))
    };
    let (swaps, masked) = pruned("swaps", "");
    let (report, found) =
        pruned("distilled", ", { use = 'distill', steps = 30, step_size = 0.002 }");
    assert_eq!(swaps["changed_weights"].as_u64().unwrap_or(0), 0);
    let mut changed = 0;
    for (name, (_, shape, bytes)) in &masked {
        let size = bytes.len() / shape.iter().product::<usize>();
        for (before, after) in bytes.chunks(size).zip(found[name].2.chunks(size)) {
            let zero = |of: &[u8]| of.iter().all(|byte| *byte == 0);
            assert_eq!(zero(before), zero(after), "{name}");
            changed += u64::from(before != after);
        }
    }
    assert_eq!(report["changed_weights"].as_u64(), Some(changed));
    let held_out: Vec<f64> = report["steps"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|step| step["held_out"].as_f64())
        .collect();
    let best = held_out.iter().copied().reduce(f64::min).unwrap();
    assert!(best < 0.3 * held_out[0], "{held_out:?}");
    let perplexity = |of: &Value| of["perplexity"][0]["refined"]["perplexity"].as_f64().unwrap();
    // The dense model has 1.87.
    let [before, after] = [&swaps, &report].map(perplexity);
    assert!(before > 2.1 && after < 2.0, "{before} {after}");
}

/// Steps that are far too large end with the weights that there were.
#[test]
fn distillation_that_does_harm_is_taken_back() {
    let report = report("{ use = 'distill', steps = 30, step_size = 10.0 }", "2:4");
    let steps = report["steps"].as_array().unwrap();
    let held_out: Vec<f64> = steps.iter().filter_map(|step| step["held_out"].as_f64()).collect();
    assert!(held_out[1..].iter().all(|found| *found > held_out[0]), "{held_out:?}");
    // The stage ends before its last step.
    assert_eq!(steps.len(), 1 + 4 * 5, "{steps:?}");
    assert_eq!(report["changed_weights"].as_u64().unwrap_or(0), 0);
}

#[test]
fn the_summary_says_what_the_steps_did() {
    let dir = tempfile::tempdir().unwrap();
    let out = format!("output.path={}", dir.path().join("out").display());
    let stage = "refine=[{ use = 'end-to-end', steps = 3 }, { use = 'distill', steps = 4 }]";
    let run = barber(&["prune", "recipes/quickstart.toml", "--set", &out, "--set", stage]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let said = flat(&run.stdout);
    assert!(
        said.contains("steps 3 over the whole model") && said.contains("nats per token held out"),
        "{said}"
    );
    assert!(said.contains("steps 4 over the whole model, which change kept weights"), "{said}");
    let page = std::fs::read_to_string(dir.path().join("out/barber-report.html")).unwrap();
    assert_eq!(page.matches("Divergence by step (logarithmic)").count(), 2);
}
