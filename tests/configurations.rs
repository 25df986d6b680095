//! The keys of a `config.json` against transformers: for each configuration of each family the same
//! logits. `tests/fixtures/make-configurations.py` recorded them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    evaluate::logits,
    family::{FAMILIES, decoder},
    model::Model,
};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Number of tokens of the sequence.
const LENGTH: usize = 24;

/// The configurations.
#[derive(Deserialize)]
struct Cases {
    /// Each family's base.
    base: BTreeMap<String, Map<String, Value>>,
    cases: Vec<Case>,
}

/// A configuration, and what transformers makes of it.
#[derive(Deserialize)]
struct Case {
    name: String,
    family: String,
    /// Values other than the base's.
    change: Map<String, Value>,
    /// Keys of the base that are left out.
    removed: Vec<String>,
    /// The logits of the last token.
    logits: Vec<f32>,
}

/// Cases that Barber does not compute, with the key that its error names.
const REFUSED: &[(&str, &str)] = &[
    ("1 of 3 groups", "n_group"),
    ("bidirectional", "use_bidirectional_attention"),
    ("by type", "rope_parameters.full_attention"),
    ("by type, without theta", "rope_parameters.full_attention"),
    ("clip_qkv", "clip_qkv"),
    ("epsilon large", "rms_norm_eps"),
    ("layer_types ['full_attention', 'sliding_attention']", "layer_types"),
    ("layer_types ['sliding_attention', 'full_attention']", "layer_types"),
    ("layer_types full, window null", "sliding_window"),
    ("longrope wrong length", "rope_scaling.short_factor"),
    ("nested", "rope_parameters.full_attention"),
    ("partial 0.0", "partial_rotary_factor"),
    ("partial 0.0 inside", "rope_parameters.partial_rotary_factor"),
    ("per_layer_config", "per_layer_config"),
    ("sliding_window zero", "sliding_window"),
    ("swiglu_alpha 1.5", "swiglu_alpha"),
];

/// Every element's value: a hash of its tensor's name and its place.
fn element(name: &str, place: u64) -> f32 {
    let seed = name.bytes().fold(14_695_981_039_346_656_037_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(1_099_511_628_211)
    });
    let mut x = seed.wrapping_add((place + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^= x >> 31;
    let norm = name.contains("norm") && name.ends_with("weight");
    (x >> 40) as f32 / (1 << 24) as f32 - 0.5 + f32::from(u8::from(norm))
}

/// The logits of the last token, or what is wrong.
fn run(dir: &Path, config: &Value) -> Result<Vec<f32>, String> {
    let decoder = decoder(config).map_err(|e| e.to_string())?;
    let tensors = decoder.tensors().map(|(name, shape)| {
        let count = shape.iter().product::<usize>() as u64;
        let bytes = (0..count).flat_map(|place| element(name, place).to_le_bytes()).collect();
        (name.to_owned(), (Dtype::F32, shape, bytes))
    });
    util::write(&dir.join("model.safetensors"), &tensors.collect::<BTreeMap<_, _>>());
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let reader = Reader::open(dir).map_err(|e| e.to_string())?;
    let model = Model::new(&reader, Cpu::default()).map_err(|e| e.to_string())?;
    let ids: Vec<u32> =
        (0..LENGTH).map(|i| ((i * 7 + i * i + 3) % decoder.vocab_size) as u32).collect();
    let found = logits(&model, &Pruned::dense(), &ids).map_err(|e| e.to_string())?;
    Ok(found[found.len() - decoder.vocab_size..].to_vec())
}

#[test]
fn every_configuration_is_what_transformers_makes_of_it() {
    let file = fs::read("tests/fixtures/configurations.json").unwrap();
    let Cases { base, cases } = serde_json::from_slice(&file).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut wrong, mut agree) = (Vec::new(), BTreeMap::<_, usize>::new());
    for Case { name, family, change, removed, logits } in &cases {
        let mut config = base[family].clone();
        config.insert("model_type".into(), family.as_str().into());
        config.extend(change.clone());
        removed.iter().for_each(|key| drop(config.remove(key)));
        match run(dir.path(), &config.into()) {
            Ok(found) => {
                let mut pairs = found.iter().zip(logits);
                if found.len() == logits.len() && pairs.all(|(a, b)| (a - b).abs() < 1e-4) {
                    *agree.entry(family.as_str()).or_default() += 1;
                } else {
                    wrong.push(format!("{name}: other logits: {found:?}"));
                }
            }
            Err(problem) => {
                // The text model beside a vision tower.
                let problem = problem.replace("`text_config.", "`");
                let refused = REFUSED.iter().any(|(case, key)| {
                    name.ends_with(&format!(": {case}")) && problem.contains(&format!("`{key}`"))
                });
                if !refused {
                    wrong.push(format!("{name}: {problem}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert!(agree.values().all(|cases| *cases > 25), "{agree:?}");
    let families: BTreeSet<_> = FAMILIES.iter().map(|family| family.model_type).collect();
    assert_eq!(agree.into_keys().collect::<BTreeSet<_>>(), families);
}
