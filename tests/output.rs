//! What is written and replaced: only what a run wrote ever goes, nothing that is no regular file is
//! opened or replaced, and what can be known of an output is said before a run.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(unix)]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use llm_barber::checkpoint::{Existing, Output, Reader};
use util::{Run, barber, command, flat, output, recipe};

/// Puts something at a path.
type Make<'a> = dyn Fn(&Path) + 'a;

fn fifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, path, mode).unwrap();
}

/// Everything below a directory: the kind of each path, what a link says and what a file holds.
fn all(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        let holds = if kind.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            b"directory".to_vec()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else if kind.is_file() {
            fs::read(&path).unwrap()
        } else {
            format!("{kind:?}").into_bytes()
        };
        found.insert(path, holds);
    }
    found
}

/// A directory with a recipe whose output is `out` there.
struct Case {
    dir: tempfile::TempDir,
    recipe: String,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path(), "");
        Self { dir, recipe }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn prune(&self, more: &[&str]) -> Run {
        barber(&[&["prune", "-q", &self.recipe], more].concat())
    }

    #[track_caller]
    fn succeeds(&self, more: &[&str]) {
        let run = self.prune(more);
        assert_eq!(run.status, 0, "{}", run.stderr);
    }

    /// That a run is refused with these words, and has touched nothing.
    #[track_caller]
    fn refuses(&self, more: &[&str], words: &[&str]) {
        let before = all(self.dir.path());
        let run = self.prune(more);
        let said = flat(&run.stderr);
        assert_eq!(run.status, 1, "{}{said}", run.stdout);
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
        assert!(all(self.dir.path()) == before, "{said}");
    }
}

#[test]
fn force_replaces_only_what_a_run_wrote() {
    let case = Case::new();
    let out = case.path("out");
    case.succeeds(&[]);
    case.refuses(&[], &["out exists; pass --force"]);
    let foreign: [(&str, &str, &Make<'_>); 6] = [
        ("notes.txt", "holds notes.txt, which no run wrote", &|path| fs::write(path, "").unwrap()),
        (".git", "holds .git/, which no run wrote", &|path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("HEAD"), "main").unwrap();
        }),
        ("empty", "holds empty/,", &|path| fs::create_dir(path).unwrap()),
        ("link", "holds link,", &|path| symlink("config.json", path).unwrap()),
        ("gone", "holds gone,", &|path| symlink("nowhere", path).unwrap()),
        ("fifo", "holds fifo,", &fifo),
    ];
    for (name, words, make) in foreign {
        make(&out.join(name));
        case.refuses(&["--force"], &[words, "move it elsewhere, or choose another output.path"]);
        // Nor is it taken along where a run is resumed.
        case.refuses(&["--force", "--resume"], &[words]);
        let path = out.join(name);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
    for name in ["a", "b", "c", "d", "e"] {
        fs::write(out.join(name), "").unwrap();
    }
    case.refuses(&["--force"], &["holds a, b, c and 2 more, which no run wrote"]);
    ["a", "b", "c", "d", "e"].iter().for_each(|name| fs::remove_file(out.join(name)).unwrap());

    // A file of the run that is another one now: edited, or a link.
    let config = out.join("config.json");
    let written = fs::read(&config).unwrap();
    fs::write(&config, [&written[..], b"\n"].concat()).unwrap();
    case.refuses(&["--force"], &["config.json changed since the run wrote it"]);
    fs::rename(&config, case.path("config.json")).unwrap();
    symlink("../config.json", &config).unwrap();
    case.refuses(&["--force"], &["holds config.json,"]);
    fs::remove_file(&config).unwrap();
    // One that is gone is in nobody's way.
    case.succeeds(&["--force"]);
    assert_eq!(fs::read(&config).unwrap(), written);
    case.succeeds(&["--force"]);
    assert_eq!(fs::read_dir(case.dir.path()).unwrap().count(), 3);
}

#[test]
fn a_directory_that_no_run_wrote_stays() {
    let case = Case::new();
    let out = case.path("out");
    // A project that has a config.json; a checkpoint of other tools.
    fs::create_dir_all(out.join("src")).unwrap();
    fs::write(out.join("config.json"), "{\"port\": 1}").unwrap();
    fs::write(out.join("src/main.py"), "code").unwrap();
    case.refuses(&["--force"], &["out is not a checkpoint that a run wrote"]);
    fs::remove_dir_all(&out).unwrap();
    fs::create_dir(&out).unwrap();
    fs::copy(Path::new(util::TINY).join("config.json"), out.join("config.json")).unwrap();
    case.refuses(&["--force"], &["out is not a checkpoint that a run wrote"]);
    // A report that does not say what the run wrote, or is none.
    for report in ["{}", "{\"outputs\": {}}", "[]", "", "{\"outputs\": {\"config.json\": \"\"}}"] {
        fs::write(out.join("barber-report.json"), report).unwrap();
        case.refuses(&["--force"], &["out"]);
    }
    fs::remove_dir_all(&out).unwrap();
    fs::create_dir(&out).unwrap();
    case.refuses(&[], &["out exists"]);
    case.succeeds(&["--force"]);
    // The directory of the recipe, and of one that it is built on.
    let here = format!("output.path={}", case.dir.path().display());
    case.refuses(&["--force", "--set", &here], &["holds", "recipe.toml, which the run reads"]);
    let top = out.join("barber-recipe.toml");
    let run = barber(&["prune", &top.display().to_string(), "--force"]);
    assert!(run.status == 1 && flat(&run.stderr).contains("which the run reads"), "{}", run.stderr);
    // Through a link the directory is replaced, and the link stays.
    fs::rename(&out, case.path("real")).unwrap();
    symlink("real", &out).unwrap();
    case.succeeds(&["--force"]);
    assert!(fs::symlink_metadata(&out).unwrap().is_symlink());
    assert!(case.path("real/barber-report.json").is_file());
    fs::write(case.path("real/mine"), "").unwrap();
    case.refuses(&["--force"], &["real holds mine"]);
}

#[test]
fn what_comes_into_an_output_while_a_run_goes_on_stays() {
    let case = Case::new();
    case.succeeds(&[]);
    let (out, model) = (case.path("out"), Reader::open(Path::new(util::TINY)).unwrap());
    let old = all(&out);
    let create =
        |resume| Output::create(&out, Existing { force: true, resume }, &model, [], 0).unwrap();
    let output = create(false);
    output.add_file("config.json", b"{}").unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let error = output.finish().unwrap_err().to_string();
    assert!(error.contains("holds notes.txt"), "{error}");
    drop(output);
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
    fs::remove_file(out.join("notes.txt")).unwrap();
    assert!(all(&out) == old);
    // The result is kept beside it, and takes its place once it can.
    let output = create(true);
    assert!(output.is_complete());
    output.finish().unwrap();
    drop(output);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert!(!case.path("out.partial").exists());
}

/// Directories of others under the names that a run takes beside its output.
#[test]
fn what_is_beside_an_output_and_not_a_runs_stays() {
    let case = Case::new();
    let write = |path: &Path, text: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let others: [(&Make<'_>, &str); 8] = [
        (&|dir| write(&dir.join("thesis.txt"), "precious"), "holds thesis.txt"),
        (&|dir| write(dir, "a file"), "is a file"),
        (&|dir| fifo(dir), "is a FIFO"),
        (
            &|dir| {
                write(&dir.with_file_name("other/thesis.txt"), "precious");
                symlink("other", dir).unwrap();
            },
            "is a link",
        ),
        (&|dir| write(&dir.join("checkpoint/step-1.bin"), "precious"), "has no lock"),
        (
            &|dir| {
                write(&dir.join("checkpoint/step-1.bin"), "precious");
                write(&dir.join("lock"), "");
            },
            "has a lock without a process id",
        ),
        (&|dir| write(&dir.join("lock"), "the key is under the mat"), "without a process id"),
        (
            &|dir| {
                write(&dir.join("lock"), "123");
                symlink("..", dir.join("checkpoint")).unwrap();
            },
            "holds checkpoint",
        ),
    ];
    for name in ["out.partial", ".out.over"] {
        for (make, words) in others {
            make(&case.path(name));
            for flags in [&[][..], &["--force"], &["--resume"], &["--force", "--resume"]] {
                case.refuses(flags, &[words, "move it away, or choose another output.path"]);
            }
            // Nor is it touched where the run is refused for something else.
            fs::create_dir(case.path("out")).unwrap();
            case.refuses(&[], &["out exists; pass --force"]);
            fs::remove_dir(case.path("out")).unwrap();
            let kind = fs::symlink_metadata(case.path(name)).unwrap().file_type();
            if kind.is_dir() {
                fs::remove_dir_all(case.path(name)).unwrap();
            } else {
                fs::remove_file(case.path(name)).unwrap();
            }
            let _ = fs::remove_dir_all(case.path("other"));
        }
    }
    // What runs left there is taken.
    fs::create_dir(case.path("out.partial")).unwrap();
    write(&case.path(".out.over/lock"), "123");
    write(&case.path(".out.over/checkpoint/config.json"), "{}");
    case.succeeds(&[]);
    assert_eq!(fs::read_dir(case.dir.path()).unwrap().count(), 2);
}

#[test]
fn an_output_that_cannot_get_its_name_is_refused_at_the_start() {
    let case = Case::new();
    fs::write(case.path("file"), "").unwrap();
    symlink("nowhere", case.path("dangling")).unwrap();
    fifo(&case.path("fifo"));
    let mut places = vec![
        (case.path("file"), "is a file, not a directory"),
        (case.path("fifo"), "is a FIFO, not a directory"),
        (case.path("dangling"), "is a link to nothing"),
        (case.path("dangling/out"), "is a link to nothing"),
        (case.path("file/out"), "file/out"),
        ("/".into(), "one contains the other"),
    ];
    if cfg!(target_os = "linux") {
        places.push(("/proc".into(), "is a mount point, which cannot be replaced"));
    }
    for (place, words) in places {
        let set = format!("output.path={}", place.display());
        case.refuses(&["--force", "--set", &set], &[words]);
        let run = barber(&["check", &case.recipe, "--set", &set]);
        assert_eq!(run.status, 1, "{}", run.stdout);
        assert!(flat(&run.stderr).contains(words), "{words}: {}", run.stderr);
    }
    // What no run may replace is said by `check`, too; a result may well be there.
    fs::create_dir(case.path("out")).unwrap();
    fs::write(case.path("out/thesis.txt"), "").unwrap();
    let check = || barber(&["check", &case.recipe]);
    assert!(flat(&check().stderr).contains("out is not a checkpoint that a run wrote"));
    fs::remove_file(case.path("out/thesis.txt")).unwrap();
    assert_eq!(check().status, 0);
    case.succeeds(&["--force"]);
    assert_eq!(check().status, 0);
}

/// With so few file descriptors that the lock cannot be read back.
#[test]
fn a_lock_that_cannot_be_taken_ends_the_run() {
    let case = Case::new();
    for files in 4..8 {
        let script = format!("ulimit -n {files}; exec \"$0\" \"$@\"");
        let mut command = command(Path::new("bash"));
        let run = output(command.args([
            "-c",
            &script,
            env!("CARGO_BIN_EXE_barber"),
            "prune",
            &case.recipe,
        ]));
        assert_ne!(run.status, 0, "{}", run.stdout);
        assert!(!case.path("out").exists());
    }
    // What could not be tidied is in nobody's way.
    case.succeeds(&["--force"]);
    assert_eq!(fs::read_dir(case.dir.path()).unwrap().count(), 2);
}

/// A copy of the quickstart's model, and a text.
fn with_tokenizer(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir("recipes/quickstart/model").unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    fs::copy("recipes/quickstart/evaluation.txt", dir.join("text.txt")).unwrap();
    model
}

/// That a command fails with these words, where it would wait for ever if it opened a FIFO.
#[track_caller]
fn fails(arguments: &[&str], words: &[&str]) {
    let run = barber(arguments);
    let said = flat(&run.stderr);
    assert!(run.status == 1 || run.status == 2, "{}{said}", run.stdout);
    for word in words {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn nothing_waits_for_a_fifo_in_a_model() {
    for file in ["config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"] {
        let dir = tempfile::tempdir().unwrap();
        let model = with_tokenizer(dir.path());
        let _ = fs::remove_file(model.join(file));
        fifo(&model.join(file));
        let (model, text) = (model.display().to_string(), dir.path().join("text.txt"));
        let text = text.display().to_string();
        let set = format!("model.path={model}");
        let out = dir.path().join("out");
        let output = format!("output.path={}", out.display());
        let words = [file, "a FIFO, not a regular file"];
        for command in ["prune", "check"] {
            let recipe = "recipes/quickstart.toml";
            fails(&[command, recipe, "--set", &set, "--set", &output], &words);
        }
        assert!(!out.exists() && !dir.path().join("out.partial").exists());
        if !["README.md", "LICENSE"].contains(&file) {
            fails(&["eval", &model, "--text", &text], &words);
        }
        if ["config.json", "model.safetensors"].contains(&file) {
            fails(&["inspect", &model], &words);
        }
    }
}

#[test]
fn nothing_waits_for_a_fifo_among_texts_and_recipes() {
    let case = Case::new();
    let of = |name: &str| case.path(name).display().to_string();
    for name in ["f.toml", "f.txt", "f.json", "f.jsonl", "f.parquet", "f.txt.gz"] {
        fifo(&case.path(name));
        let set = format!("calibration.source={}", of(name));
        for command in ["prune", "check"] {
            fails(&[command, &case.recipe, "--set", &set], &[name, "a FIFO, not a regular file"]);
        }
        let model = "recipes/quickstart/model";
        fails(&["eval", model, "--text", &of(name)], &[name, "a FIFO, not a regular file"]);
        let task = format!("arc_easy={}", of(name));
        fails(&["eval", model, "--task", &task], &[name, "a FIFO, not a regular file"]);
        for option in ["--calibration", "--text"] {
            let written = of("new.toml");
            let arguments = ["init", model, option, &of(name), "--output", &written];
            fails(&arguments, &[name, "a FIFO, not a regular file"]);
            assert!(!case.path("new.toml").exists());
        }
    }
    let texts = format!("evaluate.perplexity=['{}']", of("f.txt"));
    fails(&["check", &case.recipe, "--set", &texts], &["f.txt", "a FIFO"]);
    let recipe = of("f.toml");
    for arguments in [["check", &*recipe], ["prune", &recipe], ["study", &recipe]] {
        fails(&arguments, &["f.toml", "a FIFO, not a regular file"]);
    }
    fs::write(case.path("top.toml"), "extends = 'f.toml'\n").unwrap();
    fails(&["check", &of("top.toml")], &["f.toml cannot be read: a FIFO, not a regular file"]);
    fails(&["check", "/dev/zero"], &["a device, not a regular file"]);
}

/// `barber check <(…)`: a pipe has a writer, and a recipe is read once.
#[test]
fn a_recipe_may_come_through_a_pipe() {
    let case = Case::new();
    let script = "cat \"$1\" | \"$0\" check /dev/stdin";
    let mut command = command(Path::new("bash"));
    let program = env!("CARGO_BIN_EXE_barber");
    let run = output(command.args(["-c", script, program, &case.recipe]));
    assert_eq!(run.status, 0, "{}", run.stderr);
}

#[test]
fn files_that_a_user_names_replace_nothing_but_files() {
    let case = Case::new();
    case.succeeds(&[]);
    let of = |name: &str| case.path(name).display().to_string();
    fs::write(case.path("precious"), "precious").unwrap();
    symlink("precious", case.path("link")).unwrap();
    symlink("nowhere", case.path("dangling")).unwrap();
    fs::create_dir(case.path("directory")).unwrap();
    fifo(&case.path("fifo"));
    let before = all(case.dir.path());
    let (out, model) = (of("out"), util::TINY);
    for (name, kind) in [
        ("link", "is a link"),
        ("dangling", "is a link"),
        ("directory", "is a directory"),
        ("fifo", "is a FIFO"),
        ("precious", "precious exists"),
    ] {
        let path = of(name);
        for flags in [&[][..], &["--force"]] {
            if name == "precious" && !flags.is_empty() {
                continue;
            }
            fails(&[&["init", model, "--output", &path], flags].concat(), &[kind]);
            fails(&[&["compare", &out, "--html", &path], flags].concat(), &[kind]);
        }
    }
    fails(&["init", model, "--output", "/dev/null", "--force"], &["/dev/null is a device"]);
    assert!(all(case.dir.path()) == before);

    // Pages of the manual, and the files of a crate, one by one.
    fs::create_dir(case.path("man")).unwrap();
    symlink("../precious", case.path("man/barber.1")).unwrap();
    fails(&["man", "--output", &of("man")], &["barber.1 is a link"]);
    fs::remove_file(case.path("man/barber.1")).unwrap();
    assert_eq!(barber(&["man", "--output", &of("man")]).status, 0);
    assert!(case.path("man/barber-prune.1").is_file() && case.path("man/barber.1").is_file());
    let new = ["new-metric", "row-norm", "--force", "--path", &of("crate")];
    fs::create_dir(case.path("crate")).unwrap();
    for (link, leads_to) in [("Cargo.toml", "../precious"), ("src", "../directory")] {
        symlink(leads_to, case.path("crate").join(link)).unwrap();
        fails(&new, &[&format!("{link} is a link, and only regular files are replaced")]);
        assert_eq!(fs::read_dir(case.path("crate")).unwrap().count(), 1);
        fs::remove_file(case.path("crate").join(link)).unwrap();
    }
    assert_eq!(barber(&new).status, 0);
    assert_eq!(fs::read(case.path("precious")).unwrap(), b"precious");
    assert_eq!(fs::read_dir(case.path("directory")).unwrap().count(), 0);
}

#[test]
fn a_sweep_leaves_nothing_and_goes_into_no_checkpoint() {
    let case = Case::new();
    let sweep = ["--set", "sweep.sparsity.ratio=[0.25,0.5]"];
    case.succeeds(&sweep);
    let out = case.path("out");
    let names = || {
        let names = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let done = ["barber-sweep.html", "ratio=0.25", "ratio=0.5"];
    assert_eq!(names(), done);
    // Cut off when a run had its name, and the rest had not gone yet.
    for left in ["ratio=0.25.partial", ".ratio=0.5.over"] {
        fs::create_dir(out.join(left)).unwrap();
        fs::write(out.join(left).join("lock"), "123").unwrap();
        fs::write(out.join(left).join("finished"), "").unwrap();
    }
    case.succeeds(&[&sweep[..], &["--resume"]].concat());
    assert_eq!(names(), done);
    // A user's directory of such a name is in nobody's way.
    fs::create_dir(out.join("ratio=0.25.partial")).unwrap();
    fs::write(out.join("ratio=0.25.partial/thesis.txt"), "").unwrap();
    case.succeeds(&sweep);
    assert!(out.join("ratio=0.25.partial/thesis.txt").is_file());
    // A single run does not take the sweep along.
    case.refuses(&["--force"], &["out is not a checkpoint that a run wrote"]);
    fs::remove_dir_all(&out).unwrap();
    // Nor does a sweep go into a checkpoint.
    case.succeeds(&[]);
    case.refuses(&sweep, &["out is a checkpoint"]);
    case.refuses(&[&sweep[..], &["--force"]].concat(), &["out is a checkpoint"]);
    fs::remove_dir_all(&out).unwrap();
    // What stands in the way of the last run is said before the first.
    fs::create_dir_all(out.join("ratio=0.5.partial")).unwrap();
    fs::write(out.join("ratio=0.5.partial/thesis.txt"), "").unwrap();
    case.refuses(&sweep, &["ratio=0.5", "holds thesis.txt"]);
    fs::remove_dir_all(&out).unwrap();
    // As is that its page has no place.
    fs::create_dir_all(out.join("barber-sweep.html")).unwrap();
    case.refuses(&sweep, &["barber-sweep.html is a directory"]);
}

#[test]
fn init_in_a_models_own_directory_writes_a_recipe_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("a 'quoted' model");
    fs::rename(with_tokenizer(dir.path()), &model).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
        let run = output(command.current_dir(&model).args(arguments));
        assert_eq!(run.status, 0, "{}", run.stderr);
        run.stdout
    };
    let printed = run(&["init", ".", "--calibration", "../text.txt"]);
    let file = "a 'quoted' model.toml";
    assert!(printed.contains(&format!("barber prune \"{file}\"")), "{printed}");
    run(&["check", file]);
    let few = ["calibration.samples=1", "calibration.sequence_length=16", "mask.init=magnitude"];
    let sets = few.iter().flat_map(|set| ["--set", set]);
    run(&["prune", file].into_iter().chain(sets).collect::<Vec<_>>());
    assert!(dir.path().join("a 'quoted' model-pruned/barber-report.json").is_file());
    // A path that begins like an option.
    let printed = run(&["init", ".", "--output", "./-x.toml"]);
    assert!(printed.contains("barber check ./-x.toml"), "{printed}");
}
