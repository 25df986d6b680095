//! `fp8`: codes of E4M3, with a scale for each block of a matrix (DeepSeek-V3, arXiv 2412.19437,
//! section 3.3) or one for a matrix, as transformers' `FineGrainedFP8Config` has them.

use serde_json::Value;

use super::{Form, Method, Names, block_size};

pub(super) static FP8: Method = Method { name: "fp8", read, names: &NAMES };

static NAMES: Names = Names {
    packed: None,
    scales: "weight_scale_inv",
    zero_points: None,
    others: &["activation_scale", "input_scale", "k_scale", "v_scale"],
};

fn read(section: &Value) -> Result<Option<Form>, String> {
    for (key, read, what) in [("fmt", "e4m3", "codes"), ("expert_dtype", "fp8", "experts")] {
        match section.get(key) {
            Some(value) if !value.is_null() && value != read => {
                return Err(format!("fp8, with {what} of {value}"));
            }
            _ => {}
        }
    }
    match section.get("weight_block_size").filter(|value| !value.is_null()) {
        None => Ok(Some(Form { words: "fp8".into(), block: None })),
        Some(value) => {
            let [rows, columns] =
                block_size(value).map_err(|wrong| format!("fp8, with {wrong}"))?;
            let words = format!("fp8 in blocks of {rows} × {columns}");
            Ok(Some(Form { words, block: Some([rows, columns]) }))
        }
    }
}
