//! The `config.json` of a smaller model.

use serde_json::{Map, Value};

use crate::{
    checkpoint::Cuts,
    family::{self, Decoder, Inner},
};

/// Sets a number of a configuration under each of the keys that it has; under the first if it has
/// none.
pub(super) fn set(config: &mut Map<String, Value>, keys: &[&str], value: usize) {
    let has = |key: &&&str| config.get(**key).is_some_and(|value| !value.is_null());
    let mut own: Vec<&str> = keys.iter().filter(has).copied().collect();
    if own.is_empty() {
        own.extend(keys.first());
    }
    own.into_iter().for_each(|key| _ = config.insert(key.to_owned(), value.into()));
}

/// The configuration of the decoder: of a model with several, that of the text model.
pub(super) fn of_decoder(config: &mut Value) -> Option<&mut Map<String, Value>> {
    match config.get("text_config").is_some_and(Value::is_object) {
        true => config.get_mut("text_config")?.as_object_mut(),
        false => config.as_object_mut(),
    }
}

/// Checks that the configuration of `cuts` describes what they leave of `decoder`, of which so many
/// layers are left.
pub(super) fn check(cuts: &Cuts, decoder: &Decoder, layers: &[usize]) -> Result<(), String> {
    let read = family::decoder(&cuts.config).map_err(|error| error.to_string())?;
    let expected = decoder
        .tensors()
        .filter_map(|(name, shape)| Some((cuts.name(name)?, cuts.shape(name, &shape).to_vec())));
    let mut found = read.tensors();
    for (name, expected) in expected {
        let (found_name, found) = found.next().unwrap_or_default();
        if found_name != name {
            return Err(format!("`{name}` would not exist"));
        }
        if found != expected {
            return Err(format!(
                "with the new sizes, `{name}` would have the shape {found:?}, not {expected:?}"
            ));
        }
    }
    for (new, old) in layers.iter().enumerate() {
        if settings(&read, new) != settings(decoder, *old) {
            return Err(format!("layer {old}, then layer {new}, would be computed otherwise"));
        }
    }
    Ok(())
}

/// What a layer computes, beside what its tensors say.
fn settings(decoder: &Decoder, layer: usize) -> Option<impl PartialEq> {
    let layer = decoder.layers.get(layer)?;
    let attention = match &layer.attention.inner {
        Inner::Attention(of) => {
            let rope = of.rope.and_then(|rope| decoder.ropes.get(rope)).cloned();
            Some((of.head_dim, of.scale.to_bits(), of.window, rope, of.score_cap.map(f32::to_bits)))
        }
        Inner::Gated(_) | Inner::Plain(_) => None,
    };
    let router = layer.mlp.router.as_ref().map(|router| (router.active, router.scoring));
    Some((layer.parallel, attention, router, layer.mlp.inner.clone()))
}
