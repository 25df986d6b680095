//! Gemma 2 (arXiv 2408.00118): norms before and after each part, soft caps of scores and logits,
//! GeGLU, a sliding window in every other layer.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};
use crate::executor::ops::Activation;

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    doc: "Gemma 2: norms around each part, soft caps, GeGLU, every other layer with a window",
    decoder,
};

const ACTIVATIONS: &[(&str, Activation)] = &[
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu", Activation::Gelu),
];

/// The defaults are those of transformers' `Gemma2Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    // Left out, a cap is the published models'; null is none.
    let cap = |key, default| match config.above(key, 0.0)? {
        None if !config.has(key) => Ok(Some(default)),
        cap => Ok::<_, Error>(cap.map(|cap| cap as f32)),
    };
    let style = Style {
        kv_heads: Some(4),
        head_dim: Some(256),
        tied: true,
        sandwich: true,
        activation: ("hidden_activation", ACTIVATIONS),
        query_scale: Some(config.above("query_pre_attn_scalar", 0.0)?.unwrap_or(256.0)),
        score_cap: cap("attn_logit_softcapping", 50.0)?,
        logit_cap: cap("final_logit_softcapping", 30.0)?,
        scaled_embedding: true,
        ..Style::llama()
    };
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style { qkv_bias: biased, output_bias: biased, ..style };
    let window = config.size("sliding_window")?.or(Some(4096));
    style.decoder(config, config.windows(window, |layer| layer.is_multiple_of(2))?)
}
