//! How a GPU computes matrix products.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The precision of a GPU's matrix products. Sums are of f32 in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Products of f32, without tensor cores.
    #[default]
    F32,
    /// On tensor cores: factors are rounded to TF32, with 10 bits after the point.
    Tf32,
    /// On tensor cores: each factor is the sum of two bf16 numbers, with 16 bits together. Three products
    /// of these take the place of one.
    Bf16x3,
}
