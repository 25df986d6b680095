//! A run that is cut off goes on, and its result is that of one that was not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(unix)]

mod util;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use llm_barber::random::SplitMix64;
use serde_json::Value;
use util::{Run, command, flat, output, recipe};

/// The quickstart with a directory of its own for the output.
const QUICKSTART: &str = "recipes/quickstart.toml";

/// The contents of each file of a result; of the report, what does not depend on the time.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut bytes = fs::read(&path).unwrap();
        if name == "barber-report.json" {
            let mut report: Value = serde_json::from_slice(&bytes).unwrap();
            let fields = report.as_object_mut().unwrap();
            fields.retain(|key, _| !matches!(&**key, "seconds" | "product_seconds" | "memory"));
            bytes = report.to_string().into_bytes();
        }
        (name, bytes)
    };
    let mut files: BTreeMap<_, _> = fs::read_dir(dir).unwrap().map(read).collect();
    // The page shows the times.
    files.remove("barber-report.html");
    files
}

/// Names in a directory.
fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// A recipe's runs to one output, each of whose results is compared with the first one's.
struct Job {
    dir: tempfile::TempDir,
    arguments: Vec<String>,
    expected: BTreeMap<String, Vec<u8>>,
    took: Duration,
}

impl Job {
    fn new(recipe: &str, sets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut arguments = vec!["prune".to_owned(), recipe.to_owned()];
        for set in sets {
            arguments.extend(["--set".to_owned(), (*set).to_owned()]);
        }
        arguments
            .extend(["--set".into(), format!("output.path={}", dir.path().join("out").display())]);
        let mut job = Self { dir, arguments, expected: BTreeMap::new(), took: Duration::ZERO };
        let started = Instant::now();
        job.succeeds(&["--save-every", "0"]);
        job.took = started.elapsed();
        job.expected = contents(&job.out());
        fs::remove_dir_all(job.out()).unwrap();
        job
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn partial(&self) -> PathBuf {
        self.dir.path().join("out.partial")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
        command.args(&self.arguments).args(more);
        command
    }

    fn run(&self, more: &[&str]) -> Run {
        output(&mut self.command(more))
    }

    fn succeeds(&self, more: &[&str]) -> Run {
        let run = self.run(more);
        assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
        assert!(!self.partial().exists());
        run
    }

    fn fails(&self, more: &[&str]) -> String {
        let run = self.run(more);
        assert_eq!(run.status, 1, "{}{}", run.stdout, run.stderr);
        flat(&run.stderr)
    }

    /// Whether the result is the expected one; it goes.
    fn is_right(&self) {
        let found = contents(&self.out());
        assert!(found.keys().eq(self.expected.keys()), "{:?}", found.keys());
        for (name, bytes) in found {
            assert!(bytes == self.expected[&name], "{name}");
        }
        fs::remove_dir_all(self.out()).unwrap();
    }

    fn start(&self, more: &[&str], threads: &str) -> Child {
        let mut command = self.command(more);
        command.env("RAYON_NUM_THREADS", threads);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until there is a save; returns whether there is.
    fn wait_for_a_save(&self, child: &mut Child) -> bool {
        while child.try_wait().unwrap().is_none() {
            let saved = |name: &String| name.ends_with(".state");
            if self.partial().is_dir() && names(&self.partial()).iter().any(saved) {
                return true;
            }
            sleep(Duration::from_millis(1));
        }
        false
    }

    /// A run whose output is too large for a disk that still takes its state.
    fn runs_out_of_space(&self, limit: usize, more: &[&str]) -> Run {
        let program = env!("CARGO_BIN_EXE_barber");
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\"");
        let mut command = command(Path::new("bash"));
        output(command.args(["-c", &script, program]).args(&self.arguments).args(more))
    }
}

/// Kills a run at random points, and the one that resumes it at another one every other time.
fn survives_kills(job: &Job, kills: usize, seed: u64) {
    let mut random = SplitMix64::new(seed);
    let (mut unfinished, mut resumed) = (0, 0);
    for i in 0..kills {
        for (round, flags) in [&["--save-every", "0"][..], &["--save-every", "0", "--resume"]]
            .into_iter()
            .enumerate()
            .take(1 + i % 2)
        {
            // Nor do threads matter, which are others each time.
            let mut child = job.start(flags, &(1 + (i + round) % 3).to_string());
            let longest = job.took.as_micros() as usize * 11 / 10;
            sleep(Duration::from_micros(random.below(longest >> round) as u64));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // Whatever is there under its name is whole.
        if job.out().exists() {
            assert!(contents(&job.out()) == job.expected, "kill {i}");
        } else {
            unfinished += 1;
        }
        let saved = |name: &String| name.ends_with(".state");
        resumed += usize::from(job.partial().is_dir() && names(&job.partial()).iter().any(saved));
        if job.out().exists() && !job.partial().exists() {
            // It was done before it could be killed.
            job.is_right();
            continue;
        }
        job.succeeds(&["--resume"]);
        job.is_right();
    }
    eprintln!(
        "{kills} of {kills} as they should be; {unfinished} unfinished, {resumed} with a state"
    );
}

#[test]
fn a_killed_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    // Two passes, a stream and a mask each; and one pass with changed weights and both streams.
    let two = Job::new(&recipe(dir.path(), ""), &["mask.init=wanda"]);
    survives_kills(&two, 5, 1);
    let one = [
        "mask.init=sparsegpt",
        "mask.passes=1",
        "streams.blend=0.3",
        "calibration.held_out=2",
        "executor.stream_dtype=bf16",
        "refine=[{ use = 'swap' }, { use = 'reconstruct' }]",
    ];
    survives_kills(&Job::new(&recipe(dir.path(), ""), &one), 5, 2);
    let whole = ["mask.init=wanda", "refine=[{ use = 'swap' }, { use = 'end-to-end', steps = 9 }]"];
    survives_kills(&Job::new(&recipe(dir.path(), ""), &whole), 5, 3);
    let permuted = [
        "mask.init=wanda",
        "sparsity.pattern=2:4",
        "sparsity.permute=true",
        "calibration.held_out=2",
        "refine=[{ use = 'swap' }]",
    ];
    survives_kills(&Job::new(&recipe(dir.path(), ""), &permuted), 5, 4);
}

/// `BARBER_KILLS=200 cargo test --release --test resume -- --ignored --nocapture`
#[test]
#[ignore = "takes minutes"]
fn the_quickstart_survives_many_kills() {
    let kills = std::env::var("BARBER_KILLS").map_or(20, |kills| kills.parse().unwrap());
    survives_kills(&Job::new(QUICKSTART, &[]), kills, 3);
}

/// What is saved after end-to-end swaps has the masks of all layers.
#[test]
fn end_to_end_swaps_are_saved_whole() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["mask.init=wanda", "refine=[{ use = 'end-to-end', steps = 9, lambda = 1 }]"];
    let job = Job::new(&recipe(dir.path(), ""), &sets);
    let run = job.runs_out_of_space(100, &["--save-every", "0"]);
    assert_eq!(run.status, 1, "{}", run.stderr);
    job.succeeds(&["--resume"]);
    job.is_right();
}

/// A run that is killed between two steps goes on with the next one, whatever the threads.
#[test]
fn a_run_goes_on_within_end_to_end_swaps() {
    goes_on_within("{ use = 'end-to-end', steps = 60, lambda = 1 }");
}

#[test]
fn a_run_goes_on_within_a_distillation() {
    goes_on_within(
        "{ use = 'end-to-end', steps = 4, lambda = 1 }, { use = 'distill', step_size = 1e-4 }",
    );
}

fn goes_on_within(stages: &str) {
    let dir = tempfile::tempdir().unwrap();
    let stages = format!("refine=[{stages}]");
    let sets = ["mask.init=wanda", &stages];
    let job = Job::new(&recipe(dir.path(), ""), &sets);
    let mut child = job.start(&["--save-every", "0"], "1");
    let steps = |name: &String| {
        let state = fs::read(job.partial().join(name)).unwrap_or_default();
        name.ends_with(".state") && String::from_utf8_lossy(&state).contains("end to end, step 1")
    };
    while !(job.partial().is_dir() && names(&job.partial()).iter().any(steps)) {
        assert!(child.try_wait().unwrap().is_none(), "nothing was saved within the stage");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let run = job.succeeds(&["--resume"]);
    assert!(run.stdout.contains("resumed   end to end, step 1"), "{}", run.stdout);
    job.is_right();
}

#[test]
fn a_full_disk_leaves_a_state_that_only_the_same_run_goes_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.json");
    fs::copy("tests/conformance/calibration.json", &text).unwrap();
    let model = util::tiny(dir.path(), |_, _| ());
    let source = format!("calibration.source={}", text.display());
    let job = Job::new(&recipe(dir.path(), ""), &[&model, &source]);

    let run = job.runs_out_of_space(100, &[]);
    let message = flat(&run.stderr);
    assert_eq!(run.status, 1, "{message}");
    let partial = job.partial().display().to_string();
    for expected in ["model.safetensors: File too large", "--resume", "2 of 2 layers", &partial] {
        assert!(message.contains(expected), "{message}");
    }
    assert!(!job.out().exists());

    let message = job.fails(&[]);
    assert!(message.contains(&partial) && message.contains("pass --resume"), "{message}");
    let message = job.fails(&["--resume", "--set", "sparsity.ratio=0.6"]);
    assert!(message.contains("the recipe's `sparsity.ratio` was 0.5 and is now 0.6"), "{message}");
    let samples = fs::read(&text).unwrap();
    fs::write(&text, [&samples[..], b"\n"].concat()).unwrap();
    let message = job.fails(&["--resume"]);
    assert!(message.contains("text.json has changed"), "{message}");
    fs::write(&text, samples).unwrap();
    let weights = dir.path().join("model/model.safetensors");
    let dense = fs::read(&weights).unwrap();
    let mut changed = dense.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&weights, changed).unwrap();
    let message = job.fails(&["--resume"]);
    assert!(message.contains("model.safetensors has changed"), "{message}");
    assert!(!message.contains("text.json"), "{message}");
    fs::write(&weights, dense).unwrap();

    // What the run may take is no part of the result.
    job.succeeds(&["--resume", "--set", "executor.memory=2 GiB"]);
    let weights = "model.safetensors";
    assert_eq!(contents(&job.out())[weights], job.expected[weights]);
    fs::remove_dir_all(job.out()).unwrap();

    job.runs_out_of_space(100, &[]);
    job.succeeds(&["--force"]);
    job.is_right();
    // Where there is nothing to go on from, a run begins.
    job.succeeds(&["--resume"]);
    job.is_right();
}

#[test]
fn a_signal_ends_a_run_that_can_be_resumed() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let job = Job::new(QUICKSTART, &["evaluate.segments=1"]);
        let mut child = job.start(&["--save-every", "0"], "1");
        assert!(job.wait_for_a_save(&mut child));
        let pid = child.id().to_string();
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success()
        );
        let found = child.wait_with_output().unwrap();
        let message = flat(&String::from_utf8(found.stderr).unwrap());
        assert_eq!(found.status.code(), Some(status), "{message}");
        assert!(message.contains(&format!("SIG{signal}: stopped")), "{message}");
        assert!(message.contains("--resume"), "{message}");
        job.succeeds(&["--resume"]);
        job.is_right();
    }
}

#[test]
fn one_run_at_a_time_writes_to_an_output() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(&recipe(dir.path(), ""), &[]);
    fs::create_dir(job.partial()).unwrap();
    let lock = File::create(job.partial().join("lock")).unwrap();
    lock.lock().unwrap();
    fs::write(job.partial().join("lock"), "123").unwrap();
    let message = job.fails(&["--force"]);
    assert!(message.contains("another run, process 123, writes to"), "{message}");
    assert!(job.partial().is_dir());
    // The lock goes with the process that has it.
    drop(lock);
    job.succeeds(&[]);
    job.is_right();
}

#[test]
fn a_run_that_was_cut_off_at_its_very_end_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(&recipe(dir.path(), ""), &[]);
    job.succeeds(&[]);
    // It had its name, and the rest had not gone yet.
    fs::create_dir(job.partial()).unwrap();
    fs::write(job.partial().join("lock"), "123").unwrap();
    fs::write(job.partial().join("finished"), "").unwrap();
    fs::write(job.partial().join("000000.kept"), "").unwrap();
    job.succeeds(&["--resume"]);
    // It was about to replace another one.
    let right = job.dir.path().join("right");
    fs::rename(job.out(), &right).unwrap();
    job.succeeds(&["--set", "sparsity.ratio=0.25"]);
    let old = contents(&job.out());
    fs::create_dir(job.partial()).unwrap();
    fs::write(job.partial().join("lock"), "123").unwrap();
    fs::write(job.partial().join("finished"), "").unwrap();
    fs::rename(right, job.partial().join("checkpoint")).unwrap();
    fs::rename(job.out(), job.partial().join("replaced")).unwrap();
    let message = job.fails(&["--resume"]);
    assert!(message.contains("exists; pass --force"), "{message}");
    assert!(contents(&job.out()) == old);
    let message = job.fails(&["--force", "--set", "model.path=nowhere"]);
    assert!(message.contains("nowhere"), "{message}");
    job.succeeds(&["--resume", "--force"]);
    job.is_right();
}

#[test]
fn what_a_run_reads_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(&recipe(dir.path(), ""), &[]);
    job.succeeds(&[]);
    let text = job.out().join("text.json");
    fs::copy("tests/conformance/calibration.json", &text).unwrap();
    let link = dir.path().join("link.json");
    std::os::unix::fs::symlink(&text, &link).unwrap();
    for source in [&text, &link] {
        let set = format!("calibration.source={}", source.display());
        let message = job.fails(&["--force", "--set", &set]);
        assert!(message.contains("holds") && message.contains("which the run reads"), "{message}");
    }
    // A shard that is a link into the output.
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    std::os::unix::fs::symlink(
        job.out().join("model.safetensors"),
        model.join("model.safetensors"),
    )
    .unwrap();
    fs::copy(Path::new(util::TINY).join("config.json"), model.join("config.json")).unwrap();
    let set = format!("model.path={}", model.display());
    let message = job.fails(&["--force", "--set", &set]);
    // Links out of a checkpoint are refused, whatever they lead to.
    assert!(message.contains(", outside the checkpoint"), "{message}");
    assert!(text.is_file());
}
