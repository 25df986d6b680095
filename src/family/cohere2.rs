//! Cohere's Command R7B: attention and MLP beside each other, layer norms without biases, layers
//! with a window and rotary positions, the others without positions.

use super::{
    Decoder, Family, NormKind,
    config::{Error, Object},
    rms::{LayerAttention, NormNames, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "cohere2",
    doc: "Command R7B and A: attention beside the MLP, LayerNorm, windows, layers without positions",
    decoder,
};

/// The defaults are those of transformers' `Cohere2Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        epsilon_key: "layer_norm_eps",
        epsilon: 1e-5,
        tied: true,
        qkv_bias: biased,
        output_bias: biased,
        parallel: true,
        norms: NormNames {
            before_attention: Some("input_layernorm"),
            after_attention: None,
            before_mlp: Some("input_layernorm"),
            after_mlp: None,
        },
        norm_kind: NormKind::Layer,
        logit_scale: config.number("logit_scale")?.unwrap_or(0.0625) as f32,
        rope: rope::Style { max_positions: 8192, interleaved: true, ..rope::Style::llama() },
        ..Style::llama()
    };
    let window = config.size_or("sliding_window", Some(4096))?;
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(4);
    let window = config.windows(window, |layer| !(layer + 1).is_multiple_of(pattern))?;
    style.decoder(config, |layer| {
        let window = window(layer);
        LayerAttention { window, rope: window.map(|_| 0) }
    })
}
