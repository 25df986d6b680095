//! The section `quantization_config` of `config.json`, which describes a compressed checkpoint to
//! its readers.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Format;

/// The key of `config.json`.
pub(in crate::checkpoint) const KEY: &str = "quantization_config";

/// The section for these compressed modules; `sparsity` is the fraction of all weights that is
/// pruned. All compressed modules are listed, as others of the same kind may be dense.
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

/// The compressed format that a `config.json` declares; `None` if it declares none.
pub(in crate::checkpoint) fn declared(config: &Value) -> Option<Format> {
    let format = config.get(KEY)?.get("sparsity_config")?.get("format")?;
    Format::deserialize(format).ok().filter(|format| !format.is_dense())
}
