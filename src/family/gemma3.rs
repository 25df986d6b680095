//! Gemma 3 (arXiv 2503.19786): as Gemma 2, with norms of queries and keys in place of soft caps,
//! and layers with a window that have a position code of their own.

use super::{
    Activation, Decoder, Family, NormKind,
    config::{Error, Object},
    gemma2::{NORMS, score_scale, window},
    rms::{HeadNorms, LayerAttention, Style},
    rope, text_model,
};

pub(super) const TEXT: Family = Family {
    model_type: "gemma3_text",
    doc: "Gemma 3 without images: norms around each part and of queries and keys, GeGLU, windows",
    decoder: text,
};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3",
    doc: "Gemma 3 with images: the text model is pruned, the vision tower copied",
    // transformers caps logits only without images.
    decoder: |config| Ok(Decoder { logit_cap: None, ..text_model(config, text)? }),
};

/// The defaults are those of transformers' `Gemma3TextConfig`, which published models rely on.
fn text(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        vocab_size: Some(262_208),
        heads: Some(8),
        kv_heads: Some(4),
        head_dim: Some(256),
        tied: true,
        qkv_bias: biased,
        output_bias: biased,
        head_norms: HeadNorms::Each,
        norms: NORMS,
        norm_kind: NormKind::RmsOnePlus,
        activation: ("hidden_activation", Activation::GeluTanh),
        score_scale: Some(score_scale(config)?),
        logit_cap: config.above("final_logit_softcapping", 0.0)?.map(|cap| cap as f32),
        scaled_embedding: true,
        rope: rope::Style {
            max_positions: 131_072,
            theta: ("rope_theta", 1_000_000.0),
            sliding_theta: Some((Some("rope_local_base_freq"), 10_000.0)),
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(6);
    let window = config.windows(window(config)?, |layer| !(layer + 1).is_multiple_of(pattern))?;
    style.decoder(config, |layer| {
        let window = window(layer);
        LayerAttention { window, rope: Some(usize::from(window.is_some())) }
    })
}
