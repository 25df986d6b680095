//! Mistral (arXiv 2310.06825): LLaMA with grouped keys and a sliding window.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    doc: "Mistral 7B and what shares its code: as LLaMA, with a sliding window",
    decoder,
};

/// The defaults are those of transformers' `MistralConfig`.
pub(super) fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    style().decoder(config, config.windows(window(config)?, |_| true)?)
}

/// The text model beside a vision tower: transformers does not read its `layer_types`.
pub(super) fn text(config: &Object<'_>) -> Result<Decoder, Error> {
    let window = window(config)?;
    style().decoder(config, |_| window)
}

fn style() -> Style {
    Style { kv_heads: Some(8), ..Style::llama().with_positions(32 * 4096) }
}

fn window(config: &Object<'_>) -> Result<Option<usize>, Error> {
    config.size_or("sliding_window", Some(4096))
}
