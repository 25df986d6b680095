//! `barber verify` and `barber reproduce`: results that are right, and what can be wrong with them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    fs,
    path::{Path, PathBuf},
};

use util::{barber, recipe, tensors, tiny, write};

/// The result of the tiny recipe, with inputs that a test may change.
struct Pruned {
    dir: tempfile::TempDir,
}

const O: &str = "model.layers.1.self_attn.o_proj.weight";

impl Pruned {
    fn new(sets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text.json");
        fs::copy("tests/conformance/calibration.json", &text).unwrap();
        let source = format!("calibration.source={}", text.display());
        let model = tiny(dir.path(), |_, _| ());
        let recipe = recipe(dir.path(), "");
        let mut arguments = vec!["prune", &recipe, "--set", &source, "--set", &model];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let run = barber(&arguments);
        assert_eq!(run.status, 0, "{}", run.stderr);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What a command says of the result, with its exit status.
    fn says(&self, command: &str, more: &[&str]) -> (i32, String) {
        let out = self.path("out").display().to_string();
        let run = barber(&[&[command, &out], more].concat());
        (run.status, run.stdout + &run.stderr)
    }

    fn is_right(&self, command: &str) -> String {
        let (status, said) = self.says(command, &[]);
        assert_eq!(status, 0, "{said}");
        said
    }

    fn is_wrong(&self, command: &str, expected: &[&str]) {
        let (status, said) = self.says(command, &[]);
        assert_eq!(status, 1, "{said}");
        assert_eq!(said.matches("wrong     ").count(), expected.len(), "{said}");
        expected.iter().for_each(|expected| assert!(said.contains(expected), "{said}"));
    }

    /// Changes a byte of a tensor of a model.
    fn change(&self, model: &str, tensor: &str, change: impl FnOnce(&mut [u8])) {
        let dir = self.path(model);
        let mut all = tensors(&dir);
        change(&mut all.get_mut(tensor).unwrap().2);
        write(&dir.join("model.safetensors"), &all);
    }
}

/// The place of the first weight that is zero, or is not.
fn first(bytes: &[u8], zero: bool) -> usize {
    4 * bytes.chunks(4).position(|weight| (weight == [0; 4]) == zero).unwrap()
}

#[test]
fn a_result_is_what_its_report_says() {
    let pruned = Pruned::new(&[]);
    let said = pruned.is_right("verify");
    for expected in ["(50.00%) in 14 matrices", "bit for bit", "the result matches its report"] {
        assert!(said.contains(expected), "{said}");
    }
    let before = tensors(&pruned.path("out"));
    // What is found is named.
    pruned.change("out", O, |bytes| bytes[first(bytes, true)] = 1);
    let file = "model.safetensors changed since the run wrote it";
    let zeros = format!("`{O}` has 2047 zeros, fewer than the 2048 expected");
    let dense = format!("`{O}`: 1 kept weights are not the dense model's; the first at [");
    pruned.is_wrong("verify", &[file, &zeros, &dense]);
    write(&pruned.path("out/model.safetensors"), &before);
    pruned.change("out", O, |bytes| bytes[first(bytes, false)] ^= 1);
    pruned.is_wrong("verify", &[file, &dense]);
    pruned.change("out", O, |bytes| {
        let at = first(bytes, false);
        bytes[at..at + 4].fill(0);
    });
    let more = format!("`{O}`: 2049 weights are pruned, at most 2048 are expected");
    pruned.is_wrong("verify", &[file, &more]);
    pruned.change("out", "model.norm.weight", |bytes| bytes[0] ^= 1);
    pruned.is_wrong("verify", &[file, &more, "`model.norm.weight`: 1 kept weights are not"]);
    let mut without = before.clone();
    without.remove(O).unwrap();
    write(&pruned.path("out/model.safetensors"), &without);
    let none = format!("there is no tensor `{O}`");
    let one = format!("`{O}` is missing from one of the two models");
    pruned.is_wrong("verify", &[file, &none, &one]);
}

#[test]
fn what_is_found_can_be_had_as_json() {
    let pruned = Pruned::new(&[]);
    let out = pruned.path("out").display().to_string();
    let json = |command: &str, status: i32| -> serde_json::Value {
        let run = barber(&[command, &out, "--json"]);
        assert_eq!(run.status, status, "{}", run.stderr);
        serde_json::from_str(&run.stdout).unwrap()
    };
    let found = json("verify", 0);
    let dense = pruned.path("model").display().to_string();
    let dense = serde_json::json!({
        "model": dense,
        "quantisation": null,
        "compared": true,
        "changed": 0,
    });
    assert_eq!(found["dense"], dense);
    assert_eq!(found["zeros"].as_u64().unwrap() * 2, found["weights"].as_u64().unwrap());
    assert_eq!(found["wrong"], serde_json::json!([]));
    let found = json("reproduce", 0);
    assert!(found["files"].as_u64().unwrap() > 3 && found["made_by"].is_null(), "{found}");
    assert_eq!(found["wrong"], serde_json::json!([]));

    pruned.change("out", O, |bytes| bytes[first(bytes, false)] ^= 1);
    let wrong = json("verify", 1)["wrong"].clone();
    assert_eq!(wrong[0], "model.safetensors changed since the run wrote it");
    assert!(wrong[1].as_str().unwrap().contains(O), "{wrong}");
    let wrong = json("reproduce", 1)["wrong"].clone();
    assert!(wrong[0].as_str().unwrap().contains("differs from byte"), "{wrong}");
}

#[test]
fn inputs_and_files_are_compared_with_their_digests() {
    let pruned = Pruned::new(&["sparsity.pattern=2:4", "output.dtype=bf16"]);
    pruned.is_right("verify");
    pruned.is_right("reproduce");
    fs::remove_file(pruned.path("out/barber-recipe.toml")).unwrap();
    let (status, said) = pruned.says("verify", &[]);
    assert_eq!(status, 1);
    assert!(said.contains("barber-recipe.toml"), "{said}");
    let (status, said) = pruned.says("reproduce", &[]);
    assert_eq!(status, 1);
    assert!(said.contains("barber-recipe.toml"), "{said}");

    let pruned = Pruned::new(&["sparsity.pattern=2:4", "mask.init=wanda"]);
    let text = pruned.path("text.json");
    let contents = fs::read(&text).unwrap();
    fs::write(&text, [&contents[..], b" "].concat()).unwrap();
    let changed = ["text.json, which the run read, has changed since"];
    pruned.is_wrong("verify", &changed);
    pruned.is_wrong("reproduce", &changed);
    fs::remove_file(&text).unwrap();
    assert!(pruned.is_right("verify").contains("missing, not compared: "));
    pruned.is_wrong("reproduce", &["text.json, which the run read, no longer exists"]);
    // Without the dense model, the rest is checked; with one given, it is compared.
    fs::rename(pruned.path("model"), pruned.path("moved")).unwrap();
    let said = pruned.is_right("verify");
    assert!(said.contains("is missing; give it with --dense to compare"), "{said}");
    let moved = pruned.path("moved").display().to_string();
    let (status, said) = pruned.says("verify", &["--dense", &moved]);
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("bit for bit"), "{said}");
    pruned.change("moved", O, |bytes| bytes.reverse());
    let (status, said) = pruned.says("verify", &["--dense", &moved]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains(&format!("`{O}`: ")), "{said}");
    // A tile that keeps three.
    pruned.change("out", O, |bytes| {
        let at = first(bytes, true);
        bytes[at] = 1;
    });
    let (status, said) = pruned.says("verify", &[]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains(&format!("`{O}`: the tile at [0, 0] keeps more than 2:4")), "{said}");
}

#[test]
fn changed_weights_are_said_to_be_changed() {
    let pruned = Pruned::new(&["mask.init=sparsegpt", "refine.0.retain=true"]);
    let said = pruned.is_right("verify");
    assert!(said.contains("the recipe changed ") && said.contains("kept weights"), "{said}");
    pruned.change("out", "model.norm.weight", |bytes| bytes[0] ^= 1);
    let file = "model.safetensors changed since the run wrote it";
    pruned.is_wrong("verify", &[file, "`model.norm.weight`: 1 kept weights are not"]);
}

/// A result whose report is changed, and its page with it, as who wants to deceive would do.
fn tampered(pruned: &Pruned, change: impl FnOnce(&mut serde_json::Value)) {
    let path = pruned.path("out/barber-report.json");
    let mut report = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut report);
    fs::write(&path, report.to_string()).unwrap();
    if let Ok(report) = llm_barber::report::read(&path) {
        let page = llm_barber::report::page(&report).unwrap();
        fs::write(pruned.path("out/barber-report.html"), page).unwrap();
    }
}

#[test]
fn what_is_added_is_found() {
    let pruned = Pruned::new(&[]);
    for name in ["modeling_x.py", "adapter_config.json", ".hidden", "model-2.safetensors"] {
        let path = pruned.path("out").join(name);
        fs::write(&path, "{}").unwrap();
        pruned.is_wrong("verify", &[&format!("{name} was not written by the run")]);
        fs::remove_file(path).unwrap();
    }
    fs::create_dir(pruned.path("out/checkpoint-1")).unwrap();
    pruned.is_wrong("verify", &["checkpoint-1 was not written by the run"]);
    for i in 0..25 {
        fs::write(pruned.path(&format!("out/{i}.py")), "").unwrap();
    }
    let (status, said) = pruned.says("verify", &[]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("6 more files were not written by the run"), "{said}");
}

#[test]
fn a_page_is_what_the_report_gives() {
    let pruned = Pruned::new(&[]);
    let said = pruned.is_right("verify");
    assert!(said.contains("page      compared with the page that the report gives"), "{said}");
    let page = pruned.path("out/barber-report.html");
    let before = fs::read_to_string(&page).unwrap();
    fs::write(&page, before.replace("<body>", "<body><script>")).unwrap();
    pruned.is_wrong("verify", &["barber-report.html changed since the run wrote it"]);
    fs::remove_file(&page).unwrap();
    pruned.is_wrong("verify", &["barber-report.html is missing"]);
    // Of another version nobody knows what it would have made.
    fs::write(&page, &before).unwrap();
    let report = pruned.path("out/barber-report.json");
    let text = fs::read_to_string(&report).unwrap();
    let barber = format!("\"barber\": \"{}\"", env!("CARGO_PKG_VERSION"));
    fs::write(&report, text.replace(&barber, "\"barber\": \"0.0.0\"")).unwrap();
    let said = pruned.is_right("verify");
    assert!(said.contains("page      not compared"), "{said}");
}

#[test]
fn a_reports_own_figures_are_compared() {
    let pruned = Pruned::new(&["output.format=sparse-bitmask"]);
    pruned.is_right("verify");
    let path = pruned.path("out/barber-report.json");
    let before = fs::read_to_string(&path).unwrap();
    for figure in [
        "/model_weights",
        "/prunable_weights",
        "/pruned_weights",
        "/sizes/pruned_matrices",
        "/sizes/compressed_matrices",
        "/sizes/output/weight_bytes",
        "/sizes/output/directory_bytes",
        "/sizes/dense/weight_bytes",
    ] {
        fs::write(&path, &before).unwrap();
        tampered(&pruned, |report| *report.pointer_mut(figure).unwrap() = 7.into());
        let name = figure[1..].replace('/', ".");
        pruned.is_wrong("verify", &[&format!("the report's {name} is 7, but the files have ")]);
    }
    fs::write(&path, &before).unwrap();
    tampered(&pruned, |report| report["changed_weights"] = 3.into());
    pruned.is_wrong("verify", &["0 kept weights are not the dense model's, but the report says 3"]);
    pruned.is_wrong("reproduce", &["the report's counts of weights differ"]);
    // A matrix that claims to keep more, and one that has another shape.
    fs::write(&path, &before).unwrap();
    tampered(&pruned, |report| {
        let kept = report["matrices"][0]["kept"].as_u64().unwrap();
        report["matrices"][0]["kept"] = (kept + 1).into();
    });
    pruned.is_wrong("verify", &["pruned_weights", "weights are pruned, at most"]);
    fs::write(&path, &before).unwrap();
    tampered(&pruned, |report| report["matrices"][0]["shape"].as_array_mut().unwrap().reverse());
    let (status, said) = pruned.says("verify", &[]);
    let square = said.contains("the result matches its report");
    assert!(square || (status == 1 && said.contains(" has shape [")), "{said}");
    fs::write(&path, &before).unwrap();
    tampered(&pruned, |report| report["matrices"][1] = report["matrices"][0].clone());
    let (status, said) = pruned.says("verify", &[]);
    assert!(status == 1 && said.contains("in the report's matrices more than once"), "{said}");
}

#[cfg(unix)]
#[test]
fn a_report_leads_nowhere_else() {
    let pruned = Pruned::new(&[]);
    let path = pruned.path("out/barber-report.json");
    let before = fs::read_to_string(&path).unwrap();
    let socket = pruned.path("socket");
    let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for input in [Path::new("/dev/zero"), &socket, Path::new("/dev")] {
        fs::write(&path, &before).unwrap();
        let input = input.display().to_string();
        tampered(&pruned, |report| report["inputs"][&input] = "00".into());
        for command in ["verify", "reproduce"] {
            let (status, said) = pruned.says(command, &[]);
            assert_eq!(status, 1, "{said}");
            assert!(said.contains(&input) && said.contains("not a regular file"), "{said}");
        }
    }
    for output in ["../text.json", "/dev/zero", "a/b"] {
        fs::write(&path, &before).unwrap();
        tampered(&pruned, |report| report["outputs"][output] = "00".into());
        for command in ["verify", "reproduce", "compare"] {
            let (status, said) = pruned.says(command, &[]);
            assert_eq!(status, 1, "{said}");
            assert!(util::flat(&said).contains("is not the name of a file beside it"), "{said}");
        }
    }
    // Files without end, or of gigabytes.
    for name in ["barber-report.json", "barber-recipe.toml"] {
        fs::write(&path, &before).unwrap();
        let file = pruned.path("out").join(name);
        fs::remove_file(&file).unwrap();
        fs::File::create(&file).unwrap().set_len(3 << 30).unwrap();
        let (status, said) = pruned.says("reproduce", &[]);
        assert_eq!(status, 1, "{said}");
        assert!(util::flat(&said).contains("the limit for"), "{said}");
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        let (status, said) = pruned.says("reproduce", &[]);
        assert_eq!(status, 1, "{said}");
        assert!(util::flat(&said).contains("not a regular file"), "{said}");
        fs::remove_file(&file).unwrap();
    }
}

#[test]
fn a_result_that_is_pruned_again_is_right() {
    let pruned = Pruned::new(&["mask.init=wanda"]);
    fs::rename(pruned.path("out"), pruned.path("first")).unwrap();
    let run = barber(&[
        "prune",
        &pruned.path("recipe.toml").display().to_string(),
        "--set",
        &format!("model.path={}", pruned.path("first").display()),
        "--set",
        "sparsity.ratio=0.6",
    ]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    pruned.is_right("verify");
    pruned.is_right("reproduce");
}

#[test]
fn verify_needs_no_metric() {
    let pruned = Pruned::new(&[]);
    // As if a binary with a metric of its own had made it.
    let path = pruned.path("out/barber-recipe.toml");
    let recipe = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{recipe}\n[[metric]]\nuse = \"of-my-own\"\n")).unwrap();
    let digest = llm_barber::checkpoint::digest(&path).unwrap();
    tampered(&pruned, |report| report["outputs"]["barber-recipe.toml"] = digest.into());
    pruned.is_right("verify");
    let (status, said) = pruned.says("reproduce", &[]);
    assert_eq!(status, 2, "{said}");
    assert!(util::flat(&said).contains("of-my-own"), "{said}");
}

#[test]
fn a_result_comes_out_again() {
    let pruned = Pruned::new(&["refine=[{ use = 'swap' }]", "mask.init=wanda"]);
    let said = pruned.is_right("reproduce");
    assert!(said.contains("the result matches its rerun"), "{said}");
    let mut names: Vec<_> =
        fs::read_dir(pruned.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["model", "out", "recipe.toml", "text.json"]);
    pruned.change("out", O, |bytes| bytes[first(bytes, false)] ^= 1);
    pruned.is_wrong("reproduce", &["model.safetensors differs from byte "]);
}

#[test]
fn what_is_no_result_is_refused() {
    for command in ["verify", "reproduce"] {
        let run = barber(&[command, util::TINY]);
        assert_eq!(run.status, 1);
        assert!(run.stderr.contains("barber-report.json"), "{}", run.stderr);
        assert!(!Path::new("tests/conformance/.reproduce").exists());
    }
}
