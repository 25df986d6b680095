//! OLMo 2 (arXiv 2501.00656): LLaMA with the norms after each part, and norms of queries and keys
//! over all heads.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::{HeadNorms, NormNames, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    doc: "OLMo 2: as LLaMA, with norms after each part, and of queries and keys",
    decoder,
};

/// The norms after each part.
pub(super) const NORMS: NormNames = NormNames {
    before_attention: None,
    after_attention: Some("post_attention_layernorm"),
    before_mlp: None,
    after_mlp: Some("post_feedforward_layernorm"),
};

/// The defaults are those of transformers' `Olmo2Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    style(config)?.decoder(config, |_| None)
}

pub(super) fn style(config: &Object<'_>) -> Result<Style, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    Ok(Style {
        epsilon: 1e-5,
        qkv_bias: biased,
        output_bias: biased,
        head_norms: HeadNorms::Together,
        norms: NORMS,
        ..Style::llama()
    })
}
