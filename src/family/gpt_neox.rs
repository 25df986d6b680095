//! GPT-NeoX (arXiv 2204.06745): layer norms, attention beside the MLP, query, key and value in one
//! matrix, rotary positions of a quarter of each head.

use super::{
    Activation, Decoder, Family, NormKind, Role,
    config::{Error, Object},
    rms::{Names, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_neox",
    doc: "Pythia and GPT-NeoX: LayerNorm, attention beside a plain MLP, biases",
    decoder,
};

/// The defaults are those of transformers' `GPTNeoXConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(true);
    let llama = Style::llama();
    let style = Style {
        epsilon_key: "layer_norm_eps",
        epsilon: 1e-5,
        qkv_bias: biased,
        output_bias: biased,
        mlp_bias: true,
        fused: true,
        gated: false,
        has_head_dim: false,
        parallel: config.boolean("use_parallel_residual")?.unwrap_or(true),
        names: Names {
            embedding: "gpt_neox.embed_in",
            layers: "gpt_neox.layers",
            final_norm: "gpt_neox.final_layer_norm",
            head: "embed_out",
            fused: ("attention.query_key_value", Role::HeadQueryKeyValue),
            output: "attention.dense",
            up: "mlp.dense_h_to_4h",
            down: "mlp.dense_4h_to_h",
            ..llama.names
        },
        norm_kind: NormKind::Layer,
        norm_bias: true,
        activation: ("hidden_act", Activation::Gelu),
        rope: rope::Style {
            partial: true,
            fraction: ("rotary_pct", 0.25),
            theta: ("rotary_emb_base", 10_000.0),
            ..rope::Style::llama()
        },
        ..llama
    };
    style.decoder(config, |_| None)
}
