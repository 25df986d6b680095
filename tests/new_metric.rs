//! `barber new-metric`: the crate that it writes builds and passes its tests at once, outside the
//! workspace and in it, and a recipe finds its metric.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use util::{barber, flat, output, recipe, run};

/// Where generated crates are built: beside this test's own binaries, to share what is built.
fn target() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_barber")).parent().unwrap().parent().unwrap()
}

fn cargo(dir: &Path, arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(dir);
    command.env("CARGO_NET_OFFLINE", "true").env("CARGO_TARGET_DIR", target());
    // A dependency is built again where this differs from what the tests' own build had.
    command.env_remove("CARGO_MANIFEST_DIR");
    let run = output(&mut command);
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
}

/// A binary that links a second metric of a name that is taken.
const DUPLICATE: &str = r#"
use barber_metric::{MetricPlugin, inventory};
use barber_row_norm::RowNorm;

inventory::submit! { MetricPlugin::of::<RowNorm>("magnitude", "another magnitude") }

fn main() -> std::process::ExitCode {
    llm_barber::cli::main()
}
"#;

/// Writes a crate outside the workspace once, tests it without Barber, builds its binary and a second
/// one, and returns their folder.
static BINARIES: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("row-norm");
    let _ = fs::remove_dir_all(&dir);
    let written = barber(&["new-metric", "row-norm", "--path", dir.to_str().unwrap()]);
    assert_eq!(written.status, 0, "{}", written.stderr);
    cargo(&dir, &["test"]);
    fs::create_dir(dir.join("src/bin")).unwrap();
    fs::write(dir.join("src/bin/duplicate.rs"), DUPLICATE).unwrap();
    // For another workspace Barber is built again, here as fast as it can be; its dependencies are those
    // of the tests, if their profile is.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let mut profile: toml::Table = fs::read_to_string(manifest).unwrap().parse().unwrap();
    profile.retain(|section, _| section == "profile");
    let tests = dir.join("profile.toml");
    fs::write(&tests, profile.to_string()).unwrap();
    let tests = format!("--config={}", tests.display());
    let fast = "--config=profile.dev.package.llm-barber.opt-level=0";
    cargo(&dir, &["build", "--bins", "--features", "barber", &tests, fast]);
    target().join("debug")
});

#[test]
fn a_recipe_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let recipe =
        recipe(dir.path(), "metric = [{ use = 'gradient' }, { use = 'row-norm', power = 0.5 }]");
    let outside = BINARIES.join("barber-row-norm");
    let listed = run(&outside, &["metrics"]);
    assert_eq!(listed.status, 0);
    for expected in ["row-norm", "power = 1.0   # The power that the input's", "weight-gradient"] {
        assert!(listed.stdout.contains(expected), "{}", listed.stdout);
    }
    let pruned = run(&outside, &["prune", &recipe]);
    assert_eq!(pruned.status, 0, "{}", pruned.stderr);
    assert!(pruned.stdout.contains("gradient · row-norm"), "{}", pruned.stdout);
    // Barber's own binary does not know it.
    let unknown = barber(&["prune", &recipe, "--force"]);
    assert_eq!(unknown.status, 2);
    assert!(flat(&unknown.stderr).contains("unknown metric `row-norm`"));
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

/// In a workspace like Barber's, whose library is no more than what a metric's binary calls.
#[test]
fn in_the_workspace_it_is_a_plugin() {
    let workspace = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workspace");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let _ = fs::remove_dir_all(&workspace);
    for dir in ["src", "plugins/metric/src/testing"] {
        fs::create_dir_all(workspace.join(dir)).unwrap();
    }
    let mut manifest: toml::Table =
        fs::read_to_string(here.join("Cargo.toml")).unwrap().parse().unwrap();
    manifest.retain(|section, _| ["workspace", "package"].contains(&section));
    fs::write(workspace.join("Cargo.toml"), manifest.to_string()).unwrap();
    let library = "//! A stand-in.\n\n/// Its command line.\npub mod cli {\n    /// Does nothing.\n    \
                   pub fn main() -> std::process::ExitCode {\n        \
                   std::process::ExitCode::SUCCESS\n    }\n}\n";
    fs::write(workspace.join("src/lib.rs"), library).unwrap();
    for file in ["Cargo.lock", "LICENSE", "README.md", "rustfmt.toml", "plugins/metric/Cargo.toml"]
    {
        fs::copy(here.join(file), workspace.join(file)).unwrap();
    }
    for dir in ["plugins/metric/src", "plugins/metric/src/testing"] {
        for entry in fs::read_dir(here.join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, workspace.join(dir).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    let mut command = util::command(Path::new(env!("CARGO_BIN_EXE_barber")));
    let written = output(command.args(["new-metric", "column-norm"]).current_dir(&workspace));
    assert_eq!(written.status, 0, "{}", written.stderr);
    assert!(written.stdout.contains("plugins/column-norm"), "{}", written.stdout);
    assert!(!workspace.join("plugins/column-norm/Cargo.lock").exists());
    let plugin = ["-p", "barber-column-norm"];
    cargo(&workspace, &[&["test", "--features", "barber"][..], &plugin].concat());
    cargo(&workspace, &[&["fmt", "--check"][..], &plugin].concat());
}

#[test]
fn nothing_is_overwritten_and_what_is_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new");
    let path = path.to_str().unwrap();
    for (arguments, expected) in [
        (&["RowNorm"][..], "lower-case words"),
        (&["magnitude"], "a metric has this name already"),
        (&["row-norm", "--barber", "tests"], "is not Barber's source tree"),
    ] {
        let run = barber(&[&["new-metric"], arguments, &["--path", path]].concat());
        assert_eq!(run.status, 2);
        assert!(flat(&run.stderr).contains(expected), "{}", run.stderr);
        assert!(!Path::new(path).exists());
    }
    let new = ["new-metric", "row-norm", "--path", path];
    assert_eq!(barber(&new).status, 0);
    let code = Path::new(path).join("src/lib.rs");
    fs::write(&code, "// mine").unwrap();
    fs::write(Path::new(path).join("notes.txt"), "mine").unwrap();
    let again = barber(&new);
    assert_eq!(again.status, 2);
    assert!(flat(&again.stderr).contains("--force"), "{}", again.stderr);
    assert_eq!(fs::read_to_string(&code).unwrap(), "// mine");
    assert_eq!(barber(&[&new[..], &["--force"]].concat()).status, 0);
    assert!(fs::read_to_string(&code).unwrap().contains("pub struct RowNorm"));
    assert!(Path::new(path).join("notes.txt").exists());
}
