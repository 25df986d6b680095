//! `output.masks`: the masks beside the weights are the zeros of the weights, whatever the model's
//! layout, and `barber verify` finds masks that are not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use util::{Run, Tensor, barber, command, flat, output, recipe, tensors, tiny, write};

const MASKS: &str = "masks.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a safetensors file.
fn read(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let all = file.tensors().into_iter();
    all.map(|(name, of)| (name, (of.dtype(), of.shape().to_vec(), of.data().to_vec()))).collect()
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("barber-report.json")).unwrap()).unwrap()
}

/// Runs a command on a recipe with masks; `prune` replaces what is there.
fn runs(verb: &str, recipe: &str, sets: &[&str]) -> Run {
    let force = (verb == "prune").then_some("--force");
    let sets = ["output.masks=true"].iter().chain(sets).flat_map(|set| ["--set", set]);
    barber(&[verb, recipe].into_iter().chain(force).chain(sets).collect::<Vec<_>>())
}

/// Prunes with masks to `dir/out`, and checks that the masks are the zeros of the weights; returns the
/// directory.
#[track_caller]
fn prunes(dir: &Path, recipe: &str, sets: &[&str]) -> PathBuf {
    let out = dir.join("out");
    let run = runs("prune", recipe, sets);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let path = out.display().to_string();
    let run = barber(&["verify", &path]);
    assert_eq!(run.status, 0, "{}", run.stdout);

    let masks = read(&out.join(MASKS));
    let index: Value = serde_json::from_slice(&fs::read(out.join(INDEX)).unwrap()).unwrap();
    let index = index["weight_map"].as_object().unwrap();
    let mut pruned = 0;
    for (name, (dtype, shape, bits)) in &masks {
        let weights = read(&out.join(index[name].as_str().unwrap()));
        let (stored, weight, bytes) = &weights[name];
        let (columns, others) = weight.split_last().unwrap();
        assert_eq!(
            (*dtype, &shape[..]),
            (Dtype::U8, &[others, &[columns.div_ceil(8)]].concat()[..])
        );
        let size = stored.bitsize() / 8;
        let rows = bytes.chunks(columns * size).zip(bits.chunks(columns.div_ceil(8)));
        for (row, bits) in rows {
            for (i, weight) in row.chunks(size).enumerate() {
                let kept = bits[i / 8] >> (i % 8) & 1 == 1;
                // These models have no zeros of their own.
                assert_eq!(kept, weight.iter().any(|byte| *byte != 0), "{name}");
                pruned += u64::from(!kept);
            }
        }
    }
    let report = report(&out);
    assert_eq!(pruned, report["pruned_weights"].as_u64().unwrap());
    assert!(pruned > 0);
    assert!(report["outputs"][MASKS].is_string());
    // The index names the model's files alone, for loaders that take every file.
    assert!(index.values().all(|file| file != MASKS));
    let files = ["model.safetensors", "config.json", INDEX, MASKS];
    if out.join(files[0]).exists() {
        let sizes = files.map(|file| fs::metadata(out.join(file)).unwrap().len());
        let all = report["sizes"]["output"]["directory_bytes"].as_u64().unwrap();
        assert!(all >= sizes.iter().sum(), "{all} {sizes:?}");
    }
    out
}

#[test]
fn masks_are_the_zeros_of_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let out = prunes(dir.path(), &recipe, &[]);
    let masks = fs::read(out.join(MASKS)).unwrap();
    assert_eq!(read(&out.join(MASKS)).len(), 14);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("`masks.safetensors` has the masks"), "{card}");

    let run = runs("check", &recipe, &["output.path=elsewhere"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(run.stdout.contains(&format!("kB in {MASKS}\n")), "{}", run.stdout);
    let arguments = ["check", &recipe, "--json", "--set", "output.path=elsewhere", "--set"];
    let found = |set: &str| -> Value {
        serde_json::from_str(&barber(&[&arguments[..], &[set]].concat()).stdout).unwrap()
    };
    assert_eq!(found("output.masks=true")["mask_bytes"], masks.len());
    assert_eq!(found("output.masks=false")["mask_bytes"], Value::Null);

    let path = out.display().to_string();
    let run = barber(&["verify", &path]);
    assert!(run.stdout.contains("masks     14 compared with the zeros\n"), "{}", run.stdout);
    let run = barber(&["reproduce", &path]);
    assert_eq!(run.status, 0, "{}", run.stdout);

    // A result with masks is a model like any other, and is replaced like any other.
    let again = dir.path().join("again");
    let sets = [format!("model.path={path}"), format!("output.path={}", again.display())];
    let sets =
        ["sparsity.ratio=0.6", &sets[0], &sets[1]].into_iter().flat_map(|set| ["--set", set]);
    let run = barber(&["prune", &recipe].into_iter().chain(sets).collect::<Vec<_>>());
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(!again.join(MASKS).exists() && !again.join(INDEX).exists());
    let run = barber(&["prune", &recipe, "--force"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(!out.join(MASKS).exists());
}

#[test]
fn any_number_of_threads_gives_the_same_bytes_for_any_number_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path(), |_, _| ());
    let recipe = recipe(dir.path(), "");
    let mut results = Vec::new();
    for (threads, files) in [("1", 1), ("3", 1), ("2", 2)] {
        let path = dir.path().join("model");
        if files == 2 {
            let all = tensors(&path);
            fs::remove_file(path.join("model.safetensors")).unwrap();
            let (mut shards, mut map) =
                ([BTreeMap::new(), BTreeMap::new()], serde_json::Map::new());
            for (i, (name, tensor)) in all.into_iter().rev().enumerate() {
                map.insert(name.clone(), format!("{}.safetensors", i % 2).into());
                shards[i % 2].insert(name, tensor);
            }
            for (i, shard) in shards.iter().enumerate() {
                write(&path.join(format!("{i}.safetensors")), shard);
            }
            fs::write(path.join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
        }
        let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
        command.env("RAYON_NUM_THREADS", threads);
        command.args(["prune", &recipe, "--force", "--set", &model, "--set", "output.masks=true"]);
        let run = output(&mut command);
        assert_eq!(run.status, 0, "{}", run.stderr);
        results.push(fs::read(dir.path().join("out").join(MASKS)).unwrap());
    }
    assert!(results.iter().all(|bytes| *bytes == results[0]));
    prunes(dir.path(), &recipe, &[&model, "sparsity.pattern=2:4"]);
}

/// Stacked experts, in the order of each family, and with one expert's matrix left out.
#[test]
fn masks_of_stacked_experts_are_stacked() {
    for (fixture, stack) in [
        ("stacked/mixtral", "mlp.experts.gate_up_proj"),
        ("logits/granitemoe", "block_sparse_moe.input_linear.weight"),
        ("logits/gpt-oss", "mlp.experts.gate_up_proj"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path(), "");
        let model = fs::canonicalize(Path::new("tests/fixtures").join(fixture)).unwrap();
        let model = format!("model.path={}", model.display());
        let exclude = "sparsity.exclude=['*.1.*experts.1.*']";
        let sets = [&model, exclude, "refine=[]", "output.dtype=f32"];
        let out = prunes(dir.path(), &recipe, &sets);
        let masks = read(&out.join(MASKS));
        for layer in [0, 1] {
            let (_, shape, _) = &masks[&format!("model.layers.{layer}.{stack}")];
            assert_eq!(shape.len(), 3, "{fixture}");
        }
    }
}

#[test]
fn weights_that_a_stage_changed_have_their_masks() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let stages = "refine=[{ use = 'swap' }, { use = 'reconstruct' }]";
    prunes(dir.path(), &recipe, &["mask.init=sparsegpt", stages, "output.dtype=bf16"]);
}

#[test]
fn masks_that_are_not_the_zeros_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let out = prunes(dir.path(), &recipe(dir.path(), ""), &[]);
    let path = out.join(MASKS);
    let before = read(&path);
    let name = "model.layers.1.self_attn.o_proj.weight";
    let finds = |change: &dyn Fn(&mut BTreeMap<String, Tensor>), expected: &[&str]| {
        let mut masks = before.clone();
        change(&mut masks);
        write(&path, &masks);
        let run = barber(&["verify", out.to_str().unwrap()]);
        assert_eq!(run.status, 1, "{}", run.stdout);
        let said = flat(&run.stdout);
        assert_eq!(said.matches("wrong ").count(), expected.len() + 1, "{said}");
        assert!(said.contains("masks.safetensors changed since the run wrote it"), "{said}");
        for expected in expected {
            let expected = format!("masks.safetensors {expected}");
            assert!(said.contains(&expected), "{expected}: {said}");
        }
    };
    let flip = |kept: bool| {
        move |masks: &mut BTreeMap<String, Tensor>| {
            let bits = &mut masks.get_mut(name).unwrap().2;
            let set = |i: &usize| (bits[i / 8] >> (i % 8) & 1 == 1) == kept;
            let mut places = 0..8 * bits.len();
            // So that two flips are of different bits.
            let at = if kept { places.find(set) } else { places.rfind(set) }.unwrap();
            bits[at / 8] ^= 1 << (at % 8);
        }
    };
    let few = format!("keeps 2047 weights of tensor `{name}`, but the report says 2048");
    let not_zero = format!("prunes 1 weights of tensor `{name}` that are not zero");
    finds(&flip(true), &[&few, &not_zero]);
    let many = format!("keeps 2049 weights of tensor `{name}`, but the report says 2048");
    finds(&flip(false), &[&many]);
    finds(
        &|masks| {
            flip(true)(masks);
            flip(false)(masks);
        },
        &[&not_zero],
    );
    let none = format!("has no mask of tensor `{name}` in its shape");
    finds(&|masks| drop(masks.remove(name)), &[&none]);
    finds(&|masks| masks.get_mut(name).unwrap().1.reverse(), &[&none]);
    let other = "has a mask of `model.norm.weight`, which the run did not prune";
    let norm = |masks: &mut BTreeMap<String, Tensor>| {
        masks.insert("model.norm.weight".into(), (Dtype::U8, vec![1], vec![1]));
    };
    finds(&norm, &[other]);

    // A file that is no safetensors file is an error.
    fs::write(&path, "{}").unwrap();
    let run = barber(&["verify", out.to_str().unwrap()]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("masks.safetensors: "), "{}", run.stderr);
    fs::remove_file(&path).unwrap();
    let run = barber(&["verify", out.to_str().unwrap()]);
    assert!(flat(&run.stdout).contains("masks.safetensors is missing"), "{}", run.stdout);
}

#[test]
fn a_result_without_zeros_or_with_its_own_masks_gets_none() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    for (sets, expected) in [
        (
            &["sparsity.structure=channels", "refine=[]"][..],
            "channels are removed as a whole, and leave no zeros for a mask",
        ),
        (
            &["output.format=sparse-bitmask"][..],
            "sparse-bitmask has the masks in the weights' own files",
        ),
    ] {
        for verb in ["check", "prune"] {
            let run = runs(verb, &recipe, sets);
            assert_eq!(run.status, 2, "{}", run.stdout);
            let said = flat(&run.stderr);
            assert!(said.contains("output.masks") && said.contains(expected), "{said}");
        }
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn weights_in_a_file_of_the_masks_name_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path(), |_, _| ());
    let path = dir.path().join("model");
    let map: serde_json::Map<_, _> =
        tensors(&path).into_keys().map(|name| (name, MASKS.into())).collect();
    fs::write(path.join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
    fs::rename(path.join("model.safetensors"), path.join(MASKS)).unwrap();
    let recipe = recipe(dir.path(), "");
    for verb in ["check", "prune"] {
        let run = runs(verb, &recipe, &[&model]);
        assert_eq!(run.status, 1, "{}", run.stdout);
        let said = flat(&run.stderr);
        assert!(said.contains("masks.safetensors has weights of the model"), "{said}");
    }
    let run = barber(&["prune", &recipe, "--set", &model]);
    assert_eq!(run.status, 0, "{}", run.stderr);
}
