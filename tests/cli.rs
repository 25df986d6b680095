//! The program as a user runs it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{collections::BTreeMap, fs, path::Path};

use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};
use util::{Run, Tensor, barber, flat, recipe, tensors, tiny, write};

fn is_pruned(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// That `sparse` has `ratio` zeros in each pruned matrix and the very bits of `dense` elsewhere.
fn check_sparse(dense: &BTreeMap<String, Tensor>, sparse: &BTreeMap<String, Tensor>, ratio: f64) {
    assert_eq!(dense.len(), sparse.len());
    let (mut zeros, mut all) = (0, 0);
    for (name, (dtype, shape, bytes)) in dense {
        let (sparse_dtype, sparse_shape, sparse_bytes) = &sparse[name];
        assert_eq!((dtype, shape), (sparse_dtype, sparse_shape), "{name}");
        if !is_pruned(name) {
            assert_eq!(bytes, sparse_bytes, "{name}");
            continue;
        }
        let size = bytes.len() / shape.iter().product::<usize>();
        for (dense, sparse) in bytes.chunks(size).zip(sparse_bytes.chunks(size)) {
            all += 1;
            if sparse.iter().all(|byte| *byte == 0) {
                zeros += 1;
            } else {
                assert_eq!(dense, sparse, "{name}");
            }
        }
    }
    assert!((f64::from(zeros) / f64::from(all) - ratio).abs() < 1e-3, "{zeros} of {all}");
}

fn succeeds(run: &Run) {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
}

#[test]
fn a_recipe_prunes_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let run = barber(&["prune", &recipe, "--json"]);
    succeeds(&run);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["groups"].as_array().unwrap().len(), 4);
    let out = dir.path().join("out");
    check_sparse(&tensors(Path::new(util::TINY)), &tensors(&out), 0.5);
    let file = |name: &str| fs::read(out.join(name)).unwrap();
    let original = fs::read(Path::new(util::TINY).join("config.json")).unwrap();
    assert_eq!(file("config.json"), original);
    assert_eq!(serde_json::from_slice::<Value>(&file("barber-report.json")).unwrap(), report);
    // The resolved recipe makes the same bytes again, from anywhere.
    let again = dir.path().join("again");
    let set = format!("output.path={}", again.display());
    let resolved = out.join("barber-recipe.toml").display().to_string();
    succeeds(&barber(&["prune", &resolved, "--set", &set]));
    assert_eq!(tensors(&out), tensors(&again));
    // Nothing is left beside the outputs.
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["again", "out", "recipe.toml"]);
}

#[test]
fn without_a_rebuild_the_initial_mask_is_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.toml");
    let model = std::env::current_dir().unwrap().join(util::TINY);
    let text = format!(
        "model.path = '{}'\nmask.init = 'magnitude'\noutput.path = 'out'\n\
         sparsity.pattern = '1:4'\n",
        model.display()
    );
    fs::write(&path, text).unwrap();
    succeeds(&barber(&["prune", path.to_str().unwrap()]));
    let pruned = tensors(&dir.path().join("out"));
    check_sparse(&tensors(&model), &pruned, 0.75);
    for (name, (_, _, bytes)) in pruned.iter().filter(|(name, _)| is_pruned(name)) {
        for group in bytes.chunks(16) {
            let kept = group.chunks(4).filter(|weight| **weight != [0; 4]).count();
            assert_eq!(kept, 1, "{name}");
        }
    }
    // A second run on the result that keeps its zeros changes nothing.
    let [model, output] = ["model.path", "output.path"].map(|key| {
        let path = if key == "model.path" { "out" } else { "same" };
        format!("{key}={}", dir.path().join(path).display())
    });
    let arguments = [
        "prune",
        path.to_str().unwrap(),
        "--set",
        &model,
        "--set",
        &output,
        "--set",
        "mask.init=none",
    ];
    succeeds(&barber(&arguments));
    assert_eq!(tensors(&dir.path().join("same")), pruned);
}

/// Runs the tiny recipe with assignments; its report and its tensors.
fn pruned(sets: &[&str]) -> (Value, BTreeMap<String, Tensor>) {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let mut arguments = vec!["prune", &recipe, "--json"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    succeeds(&run);
    (serde_json::from_str(&run.stdout).unwrap(), tensors(&dir.path().join("out")))
}

#[test]
fn sparsegpt_changes_weights_only_where_it_is_asked_to() {
    let dense = tensors(Path::new(util::TINY));
    let changed = |report: &Value| report["changed_weights"].as_u64().unwrap();
    let (report, found) = pruned(&["mask.init=sparsegpt"]);
    assert_eq!(changed(&report), 0);
    check_sparse(&dense, &found, 0.5);
    let (report, retained) = pruned(&["mask.init=sparsegpt", "refine.0.retain=true"]);
    // All but what came back, and what nothing to its left was pruned for.
    assert!(changed(&report) > 30_000, "{report}");
    let (_, half) = pruned(&["mask.init=sparsegpt", "refine.0.retain=true", "output.dtype=f16"]);
    for (name, (_, shape, bytes)) in &half {
        let zeros =
            |bytes: &[u8], size| bytes.chunks(size).filter(|w| w.iter().all(|b| *b == 0)).count();
        let count = shape.iter().product::<usize>();
        if is_pruned(name) {
            assert_eq!(zeros(&retained[name].2, 4), count / 2, "{name}");
            assert_eq!(zeros(bytes, 2), count / 2, "{name}");
        } else {
            assert_eq!(retained[name].2, dense[name].2, "{name}");
        }
    }
}

#[test]
fn a_block_may_be_a_whole_decoder_layer() {
    let all = "'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'";
    let layer = format!("blocks=[{{ name = 'layer', layers = [{all}] }}]");
    let (report, found) = pruned(&[&layer, "refine.0.scope=group"]);
    let groups = report["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 2);
    assert_eq!(groups[0]["stages"][0]["matrices"].as_array().unwrap().len(), 7);
    for group in groups {
        let error = |when| group["stages"][0][when]["calibration"].as_f64().unwrap();
        let [before, after] = ["before", "after"].map(error);
        assert!(after < before, "{before} {after}");
    }
    check_sparse(&tensors(Path::new(util::TINY)), &found, 0.5);

    // Swaps see each part of it as it is in the dense layer.
    let stages = ["refine=[{ use = 'swap' }]", "mask.init=wanda", "streams.blend=0.3"];
    for passes in ["mask.passes=1", "mask.passes=2"] {
        let sets = [&[&*layer, passes, "calibration.held_out=2"], &stages[..]].concat();
        let (report, found) = pruned(&sets);
        check_sparse(&tensors(Path::new(util::TINY)), &found, 0.5);
        let all = errors(&report);
        assert!(all.iter().all(|[before, after]| after[0] <= before[0]), "{all:?}");
        assert!(all[0][1][0] < 0.9 * all[0][0][0], "{all:?}");
    }

    // Split otherwise, and in part left out.
    let split = "blocks=[{ name = 'qk', layers = ['q_proj', 'k_proj'] }, \
                 { name = 'v to down', layers = ['v_proj', 'down_proj'] }, \
                 { name = 'up', layers = ['up_proj'] }]";
    let (report, found) = pruned(&[split]);
    let names = |group: &Value| group["group"].as_str().unwrap().to_owned();
    let names: Vec<String> = report["groups"].as_array().unwrap().iter().map(names).collect();
    assert_eq!(names, ["qk", "v to down", "up", "qk", "v to down", "up"]);
    let o = "model.layers.0.self_attn.o_proj.weight";
    assert_eq!(found[o], tensors(Path::new(util::TINY))[o]);
}

#[test]
fn a_recipe_is_checked_without_running_it() {
    let arguments = [
        "check",
        "recipes/quickstart.toml",
        "--set",
        "sparsity.ratio=0.6",
        "--set",
        "override=[{ tensors = '*.0.mlp.*', ratio = 0.3 }]",
    ];
    let run = barber(&arguments);
    succeeds(&run);
    for expected in [
        "# --set sparsity.ratio=0.6",
        "# recipes/quickstart.toml line",
        "mask.init = \"magnitude\"",
        "seed = 0",
        "# default",
        "q_proj 48×48, 60.0% unstructured; layers 0-2",
        "up_proj 112×48, 30.0% unstructured; layer 0",
        "memory    about",
        "FLOP of matrix products to prune",
    ] {
        assert!(run.stdout.contains(expected), "no {expected:?} in {}", run.stdout);
    }
    assert!(!Path::new("out/quickstart.partial").exists());
    assert_eq!(
        barber(&["check", "recipes/quickstart.toml", "--set", "sparsity.ratoi=1"]).status,
        2
    );
}

#[test]
fn overrides_prune_some_tensors_otherwise() {
    let overrides = "override=[{ tensors = '*.down_proj', pattern = '1:4', scope = 'row' }, \
                     { tensors = ['*.layers.1.self_attn.*'], ratio = 0.25 }]";
    let (report, found) = pruned(&[overrides]);
    let kept = |name: &str| {
        let (_, shape, bytes) = &found[name];
        let kept = bytes.chunks(4).filter(|weight| **weight != [0; 4]).count();
        kept as f64 / shape.iter().product::<usize>() as f64
    };
    assert_eq!(kept("model.layers.0.mlp.down_proj.weight"), 0.25);
    assert_eq!(kept("model.layers.1.self_attn.v_proj.weight"), 0.75);
    assert_eq!(kept("model.layers.0.self_attn.v_proj.weight"), 0.5);
    for tile in found["model.layers.0.mlp.down_proj.weight"].2.chunks(16) {
        assert_eq!(tile.chunks(4).filter(|weight| **weight != [0; 4]).count(), 1);
    }
    let matrices = report["groups"][1]["stages"][0]["matrices"].as_array().unwrap();
    assert!(
        matrices.iter().all(|matrix| matrix["came_back"].as_u64().unwrap() > 0),
        "{matrices:?}"
    );
}

#[test]
fn shards_of_half_precision_stay_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let mut halves = tensors(Path::new(util::TINY));
    for (dtype, _, bytes) in halves.values_mut() {
        *dtype = Dtype::BF16;
        *bytes = bytes
            .chunks(4)
            .map(|b| bf16::from_f32(f32::from_le_bytes(b.try_into().unwrap())))
            .flat_map(bf16::to_le_bytes)
            .collect();
    }
    let (mut first, mut second) = (BTreeMap::new(), BTreeMap::new());
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in halves.iter().enumerate() {
        let (shard, file) =
            if i % 2 == 0 { (&mut first, "a.safetensors") } else { (&mut second, "b.safetensors") };
        shard.insert(name.clone(), tensor.clone());
        map.insert(name.clone(), file.into());
    }
    write(&model.join("a.safetensors"), &first);
    write(&model.join("b.safetensors"), &second);
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::copy(Path::new(util::TINY).join("config.json"), model.join("config.json")).unwrap();

    let recipe = recipe(dir.path(), "");
    let set = format!("model.path={}", model.display());
    succeeds(&barber(&["prune", &recipe, "--set", &set]));
    let out = dir.path().join("out");
    check_sparse(&halves, &tensors(&out), 0.5);
    let index = fs::read(out.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["weight_map"], Value::Object(map));
    assert_eq!(tensors(&out).len(), halves.len());

    // Another format is a choice of the recipe.
    let arguments = ["prune", &recipe, "--set", &set, "--set", "output.dtype=f32", "--force"];
    succeeds(&barber(&arguments));
    for (name, (dtype, _, bytes)) in tensors(&out) {
        assert_eq!(dtype, Dtype::F32, "{name}");
        assert_eq!(bytes.len(), 2 * halves[&name].2.len(), "{name}");
    }
}

#[test]
fn a_text_is_evaluated() {
    let arguments = [
        "eval",
        "recipes/quickstart/model",
        "--text",
        "recipes/quickstart/evaluation.txt",
        "--sequence-length",
        "64",
        "--segments",
        "4",
        "--json",
    ];
    let run = barber(&arguments);
    succeeds(&run);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    let found = &found["perplexity"][0];
    assert_eq!(found["predictions"], 4 * 63);
    let perplexity = found["perplexity"].as_f64().unwrap();
    assert!((1.0..3.0).contains(&perplexity), "{perplexity}");
}

#[test]
fn questions_are_asked() {
    let task = |name: &str| format!("{name}=tests/fixtures/tasks/{name}.jsonl");
    let tasks = ["arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "rte", "winogrande"];
    let mut arguments = vec!["eval".to_owned(), "recipes/quickstart/model".into(), "--json".into()];
    tasks.iter().for_each(|name| arguments.extend(["--task".into(), task(name)]));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let run = barber(&arguments);
    succeeds(&run);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(found["tasks"].as_array().unwrap().len(), tasks.len());
    assert_eq!(found["tasks"][0]["questions"], 2);
    let run = barber(&["eval", "recipes/quickstart/model", "--task", "arc=x.jsonl"]);
    assert_eq!(run.status, 2);
    assert!(run.stderr.contains("no task `arc`; known: arc_challenge"), "{}", run.stderr);
    assert_eq!(barber(&["eval", "recipes/quickstart/model"]).status, 2);
    let wrong = "rte=tests/fixtures/tasks/piqa.jsonl";
    let run = barber(&["eval", "recipes/quickstart/model", "--task", wrong]);
    assert_eq!(run.status, 1);
    let expected = "piqa.jsonl, line 1: no field `sentence1`; there is `goal`";
    assert!(flat(&run.stderr).contains(expected), "{}", run.stderr);

    // In a recipe, dense and pruned.
    let dir = tempfile::tempdir().unwrap();
    let task = std::env::current_dir().unwrap().join("tests/fixtures/tasks/arc_easy.jsonl");
    let recipe = "recipes/quickstart.toml";
    let set = format!("evaluate.tasks.arc_easy={}", task.display());
    let output = format!("output.path={}", dir.path().join("out").display());
    let arguments = [
        "prune",
        recipe,
        "--set",
        &set,
        "--set",
        &output,
        "--set",
        "evaluate.questions=1",
        "--set",
        "calibration.samples=2",
    ];
    let run = barber(&arguments);
    succeeds(&run);
    assert!(
        run.stdout.contains("arc_easy, acc ") && run.stdout.contains("100.0 points higher"),
        "{}",
        run.stdout
    );
}

#[test]
fn texts_are_taken_from_data_sets() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string("recipes/quickstart/evaluation.txt").unwrap();
    let [first, rest] = [&text[..text.len() / 2], &text[text.len() / 2..]];
    let lines = format!("{}\n{}\n", json!({ "body": first }), json!({ "body": rest }));
    let lines = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    fs::write(dir.path().join("t.jsonl.zst"), lines).unwrap();
    fs::write(dir.path().join("t.txt"), &text).unwrap();
    let texts = "evaluate.perplexity=[{ name = 'set', path = 't.jsonl.zst', field = 'body', \
                 join = '' }, 't.txt', { path = 't.txt', segments = 1 }]";
    let recipe = dir.path().join("r.toml");
    let model = std::env::current_dir().unwrap().join("recipes/quickstart/model");
    let lines = format!(
        "model.path = '{}'\nmask.init = 'magnitude'\noutput.path = 'out'\n{}\n\
         evaluate.sequence_length = 64\nevaluate.segments = 3\n",
        model.display(),
        texts.replacen('=', " = ", 1),
    );
    fs::write(&recipe, lines).unwrap();
    let run = barber(&["prune", recipe.to_str().unwrap(), "--json"]);
    succeeds(&run);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let [set, file, one] = [0, 1, 2].map(|i| &report["perplexity"][i]);
    assert_eq!(set["text"], "set");
    assert_eq!(set["dense"], file["dense"]);
    assert_eq!((&set["dense"]["segments"], &one["dense"]["segments"]), (&json!(3), &json!(1)));
    // The resolved recipe means the same from elsewhere.
    let resolved = dir.path().join("out/barber-recipe.toml");
    let again = format!("output.path={}", dir.path().join("again").display());
    succeeds(&barber(&["prune", resolved.to_str().unwrap(), "--set", &again]));
}

#[test]
fn the_quickstart_shows_what_a_rebuild_is_worth() {
    let dir = tempfile::tempdir().unwrap();
    let output = format!("output.path={}", dir.path().join("out").display());
    let run = barber(&["prune", "recipes/quickstart.toml", "--set", &output, "--json"]);
    succeeds(&run);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let [dense, initial, rebuilt] = ["dense", "initial", "refined"]
        .map(|mask| report["perplexity"][0][mask]["perplexity"].as_f64().unwrap());
    assert!(dense * 1.2 < rebuilt && rebuilt * 1.1 < initial, "{dense} {initial} {rebuilt}");
    assert!(dir.path().join("out/tokenizer.json").is_file());
}

/// The errors of each group's stages before and after: on calibration samples, and held out.
fn errors(report: &Value) -> Vec<[[f64; 2]; 2]> {
    let stages = report["groups"].as_array().unwrap().iter().flat_map(|group| {
        let error = |stage: &Value, when: &str| {
            ["calibration", "held_out"].map(|of| stage[when][of].as_f64().unwrap())
        };
        let stages = group["stages"].as_array().unwrap().iter();
        stages.map(move |stage| ["before", "after"].map(|when| error(stage, when)))
    });
    stages.collect()
}

#[test]
fn swaps_lower_the_error_and_keep_pattern_and_bits() {
    let dense = tensors(Path::new(util::TINY));
    for (pattern, ratio, scope) in [
        ("unstructured", 0.5, "row"),
        ("unstructured", 0.5, "layer"),
        ("2:4", 0.5, "row"),
        ("1:4", 0.75, "row"),
    ] {
        for (passes, blend, statistics) in
            [(1, 0.0, "sparse"), (1, 0.3, "sparse"), (2, 0.3, "sparse"), (1, 0.0, "dense")]
        {
            let statistics = format!("streams.statistics={statistics}");
            let stage = format!("refine=[{{ use = 'swap', scope = '{scope}' }}]");
            let pattern = format!("sparsity.pattern={pattern}");
            let (passes, blend) =
                (format!("mask.passes={passes}"), format!("streams.blend={blend}"));
            let (report, found) = pruned(&[
                &stage,
                &pattern,
                &passes,
                &blend,
                &statistics,
                "mask.init=wanda",
                "calibration.held_out=2",
            ]);
            check_sparse(&dense, &found, ratio);
            let [mut before, mut after] = [0.0, 0.0];
            for [[_, held_out_before], [_, held_out_after]] in errors(&report) {
                assert!(held_out_after <= held_out_before, "{pattern} {passes} {blend}");
                before += held_out_before;
                after += held_out_after;
            }
            assert!(after < 0.9 * before, "{pattern} {passes} {blend}: {before} {after}");
        }
    }
}

#[test]
fn a_global_budget_is_met_exactly() {
    let dense = tensors(Path::new(util::TINY));
    for by in ["owl", "error"] {
        for init in ["magnitude", "wanda", "sparsegpt", "alps"] {
            let (allocation, init) =
                (format!("sparsity.allocation={by}"), format!("mask.init={init}"));
            let sets = [&allocation, &init, "sparsity.ratio=0.613", "sparsity.spread=0.1"];
            let (report, found) = pruned(&[&sets[..], &["refine=[{ use = 'swap' }]"]].concat());
            let weights: usize = dense
                .iter()
                .filter(|(name, _)| is_pruned(name))
                .map(|(_, (_, shape, _))| shape.iter().product::<usize>())
                .sum();
            let expected = (0.613 * weights as f64) as u64;
            assert_eq!(report["pruned_weights"].as_u64(), Some(expected), "{by} {init}");
            let ratios: Vec<f64> = serde_json::from_value(report["allocation"].clone()).unwrap();
            assert!((ratios[0] - ratios[1]).abs() > 0.01, "{ratios:?}");
            assert!(ratios.iter().all(|ratio| (ratio - 0.613).abs() < 0.101), "{ratios:?}");
            if !init.ends_with("sparsegpt") && !init.ends_with("alps") {
                check_sparse(&dense, &found, 0.613);
            }
        }
    }
}

#[test]
fn a_guarded_rebuild_never_raises_the_error() {
    for gradient in ["dense", "sparse"] {
        for (init, pattern) in [("magnitude", "unstructured"), ("wanda", "2:4")] {
            let stages = format!(
                "refine=[{{ use = 'rebuild', alpha = 'auto', gradient = '{gradient}', \
                 rounds = 'until-converged' }}, {{ use = 'rebuild', rounds = 3, alpha = 1 }}]"
            );
            let (init, pattern) =
                (format!("mask.init={init}"), format!("sparsity.pattern={pattern}"));
            let (report, found) =
                pruned(&[&stages, &init, &pattern, "calibration.held_out=2", "streams.blend=0.2"]);
            check_sparse(&tensors(Path::new(util::TINY)), &found, 0.5);
            let mut fell = 0;
            for [before, after] in errors(&report) {
                assert!(after[0] <= before[0] && after[1] <= before[1], "{before:?} {after:?}");
                fell += usize::from(after[0] < before[0]);
            }
            // From Wanda's mask there may be nothing left to gain.
            assert!(fell > 0 || init.ends_with("wanda"), "{stages} {init}");
        }
    }
}

#[test]
fn reconstruction_changes_weights_where_that_helps() {
    let dense = tensors(Path::new(util::TINY));
    for method in ["conjugate-gradient", "least-squares", "gradient"] {
        reconstructs(&dense, method);
    }
}

fn reconstructs(dense: &BTreeMap<String, Tensor>, method: &str) {
    let stages =
        format!("refine=[{{ use = 'swap' }}, {{ use = 'reconstruct', method = '{method}' }}]");
    let sets = [
        &*stages,
        "mask.init=wanda",
        "mask.passes=1",
        "calibration.held_out=2",
        "streams.blend=0.3",
    ];
    let (report, found) = pruned(&sets);
    assert!(report["changed_weights"].as_u64().unwrap() > 1000, "{report}");
    for (name, (_, shape, bytes)) in &found {
        let zeros = bytes.chunks(4).filter(|weight| **weight == [0; 4]).count();
        if is_pruned(name) {
            assert_eq!(zeros, shape.iter().product::<usize>() / 2, "{name}");
        } else {
            assert_eq!(bytes, &dense[name].2, "{name}");
        }
    }
    let accepted = report["groups"].as_array().unwrap().iter().all(|group| {
        let stage = &group["stages"][1];
        let [before, after] =
            ["before", "after"].map(|when| stage[when]["held_out"].as_f64().unwrap());
        after < before || (after == before && stage["accepted"] == json!(false))
    });
    assert!(accepted, "{report}");
}

#[test]
fn metrics_are_listed() {
    let run = barber(&["metrics"]);
    succeeds(&run);
    for text in [
        "weight-gradient",
        "activation-norm",
        "normalise",
        "needs: squared gradient",
        "power = 1.0",
    ] {
        assert!(run.stdout.contains(text), "{}", run.stdout);
    }
}

#[test]
fn an_output_is_replaced_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine.txt"), "mine").unwrap();
    let run = barber(&["prune", &recipe]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("--force"), "{}", run.stderr);
    // What is no checkpoint is not replaced even so.
    let run = barber(&["prune", &recipe, "--force"]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("not a checkpoint"), "{}", run.stderr);
    assert_eq!(fs::read(out.join("mine.txt")).unwrap(), b"mine");
    // Nor is a directory of others that has a configuration, as checkpoints have.
    fs::write(out.join("config.json"), "{}").unwrap();
    let run = barber(&["prune", &recipe, "--force"]);
    assert_eq!(run.status, 1);
    assert!(out.join("mine.txt").exists());
    fs::remove_dir_all(&out).unwrap();
    succeeds(&barber(&["prune", &recipe]));
    succeeds(&barber(&["prune", &recipe, "--force"]));
    // Never the model itself.
    let model =
        format!("output.path={}", std::env::current_dir().unwrap().join(util::TINY).display());
    let run = barber(&["prune", &recipe, "--force", "--set", &model]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("one contains the other"), "{}", run.stderr);
}

/// Runs a recipe that must fail, and checks that it leaves nothing.
fn fails(dir: &Path, sets: &[&str], status: i32, expected: &[&str]) {
    let recipe = recipe(dir, "");
    let mut arguments = vec!["prune", &recipe];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    let message = flat(&run.stderr);
    assert_eq!(run.status, status, "{sets:?}: {message}");
    for expected in expected {
        assert!(message.contains(expected), "{sets:?}: no {expected:?} in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
    let left = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name != "recipe.toml" && name != "model").collect();
    assert!(left.is_empty(), "{sets:?} left {left:?}");
}

#[test]
fn what_is_wrong_with_a_recipe_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (set, expected) in [
        ("sparsity.ratoi=0.5", "did you mean `ratio`"),
        ("sparsity.ratio=\"half\"", "`sparsity.ratio` is the string"),
        ("sparsity.ratio=1.0", "below 1"),
        ("sparsity.ratio=nan", "sparsity.ratio"),
        ("sparsity.pattern=5:4", "0 < N < M"),
        ("sparsity.exclude=['*_proj']", "nothing is left to prune"),
        ("sparsity.exclude=['down_proj']", "did you mean `*.down_proj`?"),
        ("sparsity.exclude=['lm_head', 're:.*up_proj$']", "not a regular expression: `*up_proj`"),
        ("sparsity.exclude=['model.layers.9.*']", "matches no tensor of the model"),
        ("override=[{ tensors = ['*.q_proj', 'v_proj'], ratio = 0.1 }]", "mean `*.v_proj`?"),
        ("refine.0.alpha=2", "refine.0.alpha"),
        ("metric=[{ use = 'weight-gradiant' }]", "did you mean `weight-gradient`"),
        ("metric=[{ use = 'magnitude', pwoer = 2 }]", "did you mean `power`"),
        ("blocks=[{ name = 'a', layers = ['fc1'] }]", "no decoder layer has a linear layer `fc1`"),
        ("blocks=[{ name = 'a', layers = ['lm_head'] }]", "a linear layer `lm_head`, known: "),
        ("override=[{ tensors = '*.fc1', ratio = 0.1 }]", "such as `model.layers.0"),
        ("calibration.source=no/text.txt", "there is no file no/text.txt"),
        ("evaluate.perplexity=['no/text.txt']", "`evaluate.perplexity.0`: there is no file"),
    ] {
        fails(dir.path(), &[set], 2, &[expected]);
    }
    let swaps = "refine=[{ use = 'swap' }]";
    let scope = "override=[{ tensors = '*', scope = 'group' }]";
    fails(dir.path(), &[swaps, scope], 2, &["override.0.scope", "is not a scope of `swap`"]);
    // In the file, the line is shown.
    let path = recipe(dir.path(), "sparsity.ratoi = 0.5");
    let run = barber(&["prune", &path]);
    assert_eq!(run.status, 2);
    for expected in ["sparsity.ratoi = 0.5", "did you mean `ratio`", "recipe.toml:1:"] {
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
    let run = barber(&["prune", "no/such.toml"]);
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("no/such.toml"), "{}", run.stderr);
    assert_eq!(barber(&["prune"]).status, 2);
    assert_eq!(barber(&["prun"]).status, 2);
}

#[test]
fn a_pattern_has_to_divide_the_matrices_that_it_is_for() {
    let dir = tempfile::tempdir().unwrap();
    let of_all = "the pattern 5:10 does not divide the 64 columns of \
                  `model.layers.0.self_attn.q_proj.weight`, nor those of";
    let over = "override=[{ tensors = '*.1.mlp.down_proj', pattern = '9:27' }]";
    let of_one = "the pattern 9:27 does not divide the 160 columns of \
                  `model.layers.1.mlp.down_proj.weight`";
    for (set, key, expected) in [
        ("sparsity.pattern=5:10", "`sparsity.pattern`", of_all),
        (over, "`override.0.pattern`", of_one),
    ] {
        fails(dir.path(), &[set], 2, &[key, expected, "sparsity.exclude"]);
        let check = barber(&["check", &recipe(dir.path(), ""), "--set", set]);
        assert_eq!(check.status, 2, "{}", check.stdout);
        assert!(flat(&check.stderr).contains(expected), "{}", check.stderr);
    }
    // What is left out need not fit.
    let path = recipe(dir.path(), "");
    let left_out = "sparsity.exclude=['*.down_proj']";
    succeeds(&barber(&["prune", &path, "--set", over, "--set", left_out]));
}

#[test]
fn inputs_that_are_zero_are_no_error() {
    let dir = tempfile::tempdir().unwrap();
    // The values of the first layer's attention are zero, and so are the inputs of its output.
    let model = tiny(dir.path(), |tensors, _| {
        let (_, _, bytes) = tensors.get_mut("model.layers.0.self_attn.v_proj.weight").unwrap();
        bytes.fill(0);
    });
    let path = recipe(dir.path(), "");
    for sets in [
        ["refine=[{ use = 'reconstruct' }]", "mask.init=wanda"],
        ["refine=[{ use = 'reconstruct', damping = 0, shrinkage = 0 }]", "calibration.samples=1"],
        ["refine=[{ use = 'reconstruct', method = 'gradient' }]", "mask.init=wanda"],
        ["refine=[{ use = 'swap' }, { use = 'reconstruct' }]", "streams.blend=0.3"],
        ["refine=[{ use = 'rebuild', rounds = 'until-converged' }]", "mask.init=sparsegpt"],
        ["refine=[]", "sparsity.allocation=owl"],
        ["refine=[]", "sparsity.allocation=error"],
        ["refine=[]", "mask={ init = 'metric', metric = [{ use = 'ria' }] }"],
    ] {
        let mut arguments = vec!["prune", &path, "--force", "--set", &model];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let run = barber(&arguments);
        assert_eq!(run.status, 0, "{sets:?}: {}", run.stderr);
        let said = "o_proj.weight`: its inputs are zero in all calibration samples";
        let least_squares = sets[0].contains("reconstruct") && !sets[0].contains("gradient");
        assert_eq!(flat(&run.stderr).contains(said), least_squares, "{sets:?}: {}", run.stderr);
    }
}

/// Zeros that the checkpoint has, beyond those that are asked for, and in no pattern.
#[test]
fn zeros_of_the_checkpoint_stay_zero() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path(), |tensors, _| {
        for (name, (_, _, bytes)) in tensors.iter_mut().filter(|(name, _)| is_pruned(name)) {
            let of = |i: usize| (i * 7 + name.len()) % 10 < 4;
            bytes.chunks_mut(4).enumerate().filter(|(i, _)| of(*i)).for_each(|(_, w)| w.fill(0));
        }
    });
    let dense = tensors(&dir.path().join("model"));
    let path = recipe(dir.path(), "");
    for (set, changes) in [
        ("mask.init=sparsegpt", "refine=[]"),
        ("mask.init=wanda", "refine=[{ use = 'reconstruct' }]"),
        ("mask.init=sparsegpt", "refine=[{ use = 'reconstruct', method = 'gradient' }]"),
    ] {
        for ratio in ["sparsity.ratio=0.2", "sparsity.pattern=3:4", "sparsity.ratio=0.6"] {
            let mut arguments = vec!["prune", &path, "--force"];
            let sets = [&*model, set, changes, ratio];
            sets.iter().for_each(|set| arguments.extend(["--set", set]));
            succeeds(&barber(&arguments));
            let (mut filled, mut changed) = (0, 0);
            for (name, (_, _, bytes)) in tensors(&dir.path().join("out")) {
                for (before, after) in dense[&name].2.chunks(4).zip(bytes.chunks(4)) {
                    let [before, after] =
                        [before, after].map(|w| f32::from_le_bytes(w.try_into().unwrap()));
                    filled += u32::from(before == 0.0 && after != 0.0);
                    changed += u32::from(after != 0.0 && after != before);
                }
            }
            // Where only zeros are pruned, nothing is to be made up for.
            let enough = changed > 1000 || ratio != "sparsity.ratio=0.6";
            assert!(filled == 0 && enough, "{sets:?}: {filled} filled, {changed} changed");
        }
    }
}

#[test]
fn rounds_end_in_every_format_and_scope() {
    let dir = tempfile::tempdir().unwrap();
    let sweep = "[sweep]\nexecutor.stream_dtype = ['f32', 'bf16', 'f16']\n\
                 refine.0.scope = ['group', 'layer', 'row', 'column']\n\
                 refine.0.alpha = [0, 0.3, 'auto']\nrefine.0.rounds = ['until-converged']\n";
    let run = barber(&["prune", &recipe(dir.path(), sweep), "--json"]);
    succeeds(&run);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    let runs = found["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 36);
    let mut fell = 0;
    for run in runs {
        for group in run["report"]["groups"].as_array().unwrap() {
            let stage = &group["stages"][0];
            let [before, after] =
                ["before", "after"].map(|when| stage[when]["calibration"].as_f64().unwrap());
            let swaps: u64 = stage["matrices"]
                .as_array()
                .unwrap()
                .iter()
                .map(|matrix| matrix["came_back"].as_u64().unwrap())
                .sum();
            // A round stays where it lowers the error, and nothing else does.
            assert_eq!(after < before, swaps > 0, "{}: {before} {after} {swaps}", run["name"]);
            assert!(after <= before && stage["accepted"] == json!(swaps > 0), "{}", run["name"]);
            assert!(run["settings"]["refine.0.alpha"] != "0" || swaps == 0, "{}", run["name"]);
            fell += u32::from(swaps > 0);
        }
    }
    assert!(fell > 40, "{fell}");
}

/// One round is not guarded; that nothing changed can be seen by its errors, too.
#[test]
fn errors_before_and_after_are_measured_alike() {
    for dtype in ["f32", "bf16", "f16"] {
        let format = format!("executor.stream_dtype={dtype}");
        for stages in
            ["refine.0.alpha=0", "refine=[{ use = 'rebuild', alpha = 0, gradient = 'sparse' }]"]
        {
            for blend in ["streams.blend=0", "streams.blend=0.3"] {
                let (report, _) = pruned(&[&format, stages, blend, "calibration.held_out=1"]);
                for [before, after] in errors(&report) {
                    assert_eq!(before, after, "{format} {stages} {blend}");
                }
            }
        }
    }
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn what_is_wrong_with_a_checkpoint_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fails(dir, &["model.path=no/such/model"], 1, &["no/such/model", "does not exist"]);
    let set = tiny(dir, |tensors, _| {
        tensors.remove(Q);
    });
    fails(dir, &[&set], 1, &[Q, "config.json calls for"]);
    let set = tiny(dir, |tensors, _| tensors.get_mut(Q).unwrap().1 = vec![32, 128]);
    fails(dir, &[&set], 1, &[Q, "[32, 128]", "[64, 64]"]);
    let set = tiny(dir, |tensors, _| {
        let bytes = &mut tensors.get_mut(Q).unwrap().2;
        bytes[4 * 70..4 * 71].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    fails(dir, &[&set], 1, &[Q, "NaN at [1, 6]"]);
    let set = tiny(dir, |_, config| config["model_type"] = "bloom".into());
    fails(dir, &[&set], 1, &["bloom", "llama"]);
    let set = tiny(dir, |_, config| config["num_key_value_heads"] = 3.into());
    fails(dir, &[&set], 1, &["num_key_value_heads"]);

    let set = tiny(dir, |_, _| ());
    let shard = dir.join("model/model.safetensors");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() / 2]).unwrap();
    fails(dir, &[&set], 1, &["model.safetensors", "truncated"]);
    fs::write(&shard, &whole[..100]).unwrap();
    fails(dir, &[&set], 1, &["model.safetensors", "truncated"]);
    fs::write(&shard, [&[8, 0, 0, 0, 0, 0, 0, 0], &b"not json"[..]].concat()).unwrap();
    fails(dir, &[&set], 1, &["model.safetensors", "corrupt"]);
    fs::remove_file(&shard).unwrap();
    fs::write(dir.join("model/pytorch_model.bin"), "").unwrap();
    fails(dir, &[&set], 1, &["pickle", "safetensors"]);
    fs::write(dir.join("model/config.json"), "{").unwrap();
    fails(dir, &[&set], 1, &["config.json", "JSON"]);
}

#[test]
fn what_is_wrong_with_a_text_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = |name: &str, contents: &[u8]| {
        let path = dir.join("model").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        format!("calibration.source={}", path.display())
    };
    fails(dir, &["calibration.samples=9"], 1, &["9 rows", "there are 8"]);
    let ids = text("ids.json", b"{\"token_ids\": [[1, 2, 300], [1], [1], [1]]}");
    fails(dir, &[&ids], 1, &["ids.json", "token 300", "256 tokens"]);
    let plain = text("plain.txt", b"Anna has 3 apples.");
    fails(dir, &[&plain], 1, &["tokenizer.json"]);

    let quickstart = "model.path=recipes/quickstart/model";
    fails(dir, &[quickstart, &plain], 1, &["too little text", "5 tokens"]);
    let binary = text("binary.txt", &[b'a', 0xff]);
    fails(dir, &[quickstart, &binary], 1, &["UTF-8", "line 1"]);
    let broken = text("broken.json.gz", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x4b]);
    fails(dir, &[quickstart, &broken], 1, &["broken.json.gz, line 1", "gzip stream is broken"]);
    let parquet = fs::read("tests/fixtures/records.parquet").unwrap();
    let parquet = text("rows.parquet", &parquet);
    let sets = [quickstart, &parquet, "calibration.field=body"];
    fails(dir, &sets, 1, &["rows.parquet, row 1", "no field `body`; there is `text`, `label`"]);
    let lines = text("lines.jsonl", b"{\"text\": \"Anna\"}\n{\"body\": \"Ben\"}\n");
    fails(dir, &[quickstart, &lines], 1, &["line 2", "no field `text`", "there is `body`"]);
    // A tokenizer of another model: its tokens are beyond the vocabulary.
    let set = tiny(dir, |_, _| ());
    let big = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 999}, "unk_token": "b"}
    });
    fs::write(dir.join("model/tokenizer.json"), big.to_string()).unwrap();
    fails(dir, &[&set, &plain], 1, &["tokenizer.json", "token 999", "256 tokens"]);
}

#[test]
fn a_text_is_read_whatever_its_file_is_called() {
    let dir = tempfile::tempdir().unwrap();
    let texts = ["Anna had a brother", "Ben went to the river", "the bread was warm"];
    let lines: String = texts.map(|text| format!("{{\"a.b\": \"{text}\", \"n\": 1}}\n")).concat();
    let list = format!("[\n{}]\n", lines.trim_end().replace('\n', ",\n"));
    let marked = format!("\u{feff}{lines}");
    let measured = |name: &str, bytes: &[u8], more: &[&str]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let path = path.display().to_string();
        let run = barber(&[&["eval", "recipes/quickstart/model", "--text", &path], more].concat());
        (run.status, run.stdout.replace(&path, "").replace(' ', ""), flat(&run.stderr))
    };
    let result = |name: &str, bytes: &[u8], more: &[&str]| {
        let (status, stdout, _) = measured(name, bytes, more);
        (status, stdout)
    };
    let plain = result("a.txt", texts.join("\n\n").as_bytes(), &[]);
    assert_eq!(plain.0, 0);
    let zstandard = zstd::encode_all(lines.as_bytes(), 3).unwrap();
    for (name, bytes) in [
        ("a.jsonl", lines.as_bytes()),
        ("a.ndjson", lines.as_bytes()),
        ("a.jsonlines", lines.as_bytes()),
        ("A.JSONL", lines.as_bytes()),
        ("b.json", list.as_bytes()),
        ("c.jsonl", marked.as_bytes()),
        ("d.JSONL.ZSTD", &zstandard),
    ] {
        assert_eq!(result(name, bytes, &["--field", "a.b"]), plain, "{name}");
    }
    let marked = format!("\u{feff}{}", texts.join("\n\n"));
    assert_eq!(result("e.txt", marked.as_bytes(), &[]), plain);
    // What looks like records is read as its name says, and a word is said of it.
    let (status, _, said) = measured("f.txt", lines.as_bytes(), &[]);
    assert!(status == 0 && said.contains("each line is a JSON object"), "{said}");
    let (status, _, said) = measured("g.CSV", b"text,n\nAnna had a brother,1\n", &[]);
    assert!(
        status == 0 && said.contains("a table, but the file is read as one plain text"),
        "{said}"
    );
    let wide: Vec<u8> = lines.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for name in ["h.jsonl", "h.json", "h.txt"] {
        let (status, _, said) = measured(name, &wide, &[]);
        assert!(status == 1 && said.contains("text in UTF-16"), "{said}");
    }
    let (status, _, said) = measured("i.jsonl", lines.as_bytes(), &["--field", "a.c"]);
    let known = "line 1: no field `a.c`; there is `a.b`, `n`";
    assert!(status == 1 && said.contains(known), "{said}");
    let xz = [&b"\xfd7zXZ\0"[..], &[0; 40]].concat();
    let (status, _, said) = measured("j.jsonl.xz", &xz, &[]);
    assert!(status == 1 && said.contains("a file that xz compressed"), "{said}");
    let (status, _, said) = measured("k.parquet.zst", &zstandard, &[]);
    assert!(status == 1 && said.contains("compressed as a whole; decompress it"), "{said}");
}
