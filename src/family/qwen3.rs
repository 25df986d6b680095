//! Qwen 3 (arXiv 2505.09388): LLaMA with norms of queries and keys.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    doc: "Qwen 3: as LLaMA, with norms of queries and keys",
    decoder,
};

/// The defaults are those of transformers' `Qwen3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let sliding = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = config.size("sliding_window")?.or(Some(4096)).filter(|_| sliding);
    // Those below this layer see everything.
    let first = config.number("max_window_layers")?.unwrap_or(28.0);
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        kv_heads: Some(32),
        head_dim: Some(128),
        qkv_bias: biased,
        output_bias: biased,
        head_norms: true,
        ..Style::llama()
    };
    style.decoder(config, config.windows(window, |layer| layer as f64 >= first)?)
}
