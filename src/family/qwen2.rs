//! Qwen 2 and 2.5 (arXiv 2407.10671): LLaMA with biases of query, key and value.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    doc: "Qwen 2 and 2.5: as LLaMA, with biases of query, key and value",
    decoder,
};

/// The defaults are those of transformers' `Qwen2Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let style =
        Style { kv_heads: Some(32), qkv_bias: true, ..Style::llama().with_positions(32_768) };
    style.decoder(config, windows(config)?)
}

/// The sliding window of each layer; the first layers have none.
pub(super) fn windows(config: &Object<'_>) -> Result<impl Fn(usize) -> Option<usize>, Error> {
    let sliding = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = config.size_or("sliding_window", Some(4096))?.filter(|_| sliding);
    let first = config.number("max_window_layers")?.unwrap_or(28.0);
    config.windows(window, move |layer| layer as f64 >= first)
}
