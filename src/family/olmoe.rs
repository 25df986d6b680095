//! OLMoE (arXiv 2409.02060): LLaMA with a mixture of experts, and norms of queries and keys over all
//! heads.

use super::{
    Decoder, Family, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names},
    rms::{HeadNorms, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "olmoe",
    doc: "OLMoE: as LLaMA, with a mixture of experts, and norms of queries and keys",
    decoder,
};

/// The defaults are those of transformers' `OlmoeConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let keys = Keys {
        count: (&["num_experts", "num_local_experts"], 64),
        active: 8,
        width: ("intermediate_size", None),
    };
    if let Some(clip) = config.number("clip_qkv")? {
        let problem = "clipped queries, keys and values are not supported";
        return Err(config.invalid("clip_qkv", clip, problem));
    }
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        epsilon: 1e-5,
        qkv_bias: biased,
        output_bias: biased,
        head_norms: HeadNorms::Together,
        experts: Some(Experts::read(config, Names::mlp(), &keys, Scoring::of(config)?)?),
        ..Style::llama().with_positions(4096)
    };
    style.decoder(config, |_| None)
}
