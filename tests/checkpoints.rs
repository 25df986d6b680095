//! Checkpoints as others write them: each loads as it does in transformers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{collections::BTreeMap, fs, path::Path};

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    evaluate::logits,
    model::Model,
};
use safetensors::Dtype;
use serde_json::Value;
use util::{TINY, Tensor, barber, flat, recipe, tensors, tiny};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

type Tensors = BTreeMap<String, Tensor>;

/// The logits of a few tokens.
fn run(dir: &Path) -> Vec<f32> {
    let reader = Reader::open(dir).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    logits(&model, &Pruned::dense(), &[3, 1, 4, 1, 5, 9]).unwrap()
}

/// The logits of the tiny LLaMA with other tensors and another configuration.
fn changed(change: impl FnOnce(&mut Tensors, &mut Value)) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    tiny(dir.path(), change);
    run(&dir.path().join("model"))
}

fn tie(config: &mut Value) {
    config["tie_word_embeddings"] = true.into();
}

#[test]
fn a_head_of_its_own_is_used_though_the_configuration_ties_it() {
    let own = run(Path::new(TINY));
    assert_eq!(changed(|_, config| tie(config)), own);
    let tied = changed(|tensors, config| {
        tie(config);
        tensors.remove(HEAD);
    });
    assert_ne!(tied, own);
    // A copy of the embedding is no other head, and an embedding that is not stored is the head.
    let copied = |tensors: &mut Tensors, config: &mut Value| {
        tie(config);
        tensors.insert(HEAD.into(), tensors[EMBEDDING].clone());
    };
    assert_eq!(changed(copied), tied);
    let alone = changed(|tensors, config| {
        copied(tensors, config);
        tensors.remove(EMBEDDING);
    });
    assert_eq!(alone, tied);
    let bare = changed(|tensors, config| {
        tie(config);
        tensors.remove(HEAD);
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| (name.replace("model.", ""), tensor))
            .collect();
    });
    assert_eq!(bare, tied);
}

#[test]
fn a_head_that_is_not_the_tied_one_is_said_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let set = tiny(dir.path(), |_, config| tie(config));
    for command in ["check", "prune"] {
        let run = barber(&[command, &recipe, "--set", &set]);
        assert_eq!(run.status, 0, "{}", run.stderr);
        let said = flat(&run.stderr);
        assert!(said.contains("`lm_head.weight` differs from its `model.embed_t"), "{said}");
    }
    assert_eq!(tensors(&dir.path().join("out"))[HEAD], tensors(Path::new(TINY))[HEAD]);
    let mut check = vec!["check", &recipe, "--set", &set];
    for set in ["sparsity.structure=channels", "sparsity.ratio=0.25", "refine=[]"] {
        check.extend(["--set", set]);
    }
    let run = barber(&check);
    assert_eq!(run.status, 0, "{}", run.stderr);
}

#[test]
fn a_whole_file_comes_before_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let set = tiny(dir.path(), |_, _| ());
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    fs::write(dir.path().join("model/model.safetensors.index.json"), index).unwrap();
    assert_eq!(run(&dir.path().join("model")), run(Path::new(TINY)));
    let run = barber(&["prune", &recipe, "--set", &set]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(!dir.path().join("out/model.safetensors.index.json").exists());
}

#[test]
fn a_tensor_of_two_shards_is_named_with_both() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let set = tiny(dir.path(), |_, _| ());
    let model = dir.path().join("model");
    let whole = model.join("model.safetensors");
    let [one, two] = ["model-00001-of-00002", "model-00002-of-00002"];
    fs::copy(&whole, model.join(one).with_extension("safetensors")).unwrap();
    let head = BTreeMap::from([(HEAD.to_owned(), tensors(Path::new(TINY))[HEAD].clone())]);
    util::write(&model.join(two).with_extension("safetensors"), &head);
    fs::remove_file(whole).unwrap();
    let map = serde_json::json!({ "weight_map": {
        EMBEDDING: format!("{one}.safetensors"), HEAD: format!("{two}.safetensors"),
    } });
    fs::write(model.join("model.safetensors.index.json"), map.to_string()).unwrap();
    let run = barber(&["check", &recipe, "--set", &set]);
    let said = flat(&run.stderr);
    assert_eq!(run.status, 1, "{said}");
    for part in [one, two, "tensor `lm_head.weight` is also in"] {
        assert!(said.contains(part), "{said}");
    }
}

/// The same numbers in 64 bits.
fn widen((dtype, _, bytes): &mut Tensor) {
    let wide = |b: &[u8]| f64::from(f32::from_le_bytes(b.try_into().unwrap())).to_le_bytes();
    *dtype = Dtype::F64;
    *bytes = bytes.chunks(4).flat_map(wide).collect();
}

#[test]
fn weights_of_64_bits_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let prune = |out: &str, arguments: &[&str]| {
        let output = format!("output.path={}", dir.path().join(out).display());
        let run = barber(&[&["prune", &recipe, "--set", &output], arguments].concat());
        assert_eq!(run.status, 0, "{}", run.stderr);
        tensors(&dir.path().join(out))
    };
    let mut expected = prune("narrow", &[]);
    let set = tiny(dir.path(), |tensors, _| tensors.values_mut().for_each(widen));
    assert_eq!(run(&dir.path().join("model")), run(Path::new(TINY)));
    assert!(prune("back", &["--set", &set, "--set", "output.dtype=f32"]) == expected);
    expected.values_mut().for_each(widen);
    assert!(prune("wide", &["--set", &set]) == expected, "the same weights are pruned");
    let verified = barber(&["verify", &dir.path().join("wide").display().to_string()]);
    assert_eq!(verified.status, 0, "{}", verified.stderr);
}

#[test]
fn norms_may_have_neither_weights_nor_biases() {
    let dir = tempfile::tempdir().unwrap();
    let opt = Path::new("tests/conformance/tiny-opt");
    let logits = |affine: bool, change: fn(&str, &mut Tensor) -> bool| {
        let config = fs::read_to_string(opt.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["layer_norm_elementwise_affine"] = affine.into();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let mut tensors = tensors(opt);
        tensors.retain(|name, tensor| !name.contains("layer_norm") || change(name, tensor));
        util::write(&dir.path().join("model.safetensors"), &tensors);
        run(dir.path())
    };
    let ones = logits(true, |name, (_, _, bytes)| {
        let value = f32::from(u8::from(name.ends_with("weight"))).to_le_bytes();
        bytes.chunks_mut(4).for_each(|b| b.copy_from_slice(&value));
        true
    });
    assert_eq!(logits(false, |_, _| false), ones);
}
