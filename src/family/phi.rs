//! Phi-1, Phi-1.5 and Phi-2 (arXiv 2306.11644): layer norms, attention beside the MLP, rotary
//! positions of a part of each head, biases.

use super::{
    Activation, Decoder, Family, NormKind,
    config::{Error, Object},
    rms::{HeadNorms, Names, NormNames, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "phi",
    doc: "Phi-1 and Phi-2: LayerNorm, attention beside a plain MLP, biases",
    decoder,
};

/// The defaults are those of transformers' `PhiConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let head_norms = config.boolean("qk_layernorm")?.unwrap_or(false);
    let llama = Style::llama();
    let style = Style {
        epsilon_key: "layer_norm_eps",
        epsilon: 1e-5,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        head_bias: true,
        gated: false,
        parallel: true,
        // Their width in transformers is that of the hidden size divided by the number of heads.
        has_head_dim: !head_norms,
        head_norms: if head_norms { HeadNorms::Each } else { HeadNorms::None },
        names: Names {
            final_norm: "model.final_layernorm",
            output: "self_attn.dense",
            head_norms: ["self_attn.q_layernorm", "self_attn.k_layernorm"],
            up: "mlp.fc1",
            down: "mlp.fc2",
            ..llama.names
        },
        norms: NormNames {
            before_attention: Some("input_layernorm"),
            after_attention: None,
            before_mlp: Some("input_layernorm"),
            after_mlp: None,
        },
        norm_kind: NormKind::Layer,
        norm_bias: true,
        activation: ("hidden_act", Activation::GeluTanh),
        rope: rope::Style {
            partial: true,
            fraction: ("partial_rotary_factor", 0.5),
            ..rope::Style::llama()
        },
        ..llama
    };
    style.decoder(config, |_| None)
}
