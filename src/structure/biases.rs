//! Biases of output projections, in which the means of removed inputs can be kept (FLAP, arXiv
//! 2312.11983, section 3.4). Where a family's configuration has them but the model does not, they are
//! added.

use std::collections::{BTreeMap, BTreeSet};

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

/// Gives the output projections that lose inputs with compensated structures a bias, in the
/// configuration; returns the names and lengths of the biases that the model lacks.
pub(super) fn add(
    lost: &[Lost],
    decoder: &Decoder,
    dense: &mut Value,
) -> Result<BTreeMap<String, usize>, Error> {
    let compensated = lost.iter().filter(|lost| lost.compensated);
    let outputs = compensated.flat_map(|lost| lost.outputs(decoder));
    let parts: BTreeSet<Part> =
        outputs.filter(|(_, of)| of.bias.is_none()).map(|(part, _)| part).collect();
    let (mut added, Some(config)) = (BTreeMap::new(), config::of_decoder(dense)) else {
        return Ok(BTreeMap::new());
    };
    if parts.is_empty() {
        return Ok(added);
    }
    parts.iter().for_each(|part| _ = config.insert(key(*part).into(), true.into()));
    let why = |why: String| Error::Biases { why };
    let biased = family::decoder(dense).map_err(|error| why(error.to_string()))?;
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
