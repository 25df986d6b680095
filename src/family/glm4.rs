//! GLM-4-0414: norms before and after each part, rotary positions of half of each head in
//! interleaved pairs, gate and up in one matrix.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::{NormNames, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "glm4",
    doc: "GLM-4-0414: norms around each part, gate and up in one matrix, half of each head rotated",
    decoder,
};

/// The defaults are those of transformers' `Glm4Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let style = Style {
        kv_heads: Some(2),
        head_dim: Some(128),
        epsilon: 0.000_000_156_25,
        qkv_bias: config.boolean("attention_bias")?.unwrap_or(true),
        fused_mlp: true,
        norms: NormNames {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_self_attn_layernorm"),
            before_mlp: Some("post_attention_layernorm"),
            after_mlp: Some("post_mlp_layernorm"),
        },
        rope: rope::Style {
            max_positions: 131_072,
            partial: true,
            fraction: ("partial_rotary_factor", 0.5),
            interleaved: true,
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    style.decoder(config, |_| None)
}
