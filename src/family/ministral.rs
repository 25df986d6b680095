//! Ministral: Mistral with layers with and without a window.

use super::{Family, mistral};

pub(super) const FAMILY: Family = Family {
    model_type: "ministral",
    doc: "Ministral: as Mistral, some layers with a sliding window",
    // transformers, too, takes a Mistral with `layer_types` for a Ministral.
    decoder: mistral::decoder,
};
