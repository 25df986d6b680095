//! The paper authors' results on a real checkpoint, SmolLM2-135M. It is not in this repository:
//!
//! ```sh
//! BARBER_SMOLLM2=DIR BARBER_WIKITEXT2=DIR cargo test --release --test smollm2 -- --ignored
//! ```
//!
//! where the first directory is the checkpoint and the second has `wikitext2-valid.txt` and
//! `wikitext2-test.txt`. It takes a quarter of an hour on two cores.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking")]

mod util;

use std::{env, path::Path};

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    evaluate::logits,
    model::Model,
};
use serde_json::Value;
use util::barber;

/// The directory that a variable names.
fn dir(variable: &str) -> String {
    env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set"))
}

#[test]
#[ignore = "needs BARBER_SMOLLM2"]
fn logits_are_those_of_transformers() {
    let recorded = std::fs::read("tests/fixtures/smollm2-logits.json").unwrap();
    let recorded: Value = serde_json::from_slice(&recorded).unwrap();
    let numbers = |key: &str| -> Vec<f64> {
        recorded[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
    };
    let ids: Vec<u32> = numbers("ids").iter().map(|id| *id as u32).collect();
    let reader = Reader::open(Path::new(&dir("BARBER_SMOLLM2"))).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let found = logits(&model, &Pruned::dense(), &ids).unwrap();
    let last = &found[found.len() - model.decoder.vocab_size..];
    for (i, recorded) in numbers("last_logits_of_first_512").iter().enumerate() {
        assert!((f64::from(last[i]) - recorded).abs() < 1e-3, "token {i}: {} {recorded}", last[i]);
    }
}

/// The report of a recipe's run on the checkpoint, and the perplexity of a stage.
fn report(recipe: &str, set: &str) -> Value {
    let (dir, texts) = (dir("BARBER_SMOLLM2"), dir("BARBER_WIKITEXT2"));
    let out = tempfile::tempdir().unwrap();
    let sets = [
        format!("model.path={dir}"),
        format!("calibration.source={texts}/wikitext2-valid.txt"),
        format!("evaluate.perplexity=[\"{texts}/wikitext2-test.txt\"]"),
        format!("output.path={}", out.path().join("out").display()),
        set.to_owned(),
    ];
    let path = format!("recipes/smollm2-{recipe}.toml");
    let mut arguments = vec!["prune", &path, "--json"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    assert_eq!(run.status, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

fn perplexity(report: &Value, mask: &str) -> f64 {
    report["perplexity"][0][mask]["perplexity"].as_f64().unwrap()
}

#[test]
#[ignore = "needs BARBER_SMOLLM2 and BARBER_WIKITEXT2"]
fn the_best_masks_are_better_than_the_papers() {
    for (set, most) in [("sparsity.ratio=0.5", 35.5), ("sparsity.pattern=2:4", 50.0)] {
        let report = report("best", set);
        let found = perplexity(&report, "refined");
        println!("{set}: {found:.4}");
        assert!(found <= most, "{set}: {found}");
        assert_eq!(report["changed_weights"], 0);
    }
}

#[test]
#[ignore = "needs BARBER_SMOLLM2 and BARBER_WIKITEXT2"]
fn perplexities_are_those_of_the_authors_code() {
    for (recipe, initial, rebuilt) in [
        ("magnitude", 480.9072, 63.2374),
        ("wanda", 47.0363, 45.5682),
        ("sparsegpt", 39.0757, 44.8876),
        ("wanda-2of4", 124.5245, 133.7458),
    ] {
        let report = report(recipe, "calibration.seed=0");
        for (mask, expected) in [("dense", 24.938), ("initial", initial), ("refined", rebuilt)] {
            let found = perplexity(&report, mask);
            println!("{recipe}, {mask}: {found:.4}, the authors' code {expected}");
            let off = (found / expected - 1.0).abs();
            assert!(off < 0.01, "{recipe}, {mask}: {found}, the authors' code {expected}");
        }
    }
}
