//! Whole decoder layers. What is left is in the order that it was in.

use serde_json::{Map, Value, json};

use super::{Decoder, Error, Kind, Owners, Part, Site, Slice, Whole, channels::left, config::set};
use crate::family::{Inner, Layer};

pub(super) static LAYERS: Kind = Kind {
    name: "layers",
    help: "whole decoder layers: the result is a smaller dense model",
    whole: Some(Whole {
        many: "layers",
        is_of_model: true,
        has_multiples: false,
        leaves_inputs: false,
        sites,
        configure,
    }),
};

fn sites(decoder: &Decoder) -> Result<Vec<Site>, Error> {
    let mut slices = Vec::new();
    for (layer, of) in decoder.layers.iter().enumerate() {
        for part in Part::ALL {
            let all = 0..of.projections(part).len();
            let owners = || Owners::Whole(layer);
            slices.extend(all.map(|linear| Slice { layer, part, linear, owners: owners() }));
        }
    }
    let count = decoder.layers.len();
    let numbered = decoder.layers.first().and_then(|of| of.attention.projections.first());
    let numbered = numbered.and_then(|of| of.weight.split_once("layers.0."));
    let numbered = numbered.map(|(before, _)| format!("{before}layers."));
    Ok(vec![Site { count, slices, rows: Vec::new(), numbered }])
}

/// The keys whose lists have an entry for each layer.
const LISTS: [&str; 3] = ["layer_types", "no_rope_layers", "mlp_layer_types"];

fn configure(config: &mut Map<String, Value>, decoder: &Decoder, kept: &[Vec<bool>]) {
    let Some(all) = kept.first() else { return };
    let is_kept = |layer: usize| all.get(layer).is_some_and(|kept| *kept);
    let before = |layer: usize| (0..layer).filter(|layer| is_kept(*layer)).count();
    // Which layers have windows must not follow from their numbers, which change.
    let attention = |layer: &Layer| match &layer.attention.inner {
        Inner::Attention(of) => Some(of.clone()),
        Inner::Gated(_) | Inner::Plain(_) => None,
    };
    let slides = |layer: &Layer| attention(layer).is_some_and(|of| of.window.is_some());
    let windows: Vec<bool> = decoder.layers.iter().map(slides).collect();
    let has_types = config.get("layer_types").is_some_and(Value::is_array);
    if !has_types && windows.contains(&true) && windows.contains(&false) {
        let of = |slides| if slides { "sliding_attention" } else { "full_attention" };
        config.insert("layer_types".into(), windows.into_iter().map(of).collect());
    }
    // Nor must which layers have rotary positions; despite its name, the list has 1 for those.
    if config.contains_key("no_rope_layer_interval") && !config.contains_key("no_rope_layers") {
        let rotates = decoder.layers.iter().map(|layer| {
            let rope = attention(layer).and_then(|of| of.rope);
            Value::from(u8::from(rope.is_some()))
        });
        config.insert("no_rope_layers".into(), rotates.collect());
    }
    for key in LISTS {
        if let Some(list) = config.get_mut(key).and_then(Value::as_array_mut) {
            let mut layer = 0..;
            list.retain(|_| layer.next().is_some_and(is_kept));
        }
    }
    let index = |value: &Value| Some(value.as_f64()? as usize);
    if let Some(list) = config.get_mut("mlp_only_layers").and_then(Value::as_array_mut) {
        list.retain(|layer| index(layer).is_some_and(is_kept));
        list.iter_mut().for_each(|layer| *layer = json!(before(index(layer).unwrap_or(0))));
    }
    if let Some(first) = config.get("first_k_dense_replace").and_then(index) {
        config.insert("first_k_dense_replace".into(), before(first.min(all.len())).into());
    }
    set(config, &["num_hidden_layers"], left(kept));
}
