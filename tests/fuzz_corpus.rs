//! Replays the seeds of the fuzz targets, and what fuzzing has found, on the stable toolchain.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking")]

#[path = "../fuzz/src/checks.rs"]
mod checks;

use std::{fs, path::Path};

/// Every fuzz target.
const TARGETS: [&str; 9] =
    ["config", "rebuild", "recipe", "records", "report", "shard", "swap", "task", "tokenizer"];

fn replay(target: &str, check: fn(&[u8])) {
    assert!(TARGETS.contains(&target));
    let seeds = files(&format!("fuzz/corpus/{target}"), check);
    assert!(seeds >= 5, "{target} has {seeds} seeds");
    let found = format!("fuzz/regressions/{target}");
    if Path::new(&found).exists() {
        assert!(files(&found, check) > 0);
    }
}

fn files(dir: &str, check: fn(&[u8])) -> usize {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            println!("{}", path.display());
            check(&fs::read(&path).unwrap());
        })
        .count()
}

#[test]
fn every_target_is_replayed() {
    let targets = fs::read_dir("fuzz/fuzz_targets").unwrap();
    let mut targets: Vec<String> =
        targets.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    targets.sort();
    assert_eq!(targets, TARGETS.map(|target| format!("{target}.rs")));
}

#[test]
fn config() {
    replay("config", checks::config);
}

#[test]
fn rebuild() {
    replay("rebuild", checks::rebuild);
}

#[test]
fn recipe() {
    replay("recipe", checks::recipe);
}

#[test]
fn records() {
    replay("records", checks::records);
}

#[test]
fn report() {
    replay("report", checks::report);
}

#[test]
fn shard() {
    replay("shard", checks::shard);
}

#[test]
fn swap() {
    replay("swap", checks::swap);
}

#[test]
fn task() {
    replay("task", checks::task);
}

#[test]
fn tokenizer() {
    replay("tokenizer", checks::tokenizer);
}
