//! EXAONE 4 (arXiv 2507.11407): norms after each part and of queries and keys; beside layers with a
//! window, layers without rotary positions.

use super::{
    Decoder, Family,
    config::{Error, Object},
    olmo2::NORMS,
    rms::{HeadNorms, LayerAttention, Style},
};

pub(super) const FAMILY: Family = Family {
    model_type: "exaone4",
    doc: "EXAONE 4: norms after each part and of queries and keys, windows, layers without positions",
    decoder,
};

/// The defaults are those of transformers' `Exaone4Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let style = Style {
        kv_heads: Some(32),
        epsilon: 1e-5,
        head_norms: HeadNorms::Each,
        norms: NORMS,
        ..Style::llama()
    };
    let window = config.size_or("sliding_window", Some(4096))?;
    // Published models have a text here, beside `layer_types`.
    let pattern = match config.has("layer_types") {
        true => None,
        false => config.size("sliding_window_pattern")?,
    };
    let pattern = pattern.unwrap_or(4);
    let windows = config.windows(window, |layer| !(layer + 1).is_multiple_of(pattern))?;
    style.decoder(config, |layer| {
        let own = windows(layer);
        LayerAttention { window: own, rope: (window.is_none() || own.is_some()).then_some(0) }
    })
}
