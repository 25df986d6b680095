//! Qwen 3 (arXiv 2505.09388): LLaMA with norms of queries and keys.

use super::{
    Decoder, Family,
    config::{Error, Object},
    qwen2::windows,
    rms::{HeadNorms, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    doc: "Qwen 3: as LLaMA, with norms of queries and keys",
    decoder,
};

/// The defaults are those of transformers' `Qwen3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        kv_heads: Some(32),
        head_dim: Some(128),
        qkv_bias: biased,
        output_bias: biased,
        head_norms: HeadNorms::Each,
        ..Style::llama().with_positions(32_768)
    };
    style.decoder(config, windows(config)?)
}
