//! Mistral Small 3.1 and later, Ministral 3: a text model beside a vision tower.

use super::{
    Decoder, Family,
    config::{Error, Object},
    ministral, ministral3, mistral, text_model,
};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral3",
    doc: "Mistral Small 3.1 and 3.2, Ministral 3 with images: the text model is pruned, the vision tower copied",
    decoder: |config| text_model(config, text),
};

/// The text model, of one of these families.
fn text(config: &Object<'_>) -> Result<Decoder, Error> {
    let mistral = Family { decoder: mistral::text, ..mistral::FAMILY };
    let known = [mistral, ministral::FAMILY, ministral3::FAMILY];
    let known = known.map(|of| (of.model_type, of.decoder));
    let decoder = config.choice("model_type", &known)?.unwrap_or(mistral::text);
    decoder(config)
}
