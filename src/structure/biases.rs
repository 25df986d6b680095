//! Biases of output projections, in which the means of removed inputs can be kept (FLAP, arXiv
//! 2312.11983, section 3.4). Where a family's configuration has them but the model does not, they are
//! added.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Error, Lost, config};
use crate::family::{self, Decoder, Feed, Part, Projection};

/// The keys with which families have biases in a part.
fn key(part: Part) -> &'static str {
    match part {
        Part::Attention => "attention_bias",
        Part::Mlp => "mlp_bias",
    }
}

/// The name of a projection's bias, whether there is one or not.
pub(crate) fn name(of: &Projection) -> String {
    let module = of.weight.strip_suffix(".weight").unwrap_or(&of.weight);
    of.bias.clone().unwrap_or_else(|| format!("{module}.bias"))
}

/// Gives all projections that give the output of parts with removed structures a bias, in the
/// configuration; returns the names and lengths of the biases that the model lacks.
pub(super) fn add(
    lost: &[Lost],
    decoder: &Decoder,
    dense: &mut Value,
) -> Result<BTreeMap<String, usize>, Error> {
    let parts = Part::ALL.into_iter().filter(|part| lost.iter().any(|lost| lost.is_in(*part)));
    let parts: Vec<Part> = parts.collect();
    for part in &parts {
        let all = decoder.layers.iter().flat_map(|layer| layer.projections(*part));
        let mut outputs = all.filter(|of| of.feed() == Feed::Inner);
        if outputs.any(|of| of.bias.is_none())
            && let Some(config) = config::of_decoder(dense)
        {
            config.insert(key(*part).into(), true.into());
        }
    }
    let why = |why: String| Error::Biases { why };
    let biased = family::decoder(dense).map_err(|error| why(error.to_string()))?;
    let mut added = BTreeMap::new();
    for (layer, with) in decoder.layers.iter().zip(&biased.layers) {
        let of_part = |part: &Part| layer.projections(*part).iter().zip(with.projections(*part));
        for (of, with) in parts.iter().flat_map(of_part).filter(|(of, _)| of.bias.is_none()) {
            match with.bias.is_some() {
                true => _ = added.insert(name(of), of.dims.rows),
                false if of.feed() == Feed::Inner => {
                    return Err(why(format!("`{}` has none", name(of))));
                }
                false => {}
            }
        }
    }
    Ok(added)
}
