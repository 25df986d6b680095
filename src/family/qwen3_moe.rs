//! The mixtures of experts of Qwen 3 (arXiv 2505.09388).

use super::{
    Decoder, Family, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names},
    rms::{HeadNorms, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    doc: "Qwen 3's mixtures of experts: as Qwen 3, with experts in place of the MLP",
    decoder,
};

/// The defaults are those of transformers' `Qwen3MoeConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let keys = Keys {
        count: (&["num_experts", "num_local_experts"], 128),
        active: 8,
        width: ("moe_intermediate_size", Some(768)),
    };
    let experts = Experts {
        step: config.size("decoder_sparse_step")?.unwrap_or(1),
        dense: config.numbers("mlp_only_layers")?.unwrap_or_default(),
        ..Experts::read(config, Names::mlp(), &keys, Scoring::of(config)?)?
    };
    let style = Style {
        kv_heads: Some(4),
        qkv_bias: biased,
        output_bias: biased,
        head_norms: HeadNorms::Each,
        experts: Some(experts),
        ..Style::llama().with_positions(32_768)
    };
    let slides = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = config.size_or("sliding_window", Some(4096))?.filter(|_| slides);
    style.decoder(config, |_| window)
}
