//! Structures: what pruning removes as a whole, so that a smaller dense model is left. One file per
//! structure, and a table of all.
//!
//! Where `config.json` has one number of a structure for all layers, each layer loses as many. While
//! a run goes on, what is removed is masked; the result is measured as the smaller model that it is.

mod biases;
mod channels;
mod config;
mod experts;
mod heads;
mod indices;
mod layers;
mod removal;
mod scores;
mod site;

use serde_json::{Map, Value};

pub(crate) use self::biases::name as bias_name;
use self::site::{Owners, Site, Slice};
pub use self::{
    indices::Indices,
    removal::{Lost, Removal},
    scores::Scores,
};
use crate::{
    checkpoint::Axis,
    choice::{Choice, Named, Table},
    family::{Decoder, Part, Sublayer},
};

/// Every structure.
static ALL: Table<Kind> =
    Table::new(&[&WEIGHTS, &channels::CHANNELS, &heads::HEADS, &layers::LAYERS, &experts::EXPERTS]);

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
    /// Whether the structures of all layers compete with one another.
    is_of_model: bool,
    /// Whether programs that run the model may want a multiple of some number to be left.
    has_multiples: bool,
    /// Whether what is left can be reconstructed: without the structures, the other ones of a layer
    /// have the inputs that they had.
    leaves_inputs: bool,
    /// Where a model has the structures.
    sites: fn(&Decoder) -> Result<Vec<Site>, Error>,
    /// Describes the smaller model in the configuration of its decoder; `kept` says which structures
    /// of each site are left.
    configure: fn(&mut Map<String, Value>, &Decoder, kept: &[Vec<bool>]),
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

    /// Whether the structures of all layers compete with one another.
    pub fn is_of_model(&self) -> bool {
        self.whole.as_ref().is_some_and(|whole| whole.is_of_model)
    }

    /// Whether a multiple of some number can be left.
    pub fn has_multiples(&self) -> bool {
        self.whole.as_ref().is_some_and(|whole| whole.has_multiples)
    }

    /// Whether the weights that are left can be changed to make up for what is removed.
    pub fn leaves_inputs(&self) -> bool {
        self.whole.as_ref().is_none_or(|whole| whole.leaves_inputs)
    }
}

/// The structures of a part of a layer: their number, and what they have of each of its projections.
type Units = (usize, Vec<Owners>);

/// One site in each layer.
fn in_each_layer(
    decoder: &Decoder,
    part: Part,
    units: fn(&Sublayer) -> Result<Units, &'static str>,
) -> Result<Vec<Site>, Error> {
    let of = |(layer, of): (usize, &crate::family::Layer)| {
        let (count, owners) = units(of.part(part)).map_err(|why| Error::Lacks { layer, why })?;
        let slices = owners.into_iter().enumerate();
        let slices = slices.map(|(linear, owners)| Slice { layer, part, linear, owners }).collect();
        Ok(Site { count, slices, ..Site::default() })
    };
    decoder.layers.iter().enumerate().map(of).collect()
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
    /// The model lacks the structure.
    #[error("the model has no {many}")]
    None {
        /// The structures, in words.
        many: &'static str,
    },
    /// Layers differ in their number of structures.
    #[error("a layer has {first} {many}, but another has {found}: config.json has one number")]
    Differ {
        /// The structures, in words.
        many: &'static str,
        /// Number of the first layer.
        first: usize,
        /// Number of a layer that differs.
        found: usize,
    },
    /// The structures of a report are not the model's.
    #[error("the indices of removed {many} do not fit the model, or layers lost different numbers")]
    Reported {
        /// The structures, in words.
        many: &'static str,
    },
    /// The ratio removes nothing, or everything.
    #[error("{ratio} of the {of} {many}, rounded down, is {removed}: {what}")]
    Ratio {
        /// The ratio.
        ratio: f64,
        /// Number of structures that compete.
        of: usize,
        /// The structures that compete, in words.
        many: String,
        /// Number of structures to remove.
        removed: usize,
        /// What would be left.
        what: &'static str,
    },
    /// Output projections cannot have biases.
    #[error("the family's config.json gives output projections no biases: {why}")]
    Biases {
        /// What is wrong.
        why: String,
    },
    /// No multiple is left.
    #[error(
        "without {removed} of the {of} {many} of a layer, a multiple of {multiple} would be left only \
         if none were removed"
    )]
    Multiple {
        /// The number of which a multiple is left.
        multiple: usize,
        /// Number of structures that the ratio removes.
        removed: usize,
        /// Number of structures of a layer.
        of: usize,
        /// The structures, in words.
        many: &'static str,
    },
    /// The family's configuration cannot describe the smaller model.
    #[error("the family's config.json cannot describe a model with fewer {many}: {why}")]
    Configuration {
        /// The structures, in words.
        many: String,
        /// What is wrong with it.
        why: String,
    },
}

#[cfg(test)]
mod tests;
