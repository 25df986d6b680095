//! A metric outside the workspace, linked into a binary of its own, is found by a recipe; a second
//! metric of a name that is taken is an error.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use util::{flat, recipe, run};

/// Builds the outside crate once, beside this test's own binaries, and returns their folder.
static BINARIES: LazyLock<PathBuf> = LazyLock::new(|| {
    let target = Path::new(env!("CARGO_BIN_EXE_barber")).parent().unwrap().parent().unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--manifest-path", "tests/outside-metric/Cargo.toml"])
        .env("CARGO_TARGET_DIR", target)
        .status()
        .unwrap();
    assert!(built.success());
    target.join("debug")
});

#[test]
fn a_recipe_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(
        dir.path(),
        "metric = [{ use = 'gradient' }, { use = 'row-magnitude', floor = 0.1 }]",
    );
    let outside = BINARIES.join("outside-metric");
    let listed = run(&outside, &["metrics"]);
    assert_eq!(listed.status, 0);
    for expected in ["row-magnitude", "floor = 1e-6", "weight-gradient"] {
        assert!(listed.stdout.contains(expected), "{}", listed.stdout);
    }
    let pruned = run(&outside, &["prune", &recipe]);
    assert_eq!(pruned.status, 0, "{}", pruned.stderr);
    assert!(pruned.stdout.contains("gradient · row-magnitude"), "{}", pruned.stdout);
    // Barber's own binary does not know it.
    let unknown = util::barber(&["prune", &recipe, "--force"]);
    assert_eq!(unknown.status, 2);
    assert!(flat(&unknown.stderr).contains("no metric is named `row-magnitude`"));
}

#[test]
fn two_metrics_of_one_name_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let duplicate = BINARIES.join("duplicate");
    for arguments in [&["metrics"][..], &["prune", &recipe]] {
        let run = run(&duplicate, arguments);
        assert_eq!(run.status, 2);
        let message = flat(&run.stderr);
        assert!(message.contains("two metric plugins are named `magnitude`"), "{message}");
    }
}
