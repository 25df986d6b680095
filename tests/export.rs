//! Pruned checkpoints for people who deploy: layouts of compressed-tensors, sizes, the model card.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use llm_barber::checkpoint::{Format, Reader};
use safetensors::Dtype;
use serde_json::{Value, json};
use util::{Run, barber, flat, tensors, write};

const MODEL: &str = "recipes/quickstart/model";

fn succeeds(run: &Run) {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
}

/// A recipe that prunes the quickstart's model by magnitude.
fn recipe(dir: &Path) -> String {
    let model = std::env::current_dir().unwrap().join(MODEL);
    let text = format!("model.path = '{}'\nmask.init = 'magnitude'\n", model.display());
    let path = dir.join("recipe.toml");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// Prunes to `dir/name`; returns that and the report.
fn prune(dir: &Path, name: &str, sets: &[&str]) -> (PathBuf, Value) {
    let (recipe, out) = (recipe(dir), dir.join(name));
    let path = format!("output.path={}", out.display());
    let mut arguments = vec!["prune", &recipe, "--json", "--set", &path];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    succeeds(&run);
    (out, serde_json::from_str(&run.stdout).unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// All tensors of a checkpoint as Barber reads them.
fn read(dir: &Path) -> BTreeMap<String, util::Tensor> {
    let reader = Reader::open(dir).unwrap();
    let tensor = |name: &str| {
        let view = reader.tensor(name).unwrap();
        (view.dtype, view.shape.to_vec(), view.bytes().unwrap().into_owned())
    };
    reader.names().map(|name| (name.to_owned(), tensor(name))).collect()
}

fn perplexity(dir: &Path) -> f64 {
    let dir = dir.display().to_string();
    let text = "recipes/quickstart/evaluation.txt";
    let arguments =
        ["eval", &dir, "--text", text, "--sequence-length", "64", "--segments", "4", "--json"];
    let run = barber(&arguments);
    succeeds(&run);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    found["perplexity"][0]["perplexity"].as_f64().unwrap()
}

/// That a format's output is the dense one, for readers that know the format.
fn is_the_dense_one(sets: &[&str], format: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (dense, _) = prune(dir.path(), "dense", sets);
    let set = format!("output.format={format}");
    let (compressed, report) = prune(dir.path(), "compressed", &[sets, &[&set]].concat());
    assert_eq!(read(&compressed), tensors(&dense));
    assert_eq!(perplexity(&compressed), perplexity(&dense));

    // What is compressed, and nothing else, is named in the configuration.
    let section = &json(&compressed.join("config.json"))["quantization_config"];
    assert_eq!(section["quant_method"], "compressed-tensors");
    let section = &section["sparsity_config"];
    assert_eq!(section["format"], format);
    let stored = tensors(&compressed);
    let modules: Vec<&str> =
        stored.keys().filter_map(|name| name.strip_suffix(".bitmask")).collect();
    let mut targets: Vec<&str> =
        section["targets"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    targets.sort_unstable();
    assert_eq!(targets, modules);
    assert_eq!(modules.len(), 21);
    assert!(modules.iter().all(|module| !stored.contains_key(&format!("{module}.weight"))));
    assert_eq!(report["sizes"]["compressed_matrices"], 21);

    // `inspect` tells the sizes in the file, and what they are of.
    let path = compressed.display().to_string();
    let run = barber(&["inspect", &path, "--json"]);
    succeeds(&run);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(found["format"], format);
    let sizes = stored.values().map(|(_, _, bytes)| bytes.len());
    assert_eq!(found["total"]["bytes"].as_u64().unwrap() as usize, sizes.sum::<usize>());
    for tensor in found["tensors"].as_array().unwrap() {
        let (bytes, dense) = (&tensor["bytes"], tensor["dense_bytes"].as_u64().unwrap());
        let matrix = tensor["name"].as_str().unwrap().ends_with("_proj.weight");
        assert_eq!(bytes.as_u64().unwrap() < dense, matrix, "{tensor}");
    }
    let run = barber(&["inspect", &path]);
    succeeds(&run);
    assert!(flat(&run.stdout).contains(&format!(", {format}, of ")), "{}", run.stdout);

    // Every tensor is aligned: some readers insist.
    let file = fs::read(compressed.join("model.safetensors")).unwrap();
    let (data, header) = llm_barber::checkpoint::parse_header(&file).unwrap();
    assert_eq!(data % 8, 0);
    for (name, info) in header.tensors() {
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name}");
    }
}

#[test]
fn a_bitmask_stores_any_mask() {
    is_the_dense_one(&["sparsity.ratio=0.6"], "sparse-bitmask");
}

#[test]
fn a_bitmask_of_two_of_four_stores_the_pattern() {
    is_the_dense_one(&["sparsity.pattern=2:4"], "sparse-24-bitmask");
}

#[test]
fn matrices_that_would_not_get_smaller_stay_dense() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "output.format=sparse-24-bitmask",
        "sparsity.pattern=2:4",
        "sparsity.exclude=['*.layers.1.*', 'lm_head']",
        "override=[{ tensors = '*.down_proj', pattern = 'unstructured', ratio = 0.5 }]",
    ];
    let (out, report) = prune(dir.path(), "some", &sets);
    let stored = tensors(&out);
    assert!(stored.contains_key("model.layers.0.mlp.up_proj.bitmask"));
    assert!(stored.contains_key("model.layers.1.mlp.up_proj.weight"));
    assert!(stored.contains_key("model.layers.0.mlp.down_proj.weight"));
    assert_eq!(report["sizes"]["compressed_matrices"], 12);
    assert_eq!(report["sizes"]["pruned_matrices"], 14);

    // Where nothing gets smaller, the checkpoint is a dense one, and says so.
    let sets = ["output.format=sparse-bitmask", "sparsity.ratio=0.01", "output.dtype=f16"];
    let (out, report) = prune(dir.path(), "none", &sets);
    assert_eq!(Reader::open(&out).unwrap().format(), Format::default());
    assert_eq!(json(&out.join("config.json")).get("quantization_config"), None);
    assert_eq!(report["sizes"]["compressed_matrices"], 0);
}

#[test]
fn a_pattern_that_the_format_does_not_store_is_an_error_of_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    for (pattern, format) in [("4:8", "sparse-24-bitmask"), ("unstructured", "sparse-24-bitmask")] {
        let sets = [format!("sparsity.pattern={pattern}"), format!("output.format={format}")];
        let recipe = recipe(dir.path());
        let run = barber(&["prune", &recipe, "--set", &sets[0], "--set", &sets[1]]);
        assert_eq!(run.status, 2);
        let message = flat(&run.stderr);
        let expected = format!(
            "`output.format`: {format} stores the pattern 2:4, and \
                                sparsity.pattern is {pattern}"
        );
        assert!(message.contains(&expected), "{message}");
        assert!(!dir.path().join("out").exists());
    }
    let run = barber(&["prune", &recipe(dir.path()), "--set", "output.format=sparse-bitmsk"]);
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("did you mean `sparse-bitmask`?"), "{}", run.stderr);
}

#[test]
fn a_compressed_checkpoint_is_pruned_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let (dense, _) = prune(dir.path(), "dense", &["sparsity.ratio=0.75"]);
    let sets = ["sparsity.ratio=0.5", "output.format=sparse-bitmask"];
    let (half, _) = prune(dir.path(), "half", &sets);
    let model = format!("model.path={}", half.display());
    let (again, _) = prune(dir.path(), "again", &[&model, "sparsity.ratio=0.75"]);
    assert_eq!(tensors(&again), tensors(&dense));
    assert_eq!(json(&again.join("config.json")), json(&dense.join("config.json")));
    let sets = [&model, "sparsity.ratio=0.75", "output.format=sparse-bitmask"];
    let (compressed, _) = prune(dir.path(), "compressed", &sets);
    assert_eq!(read(&compressed), tensors(&dense));
}

/// Splits the file of a checkpoint: some of each matrix's tensors go to the one shard, some to the
/// other.
fn split(dir: &Path) {
    let all = tensors(dir);
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let (mut first, mut second) = (BTreeMap::new(), BTreeMap::new());
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in all.into_iter().enumerate() {
        let (shard, file) =
            if i % 2 == 0 { (&mut first, "a.safetensors") } else { (&mut second, "b.safetensors") };
        map.insert(name.clone(), file.into());
        shard.insert(name, tensor);
    }
    write(&dir.join("a.safetensors"), &first);
    write(&dir.join("b.safetensors"), &second);
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_compressed_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(MODEL).join(file), model.join(file)).unwrap();
    }
    split(&model);
    let set = format!("model.path={}", model.display());
    let (dense, _) = prune(dir.path(), "dense", &[&set]);
    let (out, _) = prune(dir.path(), "out", &[&set, "output.format=sparse-bitmask"]);
    assert_eq!(read(&out), tensors(&dense));
    let index = json(&out.join("model.safetensors.index.json"));
    let stored = tensors(&out);
    let indexed: BTreeSet<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    assert!(indexed.into_iter().eq(stored.keys()));
    let bytes: usize = stored.values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);

    // The tensors of a matrix may be in several shards.
    let (one, _) = prune(dir.path(), "one", &["output.format=sparse-bitmask"]);
    split(&one);
    assert_eq!(read(&one), tensors(&dense));
}

#[test]
fn a_damaged_matrix_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (out, _) = prune(dir.path(), "out", &["output.format=sparse-bitmask"]);
    let module = "model.layers.0.mlp.up_proj";
    let damage = |change: &dyn Fn(&mut BTreeMap<String, util::Tensor>)| {
        let mut all = tensors(&out);
        change(&mut all);
        let damaged = dir.path().join("damaged");
        fs::create_dir_all(&damaged).unwrap();
        for file in ["config.json", "tokenizer.json"] {
            fs::copy(out.join(file), damaged.join(file)).unwrap();
        }
        write(&damaged.join("model.safetensors"), &all);
        let damaged = damaged.display().to_string();
        let run = barber(&["eval", &damaged, "--text", "recipes/quickstart/evaluation.txt"]);
        assert_eq!(run.status, 1, "{}", run.stdout);
        let message = flat(&run.stderr);
        let named = format!("`{module}.weight`");
        assert!(message.contains(&named), "{message}");
        message
    };
    let message = damage(&|all| {
        all.remove(&format!("{module}.shape"));
    });
    assert!(message.contains(&format!("there is no `{module}.shape`")), "{message}");
    let message = damage(&|all| all.get_mut(&format!("{module}.bitmask")).unwrap().2[0] ^= 1);
    assert!(message.contains("the bitmask marks"), "{message}");
    let message = damage(&|all| {
        let shape = all.get_mut(&format!("{module}.shape")).unwrap();
        shape.2[8..].copy_from_slice(&(-1i64).to_le_bytes());
    });
    assert!(message.contains("not the shape of a matrix"), "{message}");
    let message = damage(&|all| {
        let shape = all.get_mut(&format!("{module}.shape")).unwrap();
        shape.2[0] += 1;
    });
    assert!(message.contains("but config.json implies"), "{message}");
    let message = damage(&|all| {
        let values = all.get_mut(&format!("{module}.compressed")).unwrap();
        values.0 = Dtype::I16;
    });
    assert!(message.contains("stored as I16"), "{message}");
}

#[test]
fn the_card_says_what_was_done_and_no_path_of_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("tiny-model");
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(MODEL).join(file), model.join(file)).unwrap();
    }
    let card = "---\nlicense: mit\nlanguage:\n- en\ntags:\n- secret\n---\n# Dense\n";
    fs::write(model.join("README.md"), card).unwrap();
    fs::copy("recipes/quickstart/evaluation.txt", dir.path().join("a|b.txt")).unwrap();
    let sets = [
        &format!("model.path={}", model.display()),
        &format!("evaluate.perplexity=['{}']", dir.path().join("a|b.txt").display()),
        "evaluate.sequence_length=64",
        "evaluate.segments=4",
        "output.format=sparse-bitmask",
    ];
    let (out, report) = prune(dir.path(), "out", &sets);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    let metadata = "---\nlicense: \"mit\"\nlanguage: \"en\"\nlibrary_name: transformers\n\
                    pipeline_tag: text-generation\n\
                    tags:\n- pruned\n- sparse\n- llm-barber\n- compressed-tensors\n---\n\n\
                    # tiny-model, 50% pruned\n";
    assert!(card.starts_with(metadata), "{card}");
    let perplexity = &report["perplexity"][0];
    let [dense, pruned] = ["dense", "initial"].map(|of| {
        let figure = |key: &str| perplexity[of][key].as_f64().unwrap();
        format!("{:.2} ± {:.2}", figure("perplexity"), figure("perplexity_stderr"))
    });
    for expected in [
        "34560 of the 69120 weights of 21 matrices (50.00%; ",
        "- Initial mask: magnitude\n",
        "- Kept weights: the dense model's\n",
        &format!("| a\\|b.txt, perplexity (lower is better) | {dense} | {pruned} |\n"),
        "compressor.decompress(DIR, model)",
        "path = \"tiny-model\"",
        "\"a|b.txt\"",
        "format = \"sparse-bitmask\"",
    ] {
        assert!(card.contains(expected), "no {expected:?} in {card}");
    }
    let here = std::env::current_dir().unwrap();
    for absent in [dir.path().to_str().unwrap(), here.to_str().unwrap(), "secret"] {
        assert!(!card.contains(absent), "{absent} is in {card}");
    }

    // A checkpoint without a card has no licence that is known.
    let (out, _) = prune(dir.path(), "other", &[]);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(!card.contains("license") && !card.contains("base_model"), "{card}");
    assert!(!card.contains("compressed-tensors"), "{card}");
}

#[test]
fn sizes_are_those_of_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let (out, report) = prune(dir.path(), "out", &["output.format=sparse-bitmask"]);
    let sizes = &report["sizes"];
    let size = |dir: &Path| -> u64 {
        let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let own = ["README.md", "barber-report.html", "barber-report.json", "barber-recipe.toml"];
        let files = files.filter(|file| !own.contains(&file.file_name().to_str().unwrap()));
        files.map(|file| file.metadata().unwrap().len()).sum()
    };
    let weights =
        |dir: &Path| -> usize { tensors(dir).values().map(|(_, _, bytes)| bytes.len()).sum() };
    assert_eq!(sizes["format"], "sparse-bitmask");
    for (of, dir) in [("dense", Path::new(MODEL)), ("output", &out)] {
        assert_eq!(sizes[of]["weight_bytes"], weights(dir), "{of}");
        assert_eq!(sizes[of]["directory_bytes"], size(dir), "{of}");
    }
    assert_eq!(sizes["pruned_matrices"], 21);
}

#[test]
fn a_compressed_result_is_written_dense() {
    let dir = tempfile::tempdir().unwrap();
    for (sets, format) in [
        (&["sparsity.ratio=0.6", "output.dtype=f16"][..], "sparse-bitmask"),
        (&["sparsity.pattern=2:4"], "sparse-24-bitmask"),
    ] {
        let (dense, expected) = prune(dir.path(), &format!("dense-{format}"), sets);
        let set = format!("output.format={format}");
        let (compressed, _) = prune(dir.path(), format, &[sets, &[&set]].concat());
        let path = compressed.display().to_string();
        let run = barber(&["convert", &path, "--format", "dense"]);
        succeeds(&run);
        // Every file is what a run with the format `dense` has written, but for names of paths.
        let out = dir.path().join(format!("{format}-dense"));
        assert!(run.stdout.contains(&format!("written   {}", out.display())), "{}", run.stdout);
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
            entries.map(|name| name.into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        assert_eq!(names(&out), names(&dense));
        for name in names(&out).iter().filter(|name| !name.starts_with("barber-")) {
            let [found, expected] = [&out, &dense].map(|dir| fs::read(dir.join(name)).unwrap());
            assert!(found == expected, "{name}");
        }
        let report = json(&out.join("barber-report.json"));
        assert_eq!(report["sizes"], expected["sizes"]);
        let settings = report["recipe"].as_array().unwrap().iter();
        let mut format = settings.filter(|setting| setting["key"] == "output.format");
        assert_eq!(format.next().unwrap()["value"], "\"dense\"");
        // It is a result like any other.
        let path = out.display().to_string();
        succeeds(&barber(&["verify", &path]));
        succeeds(&barber(&["reproduce", &path]));
        let run = barber(&["convert", &path, "--format", "dense"]);
        assert_eq!(run.status, 1);
        assert!(flat(&run.stderr).contains("it is dense already"), "{}", run.stderr);
    }
}

#[test]
fn a_conversion_replaces_and_reads_nothing_that_it_should_not() {
    let dir = tempfile::tempdir().unwrap();
    let (compressed, _) = prune(dir.path(), "out", &["output.format=sparse-bitmask"]);
    let (path, target) = (compressed.display().to_string(), dir.path().join("target"));
    let to = target.display().to_string();
    let convert = |more: &[&str]| {
        barber(&[&["convert", &path, "--format", "dense", "--output", &to], more].concat())
    };
    succeeds(&convert(&[]));
    assert!(flat(&convert(&[]).stderr).contains("target exists; pass --force"));
    succeeds(&convert(&["--force"]));
    fs::write(target.join("notes.txt"), "").unwrap();
    assert!(flat(&convert(&["--force"]).stderr).contains("holds notes.txt, which no run wrote"));
    fs::remove_dir_all(&target).unwrap();
    let run = barber(&["convert", &path, "--format", "dense", "--output", &path, "--force"]);
    assert!(flat(&run.stderr).contains("one contains the other"), "{}", run.stderr);
    assert_eq!(barber(&["convert", &path, "--format", "sparse-bitmask"]).status, 2);

    // A checkpoint of other tools has no report, and gets none.
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(compressed.join(file), other.join(file)).unwrap();
    }
    let other = other.display().to_string();
    succeeds(&barber(&["convert", &other, "--format", "dense"]));
    assert_eq!(tensors(&dir.path().join("other-dense")), read(&compressed));
    assert!(!dir.path().join("other-dense/barber-report.json").exists());

    // A result that has changed since is not passed on as one.
    let file = compressed.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let run = convert(&[]);
    assert_eq!(run.status, 1);
    assert!(
        flat(&run.stderr)
            .contains("model.safetensors is missing or changed since the run wrote it")
    );
    assert!(!target.exists());
}

#[test]
fn who_reads_a_compressed_output_is_said_before_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipe(dir.path());
    let said = "sparse-bitmask: compressed-tensors 0.9 to 0.14 read it, with transformers 4; later \
                versions load random weights in place of its pruned matrices";
    let [out, dense] =
        ["out", "dense"].map(|name| format!("output.path={}", dir.path().join(name).display()));
    let with = ["--set", "output.format=sparse-bitmask", "--set", &out];
    for (command, times) in [("check", 1), ("prune", 2)] {
        let run = barber(&[&[command, &path], &with[..]].concat());
        succeeds(&run);
        assert_eq!(flat(&run.stdout).matches(said).count(), times, "{}", run.stdout);
        let run = barber(&[command, &path, "--set", &dense]);
        succeeds(&run);
        assert!(!run.stdout.contains("compressed-tensors"), "{}", run.stdout);
    }
}
