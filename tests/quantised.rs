//! Quantised checkpoints: read by dequantising, written dense, or refused by name. `tests/logits.rs`
//! compares what they compute with transformers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    evaluate::logits,
    model::Model,
};
use safetensors::Dtype;
use serde_json::{Value, json};
use util::{Tensor, barber, flat, tensors, write};

const Q: &str = "model.layers.0.self_attn.q_proj";

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures/logits").join(name)
}

/// A copy of a fixture that a test may change.
fn copied(
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value),
) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let stored = dir.path().join("stored");
    fs::create_dir(&stored).unwrap();
    fs::copy(fixture(name).join("model.safetensors"), stored.join("model.safetensors")).unwrap();
    let mut tensors = tensors(&stored);
    let config = fs::read(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut tensors, &mut config);
    write(&model.join("model.safetensors"), &tensors);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let model = model.display().to_string();
    (dir, model)
}

/// A text and a tokenizer for it, and a recipe that prunes a model with it.
fn recipe(dir: &Path, model: &str) -> String {
    let vocab: BTreeMap<String, u32> = (0..96).map(|i| (format!("w{i}"), i)).collect();
    let tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    });
    fs::write(Path::new(model).join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let text = dir.join("text.txt");
    let words: Vec<String> = (0..400_u32).map(|i| format!("w{}", (i * i + 7 * i) % 96)).collect();
    fs::write(&text, words.join(" ")).unwrap();
    let path = dir.join("recipe.toml");
    let text = text.display();
    let recipe = format!(
        "model.path = '{model}'
calibration = {{ source = '{text}', samples = 4, sequence_length = 32 }}
mask.init = 'wanda'
refine = [{{ use = 'rebuild', scope = 'layer', alpha = 0.2 }}]
evaluate = {{ perplexity = ['{text}'], sequence_length = 32, segments = 4 }}
output.path = 'out'
"
    );
    fs::write(&path, recipe).unwrap();
    path.display().to_string()
}

/// Runs a command that must succeed.
fn says(arguments: &[&str]) -> String {
    let run = barber(arguments);
    assert_eq!(run.status, 0, "{arguments:?}: {}{}", run.stdout, run.stderr);
    run.stdout
}

/// That a pruned checkpoint is the dequantised one with zeros, and that every command says so.
fn is_pruned_dense(name: &str, form: &str, dtype: &str) {
    let (dir, model) = copied(name, |_, _| ());
    let recipe = recipe(dir.path(), &model);
    let said = format!("{form}, dequantised to {dtype}");
    assert!(flat(&says(&["check", &recipe])).contains(&flat(&format!("weights {said}"))), "{said}");
    let ran = flat(&says(&["prune", &recipe]));
    assert!(ran.contains(&flat(&format!("weights {said}"))), "{ran}");

    let out = dir.path().join("out");
    let (dense, sparse) = (Reader::open(Path::new(&model)).unwrap(), tensors(&out));
    assert_eq!(dense.quantisation().unwrap().unwrap().to_string(), said);
    assert!(dense.names().eq(sparse.keys().map(String::as_str)));
    let mut zeros = 0;
    for (name, (found, shape, bytes)) in &sparse {
        let view = dense.tensor(name).unwrap();
        assert_eq!(
            (format!("{found:?}"), &view.dtype, view.shape),
            (dtype.into(), found, &**shape)
        );
        let size = found.bitsize() / 8;
        let expected = view.bytes().unwrap();
        for (found, expected) in bytes.chunks(size).zip(expected.chunks(size)) {
            let pruned = found.iter().all(|byte| *byte == 0);
            assert!(pruned || found == expected, "{name}");
            zeros += usize::from(pruned);
        }
    }
    assert!(zeros > 5_000);
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config.get("quantization_config"), None);
    assert!(config.get("hidden_size").is_some());
    let report = fs::read(out.join("barber-report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["quantisation"], *said);
    assert_eq!(report["changed_weights"], 0);
    let sizes = &report["sizes"];
    assert!(sizes["dense"]["weight_bytes"].as_u64() < sizes["output"]["weight_bytes"].as_u64());
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains(&format!("- Dense model: {said}")), "{card}");
    let page = fs::read_to_string(out.join("barber-report.html")).unwrap();
    assert!(page.contains(&format!("The dense model is {said}.")));

    let out = out.display().to_string();
    let verified = flat(&says(&["verify", &out]));
    assert!(verified.contains(&flat(&format!("({said}), bit for bit"))), "{verified}");
    says(&["reproduce", &out]);
    let inspected = flat(&says(&["inspect", &model]));
    assert!(inspected.contains(&flat(&said)) && inspected.contains(dtype), "{inspected}");
    // The report's perplexities are those of the two checkpoints.
    let text = dir.path().join("text.txt").display().to_string();
    for (dir, stage) in [(&model, "dense"), (&out, "refined")] {
        let arguments =
            ["eval", dir, "--text", &text, "--sequence-length", "32", "--segments", "4"];
        let found: Value =
            serde_json::from_str(&says(&[&arguments[..], &["--json"]].concat())).unwrap();
        let reported = &report["perplexity"][0][stage]["perplexity"];
        assert_eq!(found["perplexity"][0]["perplexity"], *reported, "{stage}");
    }

    // `convert` writes the dense checkpoint itself.
    says(&["convert", &model, "--format", "dense"]);
    let converted = tensors(&dir.path().join("model-dense"));
    assert_eq!(converted.len(), sparse.len());
    for (name, (_, _, bytes)) in &converted {
        assert_eq!(bytes, &*dense.tensor(name).unwrap().bytes().unwrap(), "{name}");
    }
}

#[test]
fn fp8_in_blocks_is_pruned() {
    is_pruned_dense("fp8-uneven", "fp8 in blocks of 20 × 28", "BF16");
}

#[test]
fn experts_in_fp8_are_pruned() {
    is_pruned_dense("fp8-moe", "fp8 in blocks of 8 × 16", "BF16");
}

#[test]
fn rows_in_int8_are_pruned() {
    is_pruned_dense("int8-rows", "compressed-tensors int-quantized", "BF16");
}

#[test]
fn packed_int8_is_pruned() {
    is_pruned_dense("int8-packed", "compressed-tensors pack-quantized", "F16");
}

#[test]
fn experts_that_are_read_again_are_dequantised_again() {
    let reader = Reader::open(&fixture("fp8-moe")).unwrap();
    let ids: Vec<u32> = (0..24).collect();
    let of = |held: Option<usize>| {
        let model = Model::new(&reader, Cpu::default()).unwrap();
        let model = match held {
            Some(bytes) => model.with_held_experts(bytes),
            None => model,
        };
        logits(&model, &Pruned::dense(), &ids).unwrap()
    };
    assert_eq!(of(Some(0)), of(None));
}

/// That a changed fixture is refused with a message before a run begins.
#[track_caller]
fn refused(
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value),
    messages: &[&str],
) {
    refused_by(&["check", "prune"], name, change, messages);
}

/// That commands refuse a changed fixture with a message.
#[track_caller]
fn refused_by(
    commands: &[&str],
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value),
    messages: &[&str],
) {
    let (dir, model) = copied(name, change);
    let recipe = recipe(dir.path(), &model);
    for command in commands {
        let run = barber(&[*command, &recipe]);
        let said = flat(&run.stderr);
        assert_eq!(run.status, 1, "{}{said}", run.stdout);
        for message in messages {
            assert!(said.contains(message), "{message}: {said}");
        }
        assert!(!said.contains("panicked") && !dir.path().join("out").exists(), "{said}");
    }
}

/// A tensor of a file.
fn part<'a>(tensors: &'a mut BTreeMap<String, Tensor>, name: &str) -> &'a mut Tensor {
    tensors.get_mut(&format!("{Q}.{name}")).unwrap()
}

#[test]
fn scales_must_fit() {
    let scales = format!("{Q}.weight_scale_inv");
    let missing = format!("there is no `{scales}`");
    refused("fp8", |tensors, _| drop(tensors.remove(&scales)), &[&missing, "model.safetensors"]);
    refused(
        "fp8",
        |tensors, _| part(tensors, "weight_scale_inv").1.reverse(),
        &["has shape [4, 2], which does not fit a matrix of shape [32, 32] in blocks of 16 8"],
    );
    refused(
        "fp8",
        |_, config| config["quantization_config"]["weight_block_size"] = json!([8, 8]),
        &["has shape [2, 6], which does not fit a matrix of shape [32, 48] in blocks of 8 8"],
    );
    refused(
        "fp8",
        |tensors, _| {
            let (dtype, shape, bytes) = part(tensors, "weight_scale_inv");
            (*dtype, shape[1]) = (Dtype::U8, 4 * shape[1]);
            assert_eq!(bytes.len(), shape.iter().product::<usize>());
        },
        &["`model.layers.0.self_attn.q_proj.weight_scale_inv` is stored as U8"],
    );
    refused(
        "fp8",
        |tensors, _| {
            let weight = (Dtype::BF16, vec![32, 32], vec![0; 2048]);
            tensors.insert(format!("{Q}.weight"), weight);
        },
        &["there are scales of it", "but its values are not in E4M3 or int8"],
    );
    refused(
        "fp8",
        |tensors, _| drop(tensors.remove(&format!("{Q}.weight"))),
        &["there are scales of it", "but no weights"],
    );
}

#[test]
fn weights_must_be_finite() {
    let nan = "tensor `model.layers.0.self_attn.q_proj.weight` has NaN at [1, 3]";
    let code = |tensors: &mut BTreeMap<String, Tensor>, _: &mut Value| {
        part(tensors, "weight").2[35] = 0xff;
    };
    refused_by(&["prune"], "fp8", code, &[nan]);
    for scale in [f32::NAN, f32::INFINITY] {
        let change = |tensors: &mut BTreeMap<String, Tensor>, _: &mut Value| {
            part(tensors, "weight_scale_inv").2[4..8].copy_from_slice(&scale.to_le_bytes());
        };
        let messages = ["tensor `model.layers.0.self_attn.q_proj.weight` has", "at [0, 8]"];
        refused_by(&["prune"], "fp8", change, &messages);
    }
}

#[test]
fn a_block_of_zero_scale_is_zero() {
    let (_dir, model) =
        copied("fp8", |tensors, _| part(tensors, "weight_scale_inv").2[..4].fill(0));
    let reader = Reader::open(Path::new(&model)).unwrap();
    let values = reader.read(&format!("{Q}.weight"), &[32, 32]).unwrap();
    for (i, value) in values.iter().enumerate() {
        let first = i / 32 < 16 && i % 32 < 8;
        assert!(!first || *value == 0.0, "{i}");
    }
    assert!(values.iter().filter(|value| **value == 0.0).count() < 200);
}

#[test]
fn packed_codes_must_fit_their_shape() {
    let down = "model.layers.0.mlp.down_proj";
    let shape = format!("{down}.weight_shape");
    let fits = format!("of shape [32, 12], which does not fit `{shape}`");
    for sizes in [[32_i64, 44], [31, 46], [-1, 46], [32, i64::MAX]] {
        let change = |tensors: &mut BTreeMap<String, Tensor>, _: &mut Value| {
            let bytes = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
            tensors.get_mut(&shape).unwrap().2 = bytes;
        };
        refused("int8-packed", change, &[&fits]);
    }
    refused(
        "int8-packed",
        |tensors, _| drop(tensors.remove(&shape)),
        &[&format!("there is no `{shape}`")],
    );
    refused(
        "int8-packed",
        |tensors, _| {
            let weight = (Dtype::F16, vec![32, 46], vec![0; 2 * 32 * 46]);
            tensors.insert(format!("{down}.weight"), weight);
        },
        &[&format!("there is `{down}.weight_packed`, too")],
    );
}

#[test]
fn stacked_experts_must_not_be_quantised() {
    let said = "it has the matrices of several experts, and Barber reads quantised matrices one by \
                one; give the model that it was quantised from";
    // As transformers has them in memory.
    let stack = "model.layers.0.mlp.experts.down_proj";
    let change = |tensors: &mut BTreeMap<String, Tensor>, _: &mut Value| {
        for (part, of_stack) in [("weight", ""), ("weight_scale_inv", "_scale_inv")] {
            let names: Vec<String> = (0..4)
                .map(|i| format!("model.layers.0.mlp.experts.{i}.down_proj.{part}"))
                .collect();
            let own: Vec<Tensor> = names.iter().map(|name| tensors.remove(name).unwrap()).collect();
            let bytes = own.iter().flat_map(|(_, _, bytes)| bytes.clone()).collect();
            let stacked = (own[0].0, [&[4], &own[0].1[..]].concat(), bytes);
            tensors.insert(format!("{stack}{of_stack}"), stacked);
        }
    };
    refused("fp8-moe", change, &[&format!("`{stack}`"), said]);
    // As Granite's are stored.
    let stack = "model.layers.0.block_sparse_moe.input_linear.weight";
    let change = |tensors: &mut BTreeMap<String, Tensor>, config: &mut Value| {
        let (dtype, _, bytes) = tensors.get_mut(stack).unwrap();
        (*dtype, *bytes) = (Dtype::F8_E4M3, bytes.iter().copied().step_by(2).collect());
        config["quantization_config"] = json!({ "quant_method": "fp8" });
    };
    refused("granitemoe", change, &[&format!("`{stack}`"), said]);
}

#[test]
fn codes_are_symmetric_and_in_order() {
    let zero_points = |byte: u8| {
        move |tensors: &mut BTreeMap<String, Tensor>, _: &mut Value| {
            let zeros = (Dtype::I8, vec![32, 1], vec![byte; 32]);
            tensors.insert(format!("{Q}.weight_zero_point"), zeros);
        }
    };
    refused("int8-rows", zero_points(1), &["its zero points are not zero"]);
    let (_dir, model) = copied("int8-rows", zero_points(0));
    assert_eq!(barber(&["inspect", &model]).status, 0);
    refused(
        "int8-groups",
        |tensors, _| {
            let order = (Dtype::I32, vec![32], vec![0; 128]);
            tensors.insert(format!("{Q}.weight_g_idx"), order);
        },
        &["its groups are not consecutive", "give the model that it was quantised from"],
    );
}

#[test]
fn other_quantisations_are_refused_by_name() {
    let original = "give the model that it was quantised from";
    for (section, name, todo) in [
        (json!({ "quant_method": "gptq", "bits": 4 }), "gptq", original),
        (json!({ "quant_method": "awq", "bits": 4 }), "awq", original),
        (json!({ "quant_method": "bitsandbytes" }), "bitsandbytes", "dequantize()"),
        (json!({ "quant_method": "mxfp4" }), "mxfp4", "Mxfp4Config(dequantize=True)"),
    ] {
        let change = |_: &mut BTreeMap<String, Tensor>, config: &mut Value| {
            config["quantization_config"] = section.clone();
        };
        let said = format!("are quantised by {name}, which Barber does not read");
        refused("fp8", change, &[&said, todo]);
        let (dir, model) = copied("fp8", change);
        for arguments in [
            &["eval", &model, "--text", "no text"][..],
            &["convert", &model, "--format", "dense"],
            &["init", &model],
        ] {
            let mut command = util::command(Path::new(env!("CARGO_BIN_EXE_barber")));
            let run = util::output(command.args(arguments).current_dir(&dir));
            assert!(run.status == 1 && flat(&run.stderr).contains(&said), "{}", run.stderr);
        }
        // Its tensors can be seen.
        let seen = says(&["inspect", &model, "--tensors"]);
        assert!(seen.contains("F8_E4M3") && !seen.contains("dequantised"), "{seen}");
    }
}
