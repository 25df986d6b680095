//! Structures: what pruning removes as a whole, so that a smaller dense model is left. One file per
//! structure, and a table of all.
//!
//! A layer has as many structures of a kind as any other, as `config.json` has one number for all of
//! them, and loses as many. While a run goes on they are masked: a masked model computes what the
//! smaller one will.

mod channels;
mod heads;
mod indices;

use std::collections::BTreeMap;

use barber_metric::Dims;
use serde_json::{Map, Value};

pub use self::indices::Indices;
use crate::{
    checkpoint::{Axis, Cut, Cuts, Masks},
    choice::{Choice, Named, Table},
    family::{self, Decoder, Inner, Part, Projection, Sublayer},
    mask::{Mask, floored},
};

/// Every structure.
static ALL: Table<Kind> = Table::new(&[&WEIGHTS, &channels::CHANNELS, &heads::HEADS]);

/// The choice of what pruning removes. The default is single weights.
pub type Structure = Choice<Kind>;

/// A kind of thing that pruning removes.
pub struct Kind {
    /// The name in a recipe's `sparsity.structure`.
    pub name: &'static str,
    /// Description, without a capital letter or a full stop.
    pub help: &'static str,
    /// How it is removed as a whole; `None` for single weights, which become zeros.
    whole: Option<Whole>,
}

static WEIGHTS: Kind =
    Kind { name: "weights", help: "single weights, which become zeros", whole: None };

/// A structure that is removed as a whole.
struct Whole {
    /// Several such structures, in words.
    many: &'static str,
    /// The part of a layer that has them.
    part: Part,
    /// The structures of a part, or why it has none that can be removed.
    units: fn(&Sublayer) -> Result<Units, &'static str>,
    /// The sizes of the part with this number of structures, as `config.json` says them.
    sizes: fn(&Sublayer, usize) -> Vec<Size>,
}

/// A size in `config.json`.
struct Size {
    /// The keys that families have for it; a configuration without any of them gets the first.
    keys: &'static [&'static str],
    value: usize,
}

impl Default for Structure {
    fn default() -> Self {
        Self(&WEIGHTS)
    }
}

impl Named for Kind {
    const SET: &str = "Structure";

    fn table() -> &'static Table<Self> {
        &ALL
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn help(&self) -> &'static str {
        self.help
    }
}

impl Kind {
    /// Whether the result is a smaller dense model, not one with zeros.
    pub const fn is_whole(&self) -> bool {
        self.whole.is_some()
    }

    /// Several such structures, in words.
    pub fn many(&self) -> &'static str {
        self.whole.as_ref().map_or("weights", |whole| whole.many)
    }
}

/// The structures of a part of a layer.
#[derive(Clone, Debug, PartialEq)]
struct Units {
    /// Number of structures.
    count: usize,
    /// The rows and columns that they have.
    slices: Vec<Slice>,
}

/// The rows or columns of a projection, each of which belongs to a structure.
#[derive(Clone, Debug, PartialEq)]
struct Slice {
    /// Index into the part's projections.
    linear: usize,
    axis: Axis,
    /// The structure of each row or column.
    owners: Vec<usize>,
}

impl Slice {
    /// The structure of the weight at this row-major index.
    fn owner(&self, dims: Dims, i: usize) -> usize {
        self.owners[match self.axis {
            Axis::Rows => i / dims.columns,
            Axis::Columns => i % dims.columns,
        }]
    }

    /// The rows or columns of the structures that are kept.
    fn cut(&self, kept: &[bool]) -> Cut {
        let own = self.owners.iter().enumerate().filter(|(_, owner)| kept[**owner]);
        Cut { axis: self.axis, kept: own.map(|(i, _)| i).collect() }
    }
}

/// Why structures cannot be removed from a model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A layer lacks the structure, or cannot lose it alone.
    #[error("layer {layer}: {why}")]
    Lacks {
        /// Index of the layer.
        layer: usize,
        /// Why not.
        why: &'static str,
    },
    /// Layers differ in their number of structures.
    #[error(
        "layer 0 has {first} {many}, but layer {layer} has {found}: config.json has one number"
    )]
    Differ {
        /// The structures, in words.
        many: &'static str,
        /// Number of the first layer.
        first: usize,
        /// Index of a layer that differs.
        layer: usize,
        /// Number of that layer.
        found: usize,
    },
    /// The ratio removes nothing, or everything.
    #[error("{ratio} of the {of} {many} of a layer, rounded down, is {removed}: {what}")]
    Ratio {
        /// The ratio.
        ratio: f64,
        /// Number of structures of a layer.
        of: usize,
        /// The structures, in words.
        many: &'static str,
        /// Number of structures to remove.
        removed: usize,
        /// What would be left.
        what: &'static str,
    },
    /// The family's configuration cannot describe the smaller model.
    #[error("the family's config.json cannot describe a model with fewer {many}: {why}")]
    Configuration {
        /// The structures, in words.
        many: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// The structures that a run removes from a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Removal {
    /// What is removed.
    pub structure: Structure,
    /// The part of a layer that has the structures.
    pub part: Part,
    /// Number of structures of a layer.
    pub of: usize,
    /// Number of structures that each layer loses.
    pub removed: usize,
    /// The structures of each layer.
    layers: Vec<Units>,
    /// The smaller model's `config.json`.
    config: Value,
}

impl Removal {
    /// The removal of this fraction of the structures of each layer; `None` for single weights.
    ///
    /// # Errors
    /// If a layer lacks the structure, the ratio removes none or all, or the family's configuration
    /// cannot describe the smaller model.
    pub fn new(
        structure: Structure,
        decoder: &Decoder,
        config: &Value,
        ratio: f64,
    ) -> Result<Option<Self>, Error> {
        Self::of_count(structure, decoder, config, |of| {
            let removed = floored(ratio, of);
            let what = match removed {
                0 => "nothing would be removed",
                removed if removed >= of => "nothing would be left",
                removed => return Ok(removed),
            };
            Err(Error::Ratio { ratio, of, many: structure.many(), removed, what })
        })
    }

    /// The removal that a report describes: the structures of each layer that are gone.
    ///
    /// # Errors
    /// As [`Removal::new`], and if these are not structures of the model.
    pub fn reported(
        structure: Structure,
        decoder: &Decoder,
        config: &Value,
        removed: &[Indices],
    ) -> Result<Option<(Self, Masks)>, Error> {
        let first = |of| Ok(removed.first().map_or(0, |indices| indices.below(of).count()));
        let Some(removal) = Self::of_count(structure, decoder, config, first)? else {
            return Ok(None);
        };
        let of = removal.of;
        let mut masks = Masks::new();
        for layer in 0..removal.layers.len() {
            let mut kept = vec![true; of];
            let gone = removed.get(layer).into_iter().flat_map(|indices| indices.below(of));
            gone.for_each(|i| kept[i] = false);
            let found = kept.iter().filter(|kept| !**kept).count();
            if found != removal.removed {
                let many = structure.many();
                return Err(Error::Differ { many, first: removal.removed, layer, found });
            }
            masks.extend(removal.masks(decoder, layer, &kept));
        }
        Ok(Some((removal, masks)))
    }

    /// The removal of the number of structures that `removed` gives for the number that a layer has.
    fn of_count(
        structure: Structure,
        decoder: &Decoder,
        config: &Value,
        removed: impl FnOnce(usize) -> Result<usize, Error>,
    ) -> Result<Option<Self>, Error> {
        let Some(whole) = &structure.0.whole else { return Ok(None) };
        let Whole { many, part, .. } = *whole;
        let units = |(layer, of): (usize, &family::Layer)| {
            (whole.units)(of.part(part)).map_err(|why| Error::Lacks { layer, why })
        };
        let layers: Vec<Units> =
            decoder.layers.iter().enumerate().map(units).collect::<Result<_, _>>()?;
        let of = layers.first().map_or(0, |units| units.count);
        if let Some(layer) = layers.iter().position(|units| units.count != of) {
            let found = layers[layer].count;
            return Err(Error::Differ { many, first: of, layer, found });
        }
        let (removed, config) = (removed(of)?, config.clone());
        let mut removal = Self { structure, part, of, removed, layers, config };
        removal.configure(decoder, whole)?;
        Ok(Some(removal))
    }

    /// Writes the new sizes into the configuration, and checks that it describes the smaller model.
    fn configure(&mut self, decoder: &Decoder, whole: &Whole) -> Result<(), Error> {
        let many = whole.many;
        let Some(layer) = decoder.layers.first() else { return Ok(()) };
        let wrong = |why: String| Error::Configuration { many, why };
        let sizes = (whole.sizes)(layer.part(self.part), self.of - self.removed);
        set(&mut self.config, &sizes);
        let read = family::decoder(&self.config).map_err(|error| wrong(error.to_string()))?;
        let cuts = self.smallest(decoder);
        let expected =
            decoder.tensors().map(|(name, shape)| (name, cuts.shape(name, &shape).to_vec()));
        let mut found = read.tensors();
        for (name, expected) in expected {
            let found = found.next().map(|(_, shape)| shape).unwrap_or_default();
            if found != expected {
                let why = format!(
                    "with the new sizes, `{name}` would have the shape {found:?}, not {expected:?}"
                );
                return Err(wrong(why));
            }
        }
        let scales = |decoder: &Decoder| -> Vec<_> {
            let attention = decoder.layers.iter().map(|layer| match &layer.attention.inner {
                Inner::Attention(of) => (of.head_dim, of.scale.to_bits(), of.window),
                Inner::Gated(_) | Inner::Plain(_) => (0, 0, None),
            });
            attention.collect()
        };
        if scales(&read) != scales(decoder) {
            return Err(wrong("with the new sizes, attention would be scaled otherwise".into()));
        }
        Ok(())
    }

    /// The number of weights of a matrix that the removal takes.
    pub fn weights(&self, dims: Dims) -> usize {
        dims.len() / self.of.max(1) * self.removed
    }

    /// Whether the structures have rows or columns of a projection of their part.
    pub fn has(&self, layer: usize, linear: usize) -> bool {
        self.layers[layer].slices.iter().any(|slice| slice.linear == linear)
    }

    /// The matrices that the structures have rows or columns of.
    pub fn matrices<'a>(&'a self, decoder: &'a Decoder) -> impl Iterator<Item = &'a Projection> {
        decoder.layers.iter().zip(&self.layers).flat_map(|(layer, units)| {
            units.slices.iter().map(|slice| &layer.projections(self.part)[slice.linear])
        })
    }

    /// Adds the scores of a matrix, row-major, to those of the structures of its layer.
    pub fn add(
        &self,
        layer: usize,
        (linear, dims): (usize, Dims),
        scores: &[f32],
        sums: &mut [f64],
    ) {
        for slice in self.layers[layer].slices.iter().filter(|slice| slice.linear == linear) {
            for (i, score) in scores.iter().enumerate() {
                sums[slice.owner(dims, i)] += f64::from(*score);
            }
        }
    }

    /// The structures of a layer that are kept, those with the highest scores; of equal ones, the
    /// last.
    pub fn keep(&self, scores: &[f64]) -> Vec<bool> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let mut kept = vec![true; scores.len()];
        order.iter().take(self.removed).for_each(|i| kept[*i] = false);
        kept
    }

    /// The masks of a layer's matrices, by tensor name, if these structures are kept.
    pub fn masks(
        &self,
        decoder: &Decoder,
        layer: usize,
        kept: &[bool],
    ) -> impl Iterator<Item = (String, Mask)> {
        let projections = decoder.layers[layer].projections(self.part);
        self.layers[layer].slices.iter().map(move |slice| {
            let Projection { weight, dims, .. } = &projections[slice.linear];
            (weight.clone(), Mask::from_fn(*dims, |i| kept[slice.owner(*dims, i)]))
        })
    }

    /// The structures of a layer that its masks keep: those that have a kept weight.
    fn kept(&self, decoder: &Decoder, layer: usize, masks: &Masks) -> Vec<bool> {
        let projections = decoder.layers[layer].projections(self.part);
        let mut kept = vec![false; self.of];
        for slice in &self.layers[layer].slices {
            let Projection { weight, dims, .. } = &projections[slice.linear];
            let Some(mask) = masks.get(weight) else { return vec![true; self.of] };
            let step = if slice.axis == Axis::Rows { dims.columns } else { 1 };
            for (i, owner) in slice.owners.iter().enumerate() {
                kept[*owner] |= mask.get(i * step);
            }
        }
        kept
    }

    /// The structures of each layer that are gone by these masks.
    pub fn gone(&self, decoder: &Decoder, masks: &Masks) -> Vec<Indices> {
        let gone = |layer| {
            let kept = self.kept(decoder, layer, masks);
            (0..self.of).filter(|i| !kept[*i]).collect()
        };
        (0..self.layers.len()).map(gone).collect()
    }

    /// The smaller model that is left with these masks.
    pub fn cuts(&self, decoder: &Decoder, masks: &Masks) -> Cuts {
        self.left(decoder, |layer| self.kept(decoder, layer, masks))
    }

    /// A model of the result's size.
    pub fn smallest(&self, decoder: &Decoder) -> Cuts {
        self.left(decoder, |_| (0..self.of).map(|i| i >= self.removed).collect())
    }

    /// The model that is left if these structures are kept in each layer.
    fn left(&self, decoder: &Decoder, kept: impl Fn(usize) -> Vec<bool>) -> Cuts {
        let mut tensors = BTreeMap::new();
        for (layer, units) in self.layers.iter().enumerate() {
            let (projections, kept) = (decoder.layers[layer].projections(self.part), kept(layer));
            for slice in &units.slices {
                let Projection { weight, bias, .. } = &projections[slice.linear];
                let cut = slice.cut(&kept);
                let bias = bias.iter().filter(|_| slice.axis == Axis::Rows);
                tensors.extend(bias.chain([weight]).map(|name| (name.clone(), cut.clone())));
            }
        }
        Cuts { config: self.config.clone(), tensors }
    }
}

/// Sets sizes in a `config.json`, of the text model where that is one of several.
fn set(config: &mut Value, sizes: &[Size]) {
    let nested = config.get("text_config").is_some_and(Value::is_object);
    let config: Option<&mut Map<String, Value>> = match nested {
        true => config.get_mut("text_config").and_then(Value::as_object_mut),
        false => config.as_object_mut(),
    };
    let Some(config) = config else { return };
    for Size { keys, value } in sizes {
        let known = keys.iter().find(|key| config.get(**key).is_some_and(|value| !value.is_null()));
        config.insert(known.unwrap_or(&keys[0]).to_string(), (*value).into());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{plan::Plan, random::SplitMix64};

    fn removal(
        structure: &str,
        config: &Value,
        ratio: f64,
    ) -> Result<(Decoder, Option<Removal>), Error> {
        let decoder = family::decoder(config).unwrap();
        let structure = Structure::named(structure).unwrap();
        let removal = Removal::new(structure, &decoder, config, ratio)?;
        Ok((decoder, removal))
    }

    proptest! {
        /// Each layer loses as many structures as the plan says, those with the lowest scores; masks
        /// and smaller tensors say the same, and the smaller configuration has their shapes.
        #[test]
        fn a_layer_loses_its_lowest(
            (kv_heads, queries, head_dim) in (2_usize..5, 1_usize..4, 1_usize..4),
            inner in 2_usize..20,
            ratio in 0.3..0.9_f64,
            seed: u64,
        ) {
            let config = json!({
                "model_type": "llama", "vocab_size": 8, "hidden_size": 6, "num_hidden_layers": 2,
                "intermediate_size": inner, "head_dim": 2 * head_dim, "attention_bias": true,
                "num_attention_heads": kv_heads * queries, "num_key_value_heads": kv_heads,
            });
            for structure in ["channels", "heads"] {
                let found = removal(structure, &config, ratio);
                let of = if structure == "heads" { kv_heads } else { inner };
                if floored(ratio, of) == 0 {
                    let is_ratio = matches!(found, Err(Error::Ratio { removed: 0, .. }));
                    prop_assert!(is_ratio);
                    continue;
                }
                let (decoder, removal) = found.unwrap();
                let removal = removal.unwrap();
                prop_assert_eq!((removal.of, removal.removed), (of, floored(ratio, of)));
                let mut random = SplitMix64::new(seed);
                let (mut masks, mut gone) = (Masks::new(), Vec::new());
                for layer in 0..2 {
                    let scores: Vec<f64> = (0..of).map(|_| random.below(5) as f64).collect();
                    let kept = removal.keep(&scores);
                    let of_kept = |is: bool| (0..of).filter(|i| kept[*i] == is).collect::<Vec<_>>();
                    for lost in of_kept(false) {
                        // Of equal scores the first are lost.
                        let fine = |i: &usize| (scores[*i], *i) > (scores[lost], lost);
                        prop_assert!(of_kept(true).iter().all(fine));
                    }
                    gone.push(of_kept(false).into_iter().collect::<Indices>());
                    masks.extend(removal.masks(&decoder, layer, &kept));
                }
                prop_assert_eq!(removal.gone(&decoder, &masks), gone.clone());
                let cuts = removal.cuts(&decoder, &masks);
                let read = family::decoder(&cuts.config).unwrap();
                for ((name, shape), (also, new)) in decoder.tensors().zip(read.tensors()) {
                    prop_assert_eq!(name, also);
                    prop_assert_eq!(&*cuts.shape(name, &shape), &new[..]);
                    if let Some(mask) = masks.get(name) {
                        prop_assert_eq!(mask.kept(), new[0] * new[1]);
                    }
                }
                let again = Removal::reported(removal.structure, &decoder, &config, &gone);
                prop_assert_eq!(again, Ok(Some((removal.clone(), masks.clone()))));
                let pruned: usize = masks.values().map(|of| of.dims().len() - of.kept()).sum();
                let all: usize = masks.values().map(|of| of.dims().len()).sum();
                let plan = Plan::of_structures(&decoder, removal).unwrap();
                prop_assert_eq!(plan.weights(&decoder), [all, pruned]);
            }
        }
    }

    #[test]
    fn single_weights_are_no_structures() {
        let config = json!({
            "model_type": "opt", "vocab_size": 8, "hidden_size": 6, "ffn_dim": 4,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        });
        assert_eq!(removal("weights", &config, 0.5).unwrap().1, None);
        assert_eq!(removal("channels", &config, 0.5).unwrap().1.unwrap().config["ffn_dim"], 2);
        let error = removal("heads", &config, 0.5).unwrap_err().to_string();
        let expected = "the family's config.json cannot describe a model with fewer key/value heads: \
                        with the new sizes, `model.decoder.layers.0.self_attn.q_proj.weight` would \
                        have the shape [6, 6], not [3, 6]";
        assert_eq!(error, expected);
    }
}
