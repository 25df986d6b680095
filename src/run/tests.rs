//! Each step of writing fails in turn, once or as on a disk that stays full; and the state of an
//! interrupted run is damaged.

use std::{cell::Cell, collections::BTreeMap, fs, path::Path, rc::Rc, time::Duration};

use proptest::{collection::vec, prelude::*};

use super::{Outlook, Rates, Settings, prune};
use crate::{
    checkpoint::digest_text,
    files::{
        Step,
        testing::{full, gated},
    },
    ranks::threads,
    recipe::{Loaded, load},
};

/// The files that a run wrote, except its report, which has times.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = files.map(|path| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
    });
    files.filter(|(name, _)| !name.starts_with("barber-report")).collect()
}

/// A recipe, with more assignments.
fn loaded(dir: &Path, sets: &[&str]) -> Loaded {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "model.path = '{}'\ncalibration = {{ source = '{}', samples = 1 }}\n\
         mask = {{ init = 'sparsegpt' }}\nrefine = [{{ use = 'rebuild', retain = true }}]\n\
         output.path = 'out'\n",
        here.join("tiny-llama").display(),
        here.join("calibration.json").display()
    );
    fs::write(&recipe, text).unwrap();
    load(&recipe, &sets.iter().map(|&set| set.into()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn whatever_step_fails_nothing_is_half_done_and_the_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (loaded, out, partial) =
        (loaded(dir.path(), &[]), dir.path().join("out"), dir.path().join("out.partial"));
    let every = Some(Duration::ZERO);
    let settings = Settings { save_every: every, ..Settings::default() };
    let steps = Rc::new(Cell::new(0));
    let counted = steps.clone();
    let count = move |_: Step<'_>| {
        counted.set(counted.get() + 1);
        Ok(())
    };
    gated(count, || prune(&loaded, &settings)).unwrap();
    let expected = contents(&out);
    assert!(steps.get() > 80, "{}", steps.get());
    // With and without a result to replace.
    for failing in 0..steps.get() {
        let (lasting, replaces) = (failing % 2 == 0, failing % 3 == 0);
        let settings = Settings { force: replaces, ..settings };
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        if replaces {
            fs::create_dir_all(&out).unwrap();
            fs::write(out.join("config.json"), "{}").unwrap();
            let outputs = serde_json::json!({ "config.json": digest_text("{}") });
            let report = serde_json::json!({ "outputs": outputs }).to_string();
            fs::write(out.join("barber-report.json"), report).unwrap();
        }
        let mut step = 0;
        let gate = move |_: Step<'_>| {
            step += 1;
            let fails = if lasting { step > failing } else { step == failing + 1 };
            if fails { Err(full()) } else { Ok(()) }
        };
        let found = gated(gate, || prune(&loaded, &settings));
        if let Err(error) = found {
            assert!(!error.is_usage(), "step {failing}: {error}");
            assert!(error.to_string().contains("out"), "step {failing}: {error}");
        }
        // The output's name has the complete checkpoint, the old one, or nothing.
        if out.is_dir() {
            let found = contents(&out);
            let old = replaces && found.keys().eq(["config.json"]) && found["config.json"] == b"{}";
            assert!(old || found == expected, "step {failing}");
        }
        // The step may have failed after the rename to the output's name.
        if out.is_dir() && contents(&out) == expected && !partial.exists() {
            continue;
        }
        let again = prune(&loaded, &Settings { resume: true, force: replaces, ..settings });
        again.unwrap_or_else(|error| panic!("step {failing}: {error}"));
        assert!(contents(&out) == expected, "step {failing}");
        assert!(!partial.exists(), "step {failing}");
    }
}

/// All files of a directory.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.is_file());
    files.map(|p| (p.file_name().unwrap().to_str().unwrap().into(), fs::read(p).unwrap())).collect()
}

/// Runs until the step for which `ends` is true, where the disk is full from then on.
fn cut_off(loaded: &Loaded, ends: impl Fn(Step<'_>) -> bool + 'static) {
    let mut over = false;
    let gate = move |step: Step<'_>| {
        over |= ends(step);
        if over { Err(full()) } else { Ok(()) }
    };
    let settings = Settings { save_every: Some(Duration::ZERO), ..Settings::default() };
    gated(gate, || prune(loaded, &settings)).unwrap_err();
}

/// The third save of the refinement's layers is cut off.
fn in_the_middle(step: Step<'_>) -> bool {
    matches!(step, Step::Rename(_, to) if to.ends_with("000004.kept"))
}

#[test]
fn no_file_of_a_journal_can_be_gone_or_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let (out, partial) = (dir.path().join("out"), dir.path().join("out.partial"));
    let run = loaded(dir.path(), &[]);
    prune(&run, &Settings::default()).unwrap();
    let expected = contents(&out);
    fs::remove_dir_all(&out).unwrap();
    let left = |loaded: &Loaded| {
        cut_off(loaded, in_the_middle);
        let left = files(&partial);
        fs::remove_dir_all(&partial).unwrap();
        left
    };
    let foreign = left(&loaded(dir.path(), &["sparsity.ratio=0.6"]));
    let left = left(&run);
    let names: Vec<&String> =
        left.keys().filter(|name| !["lock", "draft"].contains(&name.as_str())).collect();
    assert_eq!(names.len(), 5, "{names:?}");
    let settings = Settings { resume: true, ..Settings::default() };
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() };
    proptest!(config, |(
        gone in vec(any::<bool>(), 5), exchanged in vec(any::<bool>(), 5), order in Just((0..5_usize).collect::<Vec<_>>()).prop_shuffle(), shuffles in any::<bool>(),
    )| {
        for dir in [&out, &partial] {
            if dir.exists() {
                fs::remove_dir_all(dir).unwrap();
            }
        }
        fs::create_dir(&partial).unwrap();
        for (i, name) in names.iter().enumerate() {
            let from = if exchanged[i] { &foreign } else { &left };
            let source = if shuffles { names[order[i]] } else { name };
            if !gone[i] {
                fs::write(partial.join(name), &from[source]).unwrap();
            }
        }
        fs::write(partial.join("lock"), std::process::id().to_string()).unwrap();
        match prune(&run, &settings) {
            Ok(_) => prop_assert!(contents(&out) == expected),
            Err(error) => prop_assert!(error.to_string().contains("--force"), "{error}"),
        }
    });
}

#[test]
fn what_is_written_already_is_the_result_of_the_same_run_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (out, text) = (dir.path().join("out"), dir.path().join("text.json"));
    fs::copy("tests/conformance/calibration.json", &text).unwrap();
    let source = format!("calibration.source={}", text.display());
    let run = loaded(dir.path(), &[&source]);
    prune(&run, &Settings::default()).unwrap();
    let expected = contents(&out);
    fs::remove_dir_all(&out).unwrap();
    // All files are written, but the output is not renamed yet.
    cut_off(&run, |step| matches!(step, Step::Rename(from, _) if from.ends_with("checkpoint")));
    assert!(dir.path().join("out.partial/finished").is_file());
    let settings = Settings { resume: true, ..Settings::default() };
    let message = |loaded: &Loaded| prune(loaded, &settings).unwrap_err().to_string();
    let other = message(&loaded(dir.path(), &[&source, "sparsity.ratio=0.6"]));
    assert!(other.contains("the recipe's `sparsity.ratio` was 0.5 and is now 0.6"), "{other}");
    let samples = fs::read(&text).unwrap();
    fs::write(&text, [&samples[..], b"\n"].concat()).unwrap();
    let other = message(&run);
    assert!(other.contains("text.json has changed") && other.contains("--force"), "{other}");
    fs::write(&text, samples).unwrap();
    assert!(!out.exists());
    // The memory limit does not affect the result.
    prune(&loaded(dir.path(), &[&source, "executor.memory=2 GiB"]), &settings).unwrap();
    assert!(contents(&out) == expected);
    assert!(!dir.path().join("out.partial").exists());
}

/// The quickstart with more assignments, and with the samples of several runs.
fn quickstart(out: &Path, sets: &[&str]) -> Loaded {
    let own = ["calibration.samples=72", "evaluate.segments=40", "evaluate.generate=1"];
    let mut sets: Vec<String> = own.iter().chain(sets).map(|&set| set.into()).collect();
    sets.push(format!("output.path={}", out.display()));
    load(Path::new("recipes/quickstart.toml"), &sets).unwrap()
}

/// The files of a run and what it measured, or what each rank says.
type Ran = Result<(BTreeMap<String, Vec<u8>>, String), Vec<String>>;

/// A run on some ranks.
fn on_ranks(
    size: usize,
    out: &Path,
    resume: bool,
    sets: &(dyn Fn(usize) -> Vec<&'static str> + Sync),
) -> Ran {
    let found = threads::run(size, |ranks| {
        let settings = Settings { ranks: &ranks, resume, ..Settings::default() };
        let report = prune(&quickstart(out, &sets(ranks.rank())), &settings);
        let report = report.map_err(|error| error.to_string())?;
        let said = (report.perplexity, report.generations, report.groups, report.steps);
        Ok((format!("{said:?}"), ranks.sent()))
    });
    if found.iter().any(Result::is_err) {
        return Err(found.into_iter().filter_map(Result::err).collect());
    }
    let found: Vec<(String, u64)> = found.into_iter().flatten().collect();
    for (said, sent) in &found {
        assert!(said == &found[0].0 && (*sent > 0) == (size > 1));
    }
    let mut files = contents(out);
    // It names the output.
    files.remove("barber-recipe.toml");
    Ok((files, found[0].0.clone()))
}

#[test]
fn any_number_of_ranks_gives_the_bytes_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 4] = [
        // The paper's recipe.
        &["mask.init=wanda", "refine=[{ use = 'rebuild' }]"],
        // The preset `best`, with few steps.
        &[
            "mask.init=wanda",
            "streams.blend=0.3",
            "calibration.held_out=20",
            "refine=[{ use = 'swap' }, { use = 'end-to-end', steps = 5 }, { use = 'distill', steps = 3 }]",
        ],
        &[
            "mask.init=sparsegpt",
            "executor.stream_dtype=bf16",
            "refine=[{ use = 'rebuild', retain = true }, { use = 'reconstruct' }]",
        ],
        &[
            "mask.init=alps",
            "calibration.held_out=20",
            "sparsity.allocation=owl",
            "refine=[{ use = 'reconstruct', method = 'gradient', passes = 1 }]",
        ],
    ];
    for (case, sets) in cases.into_iter().enumerate() {
        let run = |size: usize| {
            let out = dir.path().join(format!("{case} of {size}"));
            on_ranks(size, &out, false, &|_| sets.to_vec()).unwrap()
        };
        let one = run(1);
        for size in 2..5 {
            assert!(run(size) == one, "{sets:?} on {size} ranks");
        }
    }
}

/// What `barber plan` says of traffic is what ranks send.
#[test]
fn ranks_send_what_is_planned() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let cases: [&[&str]; 6] = [
        &["mask.init=wanda", "refine=[{ use = 'rebuild' }]"],
        &["mask.init=wanda", "streams.blend=0.3", "refine=[{ use = 'swap', limit = 2 }]"],
        &["mask.init=sparsegpt", "calibration.held_out=20", "refine=[]"],
        &["refine=[{ use = 'reconstruct', method = 'gradient', passes = 1 }]"],
        &["mask.init=wanda", "refine=[{ use = 'end-to-end', steps = 6, lambda = 5 }]"],
        &["mask.init=alps", "refine=[{ use = 'reconstruct' }, { use = 'distill', steps = 6 }]"],
    ];
    for (sets, size) in cases.iter().flat_map(|sets| [2, 4].map(|size| (*sets, size))) {
        let sent = threads::run(size, |ranks| {
            let settings = Settings { ranks: &ranks, save_every: None, ..Settings::default() };
            prune(&quickstart(&out, sets), &settings).unwrap();
            ranks.sent() as f64
        });
        fs::remove_dir_all(&out).unwrap();
        let loaded = quickstart(&out, sets);
        let rates = Rates { device: 1.0, host: 1.0, link: 1.0, disk: 1.0 };
        let planned = Outlook::new(&loaded).unwrap().on(size, rates).unwrap().sent();
        // The first rank sends its recipe and digests to each of the others.
        let recipe = 6e3 * (size - 1) as f64;
        let near = |sent: f64, planned: f64| (sent - planned).abs() < 0.06 * sent + recipe;
        assert!(near(sent.iter().sum(), planned.all), "{sets:?}: {sent:?} {planned:?}");
        assert!(near(sent[0], planned.first), "{sets:?}: {sent:?} {planned:?}");
    }
}

#[test]
fn ranks_that_do_not_do_the_same_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let other = |rank: usize| vec![if rank == 2 { "sparsity.ratio=0.6" } else { "mask.passes=2" }];
    let said = on_ranks(3, &out, false, &other).unwrap_err();
    assert_eq!(said.len(), 3);
    for said in said {
        assert!(said.contains("the same run as rank 0"), "{said}");
        assert!(said.contains("its recipe's `sparsity.ratio` is 0.6, not 0.5"), "{said}");
    }
    assert!(!out.exists() && !out.with_extension("partial").exists());
    // The first rank finds what is wrong with the output.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("own"), "").unwrap();
    let said = on_ranks(2, &out, false, &|_| Vec::new()).unwrap_err();
    assert!(said[1].starts_with("rank 0: ") && said[1].contains("exists"), "{said:?}");
}

#[test]
fn a_run_goes_on_under_another_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "mask.init=wanda",
        "refine=[{ use = 'rebuild' }, { use = 'end-to-end', steps = 4 }, { use = 'distill', steps = 3 }]",
    ];
    let path = |name: &str| dir.path().join(name);
    let expected = on_ranks(1, &path("whole"), false, &|_| sets.to_vec()).unwrap();
    for (size, fails) in [(2, 60), (3, 95), (1, 130)] {
        let out = path(&format!("{size} ranks"));
        let mut step = 0;
        let gate = move |_: Step<'_>| {
            step += 1;
            if step > fails { Err(full()) } else { Ok(()) }
        };
        let settings = Settings { save_every: Some(Duration::ZERO), ..Settings::default() };
        let error = gated(gate, || prune(&quickstart(&out, &sets), &settings)).unwrap_err();
        assert!(error.to_string().contains("--resume"), "{error}");
        assert!(on_ranks(size, &out, true, &|_| sets.to_vec()).unwrap() == expected);
    }
}
