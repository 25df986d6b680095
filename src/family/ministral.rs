//! Ministral: Mistral with layers with and without a window.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "ministral",
    doc: "Ministral: as Mistral, some layers with a sliding window",
    decoder,
};

/// The defaults are those of transformers' `MinistralConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let window = config.size_or("sliding_window", Some(4096))?;
    let style = Style { kv_heads: Some(8), ..Style::llama().with_positions(32 * 4096) };
    style.decoder(config, config.windows(window, |_| true)?)
}
