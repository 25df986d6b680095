//! Nemotron and Minitron (arXiv 2402.16819): layer norms scaled by 1 + weight, rotary positions of
//! half of each head, a plain MLP of squared ReLU.

use super::{
    Activation, Decoder, Family, NormKind,
    config::{Error, Object},
    rms::Style,
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "nemotron",
    doc: "Nemotron 3 and 4, Minitron: LayerNorm, squared ReLU, half of each head rotated",
    decoder,
};

/// The defaults are those of transformers' `NemotronConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
    let attention_bias = biased("attention_bias")?;
    let style = Style {
        epsilon_key: "norm_eps",
        epsilon: 1e-5,
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: biased("mlp_bias")?,
        gated: false,
        norm_kind: NormKind::LayerOnePlus,
        norm_bias: true,
        activation: ("hidden_act", Activation::SquaredRelu),
        rope: rope::Style {
            max_positions: 4096,
            partial: true,
            fraction: ("partial_rotary_factor", 0.5),
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    style.decoder(config, |_| None)
}
