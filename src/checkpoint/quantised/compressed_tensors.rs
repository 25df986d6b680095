//! `compressed-tensors`: codes of int8 or E4M3 with scales of matrices, rows, groups of a row's
//! weights, or blocks, in the formats of
//! [compressed-tensors](https://github.com/vllm-project/compressed-tensors) that have one code in
//! eight bits.

use serde_json::Value;

use super::{Form, Method, Names, block_size};

pub(super) const NAME: &str = "compressed-tensors";

pub(super) static COMPRESSED_TENSORS: Method = Method { name: NAME, read, names: &NAMES };

static NAMES: Names = Names {
    packed: Some("weight_packed"),
    scales: "weight_scale",
    zero_points: Some("weight_zero_point"),
    others: &[
        "weight_shape",
        "input_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "k_scale",
        "v_scale",
        "q_zero_point",
        "k_zero_point",
        "v_zero_point",
    ],
};

/// The formats that are read.
const FORMATS: [&str; 4] =
    ["int-quantized", "float-quantized", "naive-quantized", "pack-quantized"];
/// The format of a model whose groups of modules have formats of their own.
const MIXED: &str = "mixed-precision";

fn read(section: &Value) -> Result<Option<Form>, String> {
    let groups = section.get("config_groups").and_then(Value::as_object);
    let groups = || groups.into_iter().flatten().map(|(_, group)| group);
    let quantised = || groups().filter(|group| group.get("weights").is_some_and(Value::is_object));
    if quantised().next().is_none() {
        return Ok(None);
    }
    let text = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).map(str::to_owned);
    let format = text(section, "format").unwrap_or_default();
    let words = format!("{NAME} {}", format.escape_debug());
    let formats = quantised().map(|group| text(group, "format").unwrap_or_else(|| format.clone()));
    if let Some(unread) = formats.into_iter().find(|format| !FORMATS.contains(&&**format)) {
        return Err(format!("{NAME} {}", unread.escape_debug()));
    }
    if format != MIXED && !FORMATS.contains(&&*format) {
        return Err(words);
    }
    if let Some(status) = section.get("quantization_status").filter(|of| *of != "compressed") {
        return Err(format!("{words}, with the status {status}"));
    }
    let sparse = section.get("sparsity_config").and_then(|of| text(of, "format"));
    if let Some(sparse) = sparse.filter(|format| format != "dense") {
        return Err(format!("{words}, with zeros stored as {}", sparse.escape_debug()));
    }
    let mut block = None;
    for weights in quantised().filter_map(|group| group.get("weights")) {
        match weights.get("num_bits").and_then(Value::as_u64) {
            Some(8) => {}
            bits => {
                let bits = bits.map_or("an unknown number of".into(), |bits| bits.to_string());
                return Err(format!("{words}, with weights of {bits} bits"));
            }
        }
        if weights.get("symmetric") == Some(&Value::Bool(false)) {
            return Err(format!("{words}, with asymmetric weights"));
        }
        if let Some(value) = weights.get("block_structure").filter(|value| !value.is_null()) {
            let size = block_size(value).map_err(|wrong| format!("{words}, with {wrong}"))?;
            if block.replace(size).is_some_and(|other| other != size) {
                return Err(format!("{words}, with blocks of several sizes"));
            }
        }
    }
    Ok(Some(Form { words, block }))
}
