//! OLMo 3: OLMo 2 with a sliding window in three of four layers, whose position code is not scaled.

use super::{
    Decoder, Family,
    config::{Error, Object},
    olmo2,
    rms::{LayerAttention, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo3",
    doc: "OLMo 3: as OLMo 2, with a sliding window in three of four layers",
    decoder,
};

/// The defaults are those of transformers' `Olmo3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    const THETA: f64 = 500_000.0;
    let theta = ("rope_theta", THETA);
    // transformers 5 takes `rope_theta` for layers without a window only.
    let rope = rope::Style { theta, sliding_theta: Some((None, THETA)), ..rope::Style::llama() };
    let style = Style { rope, ..olmo2::style(config)? };
    let window = config.size_or("sliding_window", Some(4096))?;
    let window = config.windows(window, |layer| !(layer + 1).is_multiple_of(4))?;
    style.decoder(config, |layer| {
        let window = window(layer);
        LayerAttention { window, rope: Some(usize::from(window.is_some())) }
    })
}
