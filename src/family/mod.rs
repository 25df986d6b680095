//! What a model family is, as data: tensor names, shapes, position code. One file per family; one
//! forward for all of them in [`crate::executor`].

mod config;
mod llama;
pub mod rope;

use std::iter::once;

use barber_metric::Dims;
use serde_json::Value;

pub use self::config::Error;
use self::config::Object;
use self::rope::Rope;

/// A model family that Barber knows.
pub struct Family {
    /// What `config.json` calls it in `model_type`.
    pub model_type: &'static str,
    /// One line of help.
    pub doc: &'static str,
    decoder: fn(&Object<'_>) -> Result<Decoder, Error>,
}

/// Every family, by `model_type`.
pub static FAMILIES: &[Family] = &[llama::FAMILY];

/// Reads a checkpoint's `config.json`.
///
/// # Errors
/// [`Error`] if the family is unknown, or the configuration cannot be one of that family; it names
/// the key.
///
/// ```
/// let config = serde_json::json!({
///     "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
///     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
///     "tie_word_embeddings": true,
/// });
/// let decoder = llm_barber::family::decoder(&config)?;
/// assert_eq!(decoder.layers[1].k.weight, "model.layers.1.self_attn.k_proj.weight");
/// assert_eq!(decoder.layers[1].k.dims.rows, 32);
/// # Ok::<(), llm_barber::family::Error>(())
/// ```
pub fn decoder(config: &Value) -> Result<Decoder, Error> {
    let config = Object::top(config)?;
    let model_type = config.string("model_type")?.ok_or_else(|| config.missing("model_type"))?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| Error::Unknown {
        key: config.path("model_type"),
        found: model_type.to_owned(),
        known: FAMILIES.iter().map(|family| family.model_type).collect(),
    })?;
    (family.decoder)(&config)
}

/// A decoder-only transformer, read from a checkpoint's `config.json`.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square before its root, in every norm.
    pub norm_epsilon: f32,
    /// The rotary position code.
    pub rope: Rope,
    /// Tensor name of the embedding, [vocab_size, hidden_size].
    pub embedding: String,
    /// The decoder layers, in order.
    pub layers: Vec<Layer>,
    /// Tensor name of the last norm's weight, `[hidden_size]`.
    pub final_norm: String,
    /// Tensor name of the output head, [vocab_size, hidden_size]; the embedding's where tied.
    pub head: String,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Tensor name of the norm's weight before self-attention, `[hidden_size]`.
    pub attention_norm: String,
    /// The query projection.
    pub q: Linear,
    /// The key projection.
    pub k: Linear,
    /// The value projection.
    pub v: Linear,
    /// The output projection.
    pub o: Linear,
    /// Tensor name of the norm's weight before the MLP, `[hidden_size]`.
    pub mlp_norm: String,
    /// The gate projection.
    pub gate: Linear,
    /// The up projection.
    pub up: Linear,
    /// The down projection.
    pub down: Linear,
}

/// A linear layer: y = x Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    /// What a recipe's `[[blocks]]` calls it, such as `q_proj`.
    pub name: &'static str,
    /// Tensor name of its weight, [rows, columns].
    pub weight: String,
    /// Tensor name of its bias, `[rows]`, where it has one.
    pub bias: Option<String>,
    /// The shape of its weight.
    pub dims: Dims,
}

/// The parts of a decoder layer that have an output of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Self-attention: {q, k, v, o}.
    Attention,
    /// The MLP: {gate, up, down}.
    Mlp,
}

impl Part {
    /// The parts in the order in which a hidden state passes them.
    pub const ALL: [Self; 2] = [Self::Attention, Self::Mlp];

    /// What the default grouping calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attention => "self-attention",
            Self::Mlp => "mlp",
        }
    }
}

/// Linear layers whose masks are rebuilt as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What reports call it.
    pub name: &'static str,
    /// The [`Linear::name`]s in it.
    pub layers: Vec<&'static str>,
}

impl Decoder {
    /// The family's own grouping, for a recipe that gives none: a block for each [`Part`].
    pub fn default_blocks(&self) -> Vec<Block> {
        let Some(layer) = self.layers.first() else { return Vec::new() };
        let names = |part| layer.linears(part).iter().map(|linear| linear.name).collect();
        Part::ALL.map(|part| Block { name: part.name(), layers: names(part) }).into()
    }

    /// Every linear layer of the decoder layers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> + Clone {
        let parts = self.layers.iter().flat_map(|layer| Part::ALL.map(|part| (layer, part)));
        parts.flat_map(|(layer, part)| layer.linears(part))
    }

    /// The name and shape of every tensor that the checkpoint must hold, in the model's order; a
    /// tied head is the embedding and not listed again.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let table = |name| (name, vec![self.vocab_size, self.hidden_size]);
        let parts = self.layers.iter().flat_map(|layer| Part::ALL.map(|part| (layer, part)));
        let layers = parts.flat_map(|(layer, part)| {
            let linears = layer.linears(part).into_iter().flat_map(Linear::tensors);
            once((layer.norm(part), vec![self.hidden_size])).chain(linears)
        });
        let head = (self.head != self.embedding).then(|| table(self.head.as_str()));
        once(table(self.embedding.as_str()))
            .chain(layers)
            .chain(once((self.final_norm.as_str(), vec![self.hidden_size])))
            .chain(head)
    }
}

impl Linear {
    /// The name and shape of its weight and, where it has one, its bias.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let bias = self.bias.iter().map(|bias| (bias.as_str(), vec![self.dims.rows]));
        once((self.weight.as_str(), vec![self.dims.rows, self.dims.columns])).chain(bias)
    }
}

impl Layer {
    /// The linear layers of one part.
    pub fn linears(&self, part: Part) -> Vec<&Linear> {
        match part {
            Part::Attention => vec![&self.q, &self.k, &self.v, &self.o],
            Part::Mlp => vec![&self.gate, &self.up, &self.down],
        }
    }

    /// Tensor name of the norm's weight before a part.
    pub fn norm(&self, part: Part) -> &str {
        match part {
            Part::Attention => &self.attention_norm,
            Part::Mlp => &self.mlp_norm,
        }
    }
}
