//! Gemma 2 (arXiv 2408.00118): norms before and after each part, soft caps of scores and logits,
//! GeGLU, a sliding window in every other layer.

use super::{
    Activation, Decoder, Family, NormKind,
    config::{Error, Object},
    rms::{NormNames, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    doc: "Gemma 2: norms around each part, soft caps, GeGLU, every other layer with a window",
    decoder,
};

/// The norms around each part.
pub(super) const NORMS: NormNames = NormNames {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_attention_layernorm"),
    before_mlp: Some("pre_feedforward_layernorm"),
    after_mlp: Some("post_feedforward_layernorm"),
};

/// The factor of the scores: 1 / √`query_pre_attn_scalar`.
pub(super) fn score_scale(config: &Object<'_>) -> Result<f32, Error> {
    let scalar = config.above("query_pre_attn_scalar", 0.0)?.unwrap_or(256.0);
    Ok((scalar as f32).sqrt().recip())
}

/// The sliding window of the layers that have one. Attention is causal.
pub(super) fn window(config: &Object<'_>) -> Result<Option<usize>, Error> {
    if config.boolean("use_bidirectional_attention")?.unwrap_or(false) {
        let problem = "bidirectional attention is not supported";
        return Err(config.invalid("use_bidirectional_attention", true, problem));
    }
    match config.size_or("sliding_window", Some(4096))? {
        None => Err(config.missing("sliding_window")),
        window => Ok(window),
    }
}

/// The defaults are those of transformers' `Gemma2Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    // A missing cap has the published models' value; null means no cap.
    let cap = |key, default| match config.above(key, 0.0)? {
        None if !config.has(key) => Ok(Some(default)),
        cap => Ok::<_, Error>(cap.map(|cap| cap as f32)),
    };
    let style = Style {
        kv_heads: Some(4),
        head_dim: Some(256),
        tied: true,
        norms: NORMS,
        norm_kind: NormKind::RmsOnePlus,
        activation: ("hidden_activation", Activation::GeluTanh),
        score_scale: Some(score_scale(config)?),
        score_cap: cap("attn_logit_softcapping", 50.0)?,
        logit_cap: cap("final_logit_softcapping", 30.0)?,
        scaled_embedding: true,
        ..Style::llama().with_positions(8192)
    };
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style { qkv_bias: biased, output_bias: biased, ..style };
    style.decoder(config, config.windows(window(config)?, |layer| layer.is_multiple_of(2))?)
}
