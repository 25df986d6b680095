//! Phi-3 (arXiv 2404.14219): LLaMA with fused matrices.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    doc: "Phi-3 and Phi-4: as LLaMA, with query, key and value in one matrix, gate and up too",
    decoder,
};

/// The defaults are those of transformers' `Phi3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let window = config.size("sliding_window")?;
    let rope = rope::Style {
        max_positions: 4096,
        original_max_positions: Some(4096),
        partial: true,
        renamed: &[("su", "longrope"), ("yarn", "longrope")],
        ..rope::Style::llama()
    };
    // transformers counts the factors of a longrope by the hidden size and the number of heads.
    let mut has_head_dim = true;
    for key in ["rope_scaling", "rope_parameters"] {
        has_head_dim &= !config.object(key)?.is_some_and(|rope| rope.has("short_factor"));
    }
    let style = Style { epsilon: 1e-5, fused: true, has_head_dim, rope, ..Style::llama() };
    style.decoder(config, |_| window)
}
