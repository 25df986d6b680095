//! What `config.json` says of a compressed checkpoint: its `quantization_config`, after which its
//! readers know what to expect.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Format;

/// The key of `config.json`.
pub(in crate::checkpoint) const KEY: &str = "quantization_config";

/// The section for these compressed modules, where `sparsity` is the fraction of all weights that is
/// pruned. Every module is named: what is not may be dense, whatever its kind.
pub(in crate::checkpoint) fn section(format: Format, modules: &[&str], sparsity: f64) -> Value {
    let structure = format.pattern.map_or("unstructured".into(), |pattern| pattern.to_string());
    json!({
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": format,
            "global_sparsity": sparsity,
            "sparsity_structure": structure,
            "targets": modules,
            "ignore": [],
        },
    })
}

/// The format in which a `config.json` says that matrices are compressed, if it says so.
pub(in crate::checkpoint) fn declared(config: &Value) -> Option<Format> {
    let format = config.get(KEY)?.get("sparsity_config")?.get("format")?;
    Format::deserialize(format).ok().filter(|format| !format.is_dense())
}
