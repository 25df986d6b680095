//! Seed-OSS (ByteDance): LLaMA with biases of query, key and value.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "seed_oss",
    doc: "Seed-OSS: as LLaMA, with biases of query, key and value",
    decoder,
};

/// The defaults are those of transformers' `SeedOssConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = |key, default| Ok::<_, Error>(config.boolean(key)?.unwrap_or(default));
    let style = Style {
        kv_heads: Some(8),
        head_dim: Some(128),
        qkv_bias: biased("attention_bias", true)?,
        output_bias: biased("attention_out_bias", false)?,
        mlp_bias: biased("mlp_bias", false)?,
        ..Style::llama().with_positions(524_288)
    };
    style.decoder(config, |_| None)
}
