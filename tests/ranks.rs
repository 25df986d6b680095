//! A run on several ranks that `mpirun` starts: one output, the bytes of one process, and what becomes
//! of it if a rank dies.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(unix)]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    mem::take,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use llm_barber::random::SplitMix64;
use serde_json::Value;
use util::{Run, command, flat, output};

const RECIPE: &str = "recipes/quickstart.toml";

/// A run of the quickstart on the samples of several runs.
fn arguments(out: &Path, more: &[&str]) -> Vec<String> {
    let mut all = vec!["prune".to_owned(), RECIPE.into()];
    let out = format!("output.path={}", out.display());
    let stages = "refine=[{ use = 'swap' }, { use = 'end-to-end', steps = 4 }, { use = 'distill', steps = 3 }]";
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

/// A sweep of four short runs of the quickstart.
fn sweep(out: &Path, more: &[&str]) -> Vec<String> {
    let out = format!("output.path={}", out.display());
    let sets = ["sweep.sparsity.ratio=[0.5, 0.6]", "sweep.refine.0.alpha=[0.1, 0.2]", &out];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    ["prune", RECIPE].into_iter().chain(sets).chain(more.iter().copied()).map(Into::into).collect()
}

/// A study of four short runs of the quickstart, and some more arguments.
fn study(dir: &Path, more: &[&str]) -> Vec<String> {
    let recipe = std::env::current_dir().unwrap().join(RECIPE);
    let path = dir.join("study.toml");
    let text = "
        seeds = [0, 1]
        set = ['calibration.selection=random', 'calibration.samples=24', 'evaluate.segments=8']
        [[case]]
        name = '50%'
        [[method]]
        name = 'Wanda'
        set = ['mask.init=wanda', 'refine=[]']
        [[method]]
        name = 'rebuilt'
        set = ['mask.init=wanda']";
    fs::write(&path, format!("recipe = '{}'{text}", recipe.display())).unwrap();
    let path = path.display().to_string();
    ["study", &path].iter().chain(more).map(|&word| word.into()).collect()
}

/// The runs that a study printed as JSON, but for their times.
fn runs(printed: &str) -> Vec<Value> {
    let mut found: Value = serde_json::from_str(printed).unwrap();
    let runs = found["runs"].as_array_mut().unwrap();
    runs.iter_mut().for_each(|run| drop(run.as_object_mut().unwrap().remove("seconds")));
    take(runs)
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
fn ranks_take_whole_runs_of_a_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let [one, three] = ["one", "three"].map(|name| dir.path().join(name));
    // One process has all runs.
    let alone = output(&mut on_ranks(1, &sweep(&one, &["--split", "runs"])));
    let all = output(&mut on_ranks(3, &sweep(&three, &["--split", "runs"])));
    assert_eq!((alone.status, all.status), (0, 0), "{}{}", alone.stderr, all.stderr);
    let names = ["ratio=0.5,alpha=0.1", "ratio=0.5,alpha=0.2", "ratio=0.6,alpha=0.1"];
    for name in names.into_iter().chain(["ratio=0.6,alpha=0.2"]) {
        assert!(contents(&one.join(name)) == contents(&three.join(name)), "{name}");
    }
    assert_eq!(fs::read_dir(&three).unwrap().count(), 5);
    assert!(three.join("barber-sweep.html").exists());
    // The first rank has one of the four runs, and compares all.
    let count =
        |run: &Run, start: &str| run.stdout.lines().filter(|l| l.starts_with(start)).count();
    assert_eq!((count(&alone, "run "), count(&all, "run ")), (4, 1), "{}", all.stdout);
    assert_eq!(count(&all, "compared"), 1);
    // Under another number of ranks all is done.
    let figures = |count: usize, out: &Path| {
        let run = output(&mut on_ranks(count, &sweep(out, &["--split", "runs", "--json"])));
        assert_eq!(run.status, 0, "{}", run.stderr);
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        let runs = found["runs"].as_array().unwrap();
        let figures =
            runs.iter().map(|run| (run["name"].clone(), run["report"]["perplexity"].clone()));
        figures.collect::<Vec<_>>()
    };
    let found = figures(2, &three);
    assert!(found.len() == 4 && found == figures(1, &one), "{found:?}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn ranks_take_whole_runs_of_a_study() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("runs.jsonl");
    let of = |more: &[&str]| study(dir.path(), more);
    let alone = output(&mut on_ranks(1, &of(&["--json"])));
    let three = output(&mut on_ranks(3, &of(&["--json", "--split", "runs"])));
    assert_eq!((alone.status, three.status), (0, 0), "{}{}", alone.stderr, three.stderr);
    assert_eq!(runs(&alone.stdout).len(), 4);
    assert_eq!(runs(&alone.stdout), runs(&three.stdout));

    // A job that is killed goes on under another number of ranks.
    let name = file.to_str().unwrap();
    let arguments = of(&["--json", "--split", "runs", "--output", name]);
    let part = file.with_extension("jsonl.rank-1");
    let lines = |path: &Path| fs::read_to_string(path).map_or(0, |text| text.lines().count());
    let mut command = on_ranks(2, &arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while lines(&part) == 0 && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(1));
    }
    if let Some(rank) = children(child.id()).first() {
        Command::new("kill").args(["-9", &rank.to_string()]).status().unwrap();
    }
    let ended = child.wait().unwrap();
    assert_eq!(ended.success(), !part.exists());
    let done = lines(&file) + lines(&part);
    assert!(done > 0);
    let kept = fs::read_to_string(&file).unwrap() + &fs::read_to_string(&part).unwrap_or_default();
    let rest = output(&mut on_ranks(3, &arguments));
    assert_eq!(rest.status, 0, "{}", rest.stderr);
    let now = fs::read_to_string(&file).unwrap();
    assert!(kept.lines().all(|line| now.contains(line)), "{kept}{now}");
    assert_eq!((lines(&file), fs::read_dir(dir.path()).unwrap().count()), (4, 2));
    let last = output(&mut on_ranks(1, &of(&["--json", "--output", name])));
    assert_eq!(last.stdout, rest.stdout);
    let figures = |runs: Vec<Value>| -> Vec<Value> {
        runs.into_iter().map(|run| run["perplexity"].clone()).collect()
    };
    assert_eq!(figures(runs(&rest.stdout)), figures(runs(&alone.stdout)));
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn runs_are_split_only_if_there_are_several_and_they_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let ends = |count: usize, arguments: &[String], status: i32, expected: &str| {
        let run = output(&mut on_ranks(count, arguments));
        assert_eq!(run.status, status, "{}", run.stderr);
        let said = flat(&run.stderr);
        assert_eq!(said.matches(expected).count(), 1, "{said}");
        assert!(run.stdout.is_empty(), "{}", run.stdout);
    };
    for arguments in [sweep(&out, &[]), study(dir.path(), &[])] {
        ends(2, &arguments, 2, "give each whole runs with --split runs");
    }
    for count in [1, 2] {
        ends(count, &arguments(&out, &["--split", "runs"]), 2, "the recipe has no [sweep]");
    }
    // All errors of runs come before the first begins, and name the run.
    let few = ["--split", "runs", "--set", "sweep.calibration.samples=[8, 100000]"];
    ends(2, &sweep(&out, &few), 1, "ratio=0.5,alpha=0.1,samples=100000 ▶ ");
    assert!(!out.exists());
}

/// An error that only the run itself can find.
#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn a_run_that_fails_ends_the_job_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let of = |count: usize, rates: &str| {
        let stage = "refine=[{ use = 'reconstruct', method = 'gradient', passes = 1 }]";
        let rates = format!("sweep.refine.0.rate={rates}");
        let path = format!("output.path={}", out.display());
        let sets = [stage, &rates, &path].into_iter().flat_map(|set| ["--set", set]);
        let words = ["prune", RECIPE, "--split", "runs"].into_iter().chain(sets);
        output(&mut on_ranks(count, &words.map(String::from).collect::<Vec<_>>()))
    };
    let failed = of(2, "[0.002, 1e30]");
    let said = flat(&failed.stderr);
    assert_eq!(failed.status, 1, "{said}");
    assert!(
        said.contains("rank 1") && said.contains("rate=1000000000000000000000000000000"),
        "{said}"
    );
    assert!(said.contains("layer 0, self-attention: "), "{said}");
    let left = fs::read_dir(&out).into_iter().flatten().flatten().map(|entry| entry.file_name());
    assert!(left.into_iter().all(|name| name.to_string_lossy().starts_with("rate=0.002")));
    // What the other rank did is not lost, or done again.
    let again = of(2, "[0.002, 0.004]");
    assert_eq!(again.status, 0, "{}", again.stderr);
    assert!(out.join("rate=0.002").exists() && out.join("rate=0.004").exists());
}

/// What `barber plan` says of a rank's operations is what the first one counts.
#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "needs the feature mpi, and mpirun")]
fn ranks_compute_what_is_planned() {
    let dir = tempfile::tempdir().unwrap();
    let json = |run: Run| -> Value {
        assert_eq!(run.status, 0, "{}", run.stderr);
        serde_json::from_str(&run.stdout).unwrap()
    };
    let mut plan = arguments(&dir.path().join("out"), &["--json", "--ranks", "2,3"]);
    plan[0] = "plan".into();
    let planned = json(output(&mut on_ranks(1, &plan)));
    for (i, count) in [2, 3].into_iter().enumerate() {
        let report = json(run(count, &dir.path().join(count.to_string()), &["--json"]));
        let took = report["operations"].as_f64().unwrap();
        let expected = planned["ranks"][i]["operations"]["passes"].as_f64().unwrap();
        assert!((expected / took - 1.0).abs() < 0.05, "{count} ranks: {expected:.4e} {took:.4e}");
    }
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
