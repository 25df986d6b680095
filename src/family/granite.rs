//! Granite 3 (IBM): LLaMA with factors of the embedding, the scores, the parts' outputs and the
//! logits.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    doc: "Granite 3: as LLaMA, with factors of embedding, scores, outputs and logits",
    decoder,
};

/// The defaults are those of transformers' `GraniteConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    style(config)?.decoder(config, |_| None)
}

/// The style of a configuration.
pub(super) fn style(config: &Object<'_>) -> Result<Style, Error> {
    let biased = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
    let attention_bias = biased("attention_bias")?;
    let factor = |key| Ok::<_, Error>(config.above(key, 0.0)?.unwrap_or(1.0));
    Ok(Style {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: biased("mlp_bias")?,
        score_scale: Some(factor("attention_multiplier")? as f32),
        logit_scale: factor("logits_scaling")?.recip() as f32,
        embedding_scale: factor("embedding_multiplier")? as f32,
        residual_scale: factor("residual_multiplier")?,
        ..Style::llama()
    })
}
