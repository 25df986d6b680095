//! A run on several ranks that `mpirun` starts: one output, the bytes of one process, and what becomes
//! of it if a rank dies.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(unix)]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use llm_barber::random::SplitMix64;
use util::{Run, command, flat, output};

const RECIPE: &str = "recipes/quickstart.toml";

/// A run of the quickstart on the samples of several runs.
fn arguments(out: &Path, more: &[&str]) -> Vec<String> {
    let mut all = vec!["prune".to_owned(), RECIPE.into()];
    let out = format!("output.path={}", out.display());
    let stages =
        "refine=[{ use = 'swap' }, { use = 'rebuild' }, { use = 'end-to-end', steps = 4 }]";
    for set in ["calibration.samples=72", "evaluate.segments=40", "mask.init=wanda", stages, &out] {
        all.extend(["--set".into(), set.into()]);
    }
    all.extend(more.iter().map(|&more| more.into()));
    all
}

/// A command on some ranks; without `mpirun` on one.
fn on_ranks(count: usize, arguments: &[String]) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_barber"));
    let mut command = match count {
        1 => command(program),
        _ => {
            let mut command = command(Path::new("mpirun"));
            command.args(["--allow-run-as-root", "--oversubscribe", "-n", &count.to_string()]);
            command.arg(program);
            command
        }
    };
    command.env("RAYON_NUM_THREADS", "1").args(arguments);
    command
}

fn run(count: usize, out: &Path, more: &[&str]) -> Run {
    output(&mut on_ranks(count, &arguments(out, more)))
}

/// The files of a result, except the reports, which have times.
fn contents(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    let files = files.map(|path| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
    });
    files.filter(|(name, _)| !name.starts_with("barber-")).collect()
}

/// The ids of the processes whose parent has this one.
fn children(parent: u32) -> Vec<u32> {
    let status = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        let status = fs::read_to_string(path.join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        let is_child = line.trim().parse() == Ok(parent);
        is_child.then(|| path.file_name()?.to_str()?.parse().ok())?
    };
    let mut found: Vec<u32> = fs::read_dir("/proc").unwrap().filter_map(status).collect();
    found.sort_unstable();
    found
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn two_ranks_give_the_bytes_of_one_process_and_speak_once() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    let alone = run(1, &one, &[]);
    let both = run(2, &two, &[]);
    assert_eq!((alone.status, both.status), (0, 0), "{}{}", alone.stderr, both.stderr);
    assert!(contents(&one) == contents(&two));
    let lines = |run: &Run| run.stdout.lines().filter(|l| l.starts_with("perplexity")).count();
    assert_eq!(lines(&both), lines(&alone), "{}", both.stdout);
    assert!(!dir.path().join("two.partial").exists());
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn an_error_of_one_rank_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // The second rank has a recipe of its own.
    let (own, others) = (arguments(&out, &[]), arguments(&out, &["--set", "sparsity.ratio=0.6"]));
    let program = env!("CARGO_BIN_EXE_barber");
    let mut command = command(Path::new("mpirun"));
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", "1", program]).args(own);
    command.args([":", "-n", "1", program]).args(others);
    let run = output(&mut command);
    assert_eq!(run.status, 2, "{}", run.stderr);
    let said = flat(&run.stderr);
    let expected =
        "rank 1: it does not do the same run as rank 0: its recipe's `sparsity.ratio` is 0.6";
    assert!(said.contains(expected), "{said}");
    assert!(!out.exists() && !out.with_extension("partial").exists());
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn a_run_whose_rank_dies_goes_on_under_another_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    assert_eq!(run(1, &whole, &[]).status, 0);
    let partial: PathBuf = dir.path().join("out.partial");
    let mut random = SplitMix64::new(5);
    let mut killed = 0;
    for (victim, resumed) in [(0, 1), (1, 3), (1, 1), (0, 3)] {
        let mut command = on_ranks(2, &arguments(&out, &["--save-every", "0"]));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let saved = || {
            let names = fs::read_dir(&partial).into_iter().flatten().flatten();
            names
                .map(|entry| entry.path())
                .any(|path| path.extension().is_some_and(|e| e == "state"))
        };
        while !saved() && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(random.below(400) as u64));
        if let Some(rank) = children(child.id()).get(victim) {
            killed += 1;
            Command::new("kill").args(["-9", &rank.to_string()]).status().unwrap();
        }
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        if !ended.status.success() {
            assert!(said.contains(&format!("rank {victim}")), "{said}");
            assert!(!out.exists() && partial.exists(), "{said}");
            let again = run(resumed, &out, &["--resume"]);
            assert_eq!(again.status, 0, "{}", again.stderr);
        }
        assert!(contents(&out) == contents(&whole));
        assert!(!partial.exists());
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(killed > 0);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_program_without_mpi_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut command = on_ranks(1, &arguments(&out, &[]));
    let run = output(command.env("OMPI_COMM_WORLD_SIZE", "2"));
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("was built without MPI"), "{}", run.stderr);
    assert!(!out.exists());
}
