//! The mixtures of experts of Qwen 1.5 and 2 (arXiv 2407.10671), with an expert that all tokens share.

use super::{
    Decoder, Family, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names, Shared},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2_moe",
    doc: "Qwen 1.5's and 2's mixtures of experts: as Qwen 2, with experts, one of them shared",
    decoder,
};

/// The defaults are those of transformers' `Qwen2MoeConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let keys = Keys {
        count: (&["num_experts"], 60),
        active: 4,
        width: ("moe_intermediate_size", Some(1408)),
    };
    let shared = Shared {
        name: "shared_expert",
        gate: Some("shared_expert_gate"),
        width: config.size("shared_expert_intermediate_size")?.unwrap_or(5632),
    };
    let experts = Experts {
        step: config.size("decoder_sparse_step")?.unwrap_or(1),
        dense: config.numbers("mlp_only_layers")?.unwrap_or_default(),
        shared: Some(shared),
        ..Experts::read(config, Names::mlp(), &keys, Scoring::of(config)?)?
    };
    let style = Style {
        kv_heads: Some(16),
        qkv_bias: config.boolean("qkv_bias")?.unwrap_or(true),
        experts: Some(experts),
        ..Style::llama().with_positions(32_768)
    };
    let slides = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = config.size_or("sliding_window", Some(4096))?.filter(|_| slides);
    let last = config.number("max_window_layers")?.unwrap_or(28.0);
    let slides = move |layer: usize| layer.is_multiple_of(2) && (layer as f64) < last;
    style.decoder(config, config.windows(window, slides)?)
}
