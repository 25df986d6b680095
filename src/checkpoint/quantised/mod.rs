//! Quantised checkpoints, whose matrices are dequantised when they are read: one file per method of
//! quantisation. A matrix `M.weight` is stored as codes of eight bits and as scales, one for each
//! block of the matrix; a weight is the value of its code times the scale of its block, computed in
//! f32 and rounded to the format that `config.json` gives for the model's weights.

mod codes;
mod compressed_tensors;
mod fp8;
mod matrix;
mod scales;

use std::fmt;

use serde_json::{Map, Value};

pub(super) use self::{
    codes::Codes,
    matrix::{Matrix, Stored},
    scales::{Scale, block},
};
use super::{Dtype, layout};

/// The quantisation of a checkpoint whose weights are dequantised when they are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// The method and its form.
    words: String,
    /// The format that weights are rounded to.
    pub(super) dtype: Dtype,
    /// Rows and columns of a block with one scale, if `config.json` gives them.
    pub(super) block: Option<[usize; 2]>,
    pub(super) names: &'static Names,
}

impl fmt::Display for Quantisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, dequantised to {}", self.words, self.dtype.name())
    }
}

/// The names of a quantised module's tensors, to follow the module's name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// Codes of eight bits that are packed in integers of 32 bits.
    pub(super) packed: Option<&'static str>,
    /// Scales of the weight.
    pub(super) scales: &'static str,
    /// Zero points of the weight, which must be zero.
    pub(super) zero_points: Option<&'static str>,
    /// Tensors that only the quantised model needs.
    pub(super) others: &'static [&'static str],
}

/// A quantisation that is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unread {
    /// The method and its form, or what is wrong with the section of `config.json`.
    pub(super) what: String,
    /// Instructions for the user.
    pub(super) todo: &'static str,
}

/// What a section of `config.json` says of the quantisation.
struct Form {
    /// The method and its form in words.
    words: String,
    /// Rows and columns of a block with one scale.
    block: Option<[usize; 2]>,
}

/// A method of quantisation.
struct Method {
    /// The method's name in `config.json`.
    name: &'static str,
    /// Reads the section of `config.json`; `None` if the section quantises nothing. The error is a
    /// form that is not read, or what is wrong with the section.
    read: fn(&Value) -> Result<Option<Form>, String>,
    names: &'static Names,
}

/// Every method that is read.
static METHODS: &[&Method] = &[&fp8::FP8, &compressed_tensors::COMPRESSED_TENSORS];

/// What to do about a method that is not read.
const ORIGINAL: &str = "give the model that it was quantised from, which its card names";
/// The same for methods whose models transformers writes dense.
static WRITTEN_DENSE: &[(&str, &str)] = &[
    (
        "mxfp4",
        "load it in transformers with `quantization_config=Mxfp4Config(dequantize=True)`, save it \
         with `save_pretrained`, and give the result",
    ),
    (
        "bitsandbytes",
        "give the model that it was quantised from, or load it in transformers, call `dequantize()` \
         on the model, save it with `save_pretrained`, and give the result",
    ),
];

/// The keys of `config.json` that describe a quantisation, and those that hold such a key for a
/// part of the model.
const KEYS: [&str; 2] = [layout::KEY, "compression_config"];
const PARTS: [&str; 1] = ["text_config"];

/// The section of `config.json` that describes a quantisation.
fn section(config: &Value) -> Option<&Value> {
    let parts = PARTS.iter().filter_map(|part| config.get(part));
    let of = |config| KEYS.iter().find_map(|key| Value::get(config, key));
    [config].into_iter().chain(parts).find_map(of).filter(|section| !section.is_null())
}

/// Removes the description of a quantisation from a `config.json`.
pub(super) fn remove_section(config: &mut Map<String, Value>) {
    KEYS.iter().for_each(|key| drop(config.shift_remove(*key)));
    for part in PARTS {
        if let Some(Value::Object(part)) = config.get_mut(part) {
            KEYS.iter().for_each(|key| drop(part.shift_remove(*key)));
        }
    }
}

/// The quantisation that a `config.json` declares; `None` if it declares none.
pub(super) fn declared(config: &Value) -> Result<Option<Quantisation>, Unread> {
    let Some(section) = section(config) else { return Ok(None) };
    let name = match section.get("quant_method").and_then(Value::as_str) {
        Some(name) => name,
        // As transformers takes them.
        None if section.get("config_groups").is_some() => compressed_tensors::NAME,
        None if ["load_in_4bit", "load_in_8bit"].iter().any(|key| section.get(key).is_some()) => {
            "bitsandbytes"
        }
        None => "an unnamed method",
    };
    let Some(method) = METHODS.iter().find(|method| method.name == name) else {
        let todo = WRITTEN_DENSE.iter().find(|(of, _)| *of == name).map(|(_, todo)| *todo);
        let what = name.escape_debug().to_string();
        return Err(Unread { what, todo: todo.unwrap_or(ORIGINAL) });
    };
    match (method.read)(section) {
        Ok(None) => Ok(None),
        Ok(Some(Form { words, block })) => Ok(Some(Quantisation {
            words,
            dtype: weight_dtype(config),
            block,
            names: method.names,
        })),
        Err(what) => Err(Unread { what, todo: ORIGINAL }),
    }
}

/// The format of the model's weights; bf16 if `config.json` gives none that Barber reads.
pub(crate) fn weight_dtype(config: &Value) -> Dtype {
    let parts = PARTS.iter().filter_map(|part| config.get(part));
    let name = |of: &Value| {
        let name = ["dtype", "torch_dtype"].iter().find_map(|key| of.get(key)?.as_str());
        Dtype::named(name?)
    };
    [config].into_iter().chain(parts).find_map(name).unwrap_or(Dtype::Bf16)
}

/// Rows and columns of a block; the error says what is wrong.
fn block_size(value: &Value) -> Result<[usize; 2], String> {
    let sizes = || {
        let [rows, columns] = &value.as_array()?[..] else { return None };
        let size = |of: &Value| usize::try_from(of.as_u64()?).ok().filter(|size| *size > 0);
        Some([size(rows)?, size(columns)?])
    };
    sizes().ok_or_else(|| format!("blocks of {value}, not of two positive sizes"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(section: Value) -> Result<Option<String>, String> {
        let of = declared(&json!({ "dtype": "float16", "quantization_config": section }));
        of.map(|of| of.map(|of| of.to_string())).map_err(|unread| {
            assert!(unread.todo.contains("give"));
            unread.what
        })
    }

    fn one_group(format: &str, weights: Value) -> Value {
        json!({
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } },
        })
    }

    #[test]
    fn methods_that_are_read_are_described() {
        let fp8 = |block: Value| json!({ "quant_method": "fp8", "weight_block_size": block });
        let said = |form: &str| Ok(Some(format!("{form}, dequantised to F16")));
        assert_eq!(found(fp8(json!([128, 128]))), said("fp8 in blocks of 128 × 128"));
        assert_eq!(found(fp8(Value::Null)), said("fp8"));
        let int = one_group("int-quantized", json!({ "num_bits": 8, "type": "int" }));
        assert_eq!(found(int.clone()), said("compressed-tensors int-quantized"));
        let mut unnamed = int.clone();
        unnamed.as_object_mut().unwrap().remove("quant_method");
        assert_eq!(found(unnamed), found(int));
        // Barber's own compressed layouts quantise nothing.
        let sparse = json!({
            "quant_method": "compressed-tensors",
            "sparsity_config": { "format": "sparse-bitmask" },
        });
        assert_eq!(found(sparse), Ok(None));
        assert_eq!(found(Value::Null), Ok(None));
        assert_eq!(declared(&json!({})), Ok(None));
    }

    #[test]
    fn other_methods_are_named() {
        let method = |name: &str| found(json!({ "quant_method": name }));
        for name in ["gptq", "awq", "bitsandbytes", "mxfp4", "fbgemm_fp8", "modelopt"] {
            assert_eq!(method(name), Err(name.to_owned()));
        }
        assert_eq!(found(json!({ "load_in_4bit": true })), Err("bitsandbytes".into()));
        assert_eq!(method("a\nb"), Err("a\\nb".into()));
        let refused = |section: Value| found(section).unwrap_err();
        assert_eq!(refused(json!(3)), "an unnamed method");
        let four = one_group("pack-quantized", json!({ "num_bits": 4, "type": "int" }));
        assert_eq!(refused(four), "compressed-tensors pack-quantized, with weights of 4 bits");
        let nvfp4 = one_group("nvfp4-pack-quantized", json!({ "num_bits": 4, "type": "float" }));
        assert_eq!(refused(nvfp4), "compressed-tensors nvfp4-pack-quantized");
        let shifted =
            one_group("int-quantized", json!({ "num_bits": 8, "type": "int", "symmetric": false }));
        assert!(refused(shifted).ends_with("with asymmetric weights"));
        let mut fake = one_group("int-quantized", json!({ "num_bits": 8 }));
        fake["quantization_status"] = json!("frozen");
        assert_eq!(refused(fake), "compressed-tensors int-quantized, with the status \"frozen\"");
        let mut sparse = one_group("float-quantized", json!({ "num_bits": 8, "type": "float" }));
        sparse["sparsity_config"] = json!({ "format": "sparse-24-bitmask" });
        assert!(refused(sparse).ends_with("with zeros stored as sparse-24-bitmask"));
        let fp8 = |key: &str, value: Value| {
            let mut section = json!({ "quant_method": "fp8" });
            section[key] = value;
            refused(section)
        };
        assert!(fp8("weight_block_size", json!([0, 128])).contains("[0,128]"));
        assert!(fp8("weight_block_size", json!("128")).contains("two positive sizes"));
        assert_eq!(fp8("expert_dtype", json!("fp4")), "fp8, with experts of \"fp4\"");
        assert_eq!(fp8("fmt", json!("e5m2")), "fp8, with codes of \"e5m2\"");
    }

    #[test]
    fn the_section_is_found_and_removed_wherever_it_is() {
        let fp8 = json!({ "quant_method": "fp8" });
        for mut config in [
            json!({ "quantization_config": fp8 }),
            json!({ "compression_config": fp8 }),
            json!({ "text_config": { "quantization_config": fp8, "dtype": "float32" } }),
        ] {
            let of = declared(&config).unwrap().unwrap();
            let expected =
                if config.get("text_config").is_some() { Dtype::F32 } else { Dtype::Bf16 };
            assert_eq!(of.dtype, expected);
            remove_section(config.as_object_mut().unwrap());
            assert_eq!(declared(&config), Ok(None));
        }
    }
}
