//! Ministral 3: LLaMA with YaRN, and queries that grow with their position.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "ministral3",
    doc: "Ministral 3 without images: as LLaMA, with queries that grow with their position",
    decoder,
};

/// The defaults are those of transformers' `Ministral3Config`, except for the position code, which
/// every checkpoint has.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let style = Style {
        kv_heads: Some(8),
        head_dim: Some(128),
        epsilon: 1e-5,
        rope: rope::Style { max_positions: 262_144, scaled_queries: true, ..rope::Style::llama() },
        ..Style::llama()
    };
    let window = config.size("sliding_window")?;
    style.decoder(config, |_| window)
}
