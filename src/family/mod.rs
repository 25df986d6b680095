//! What a model family is, as data: tensor names, shapes, position code. One file per family; one
//! forward for all of them in [`crate::executor`].

mod llama;
pub mod rope;

use barber_metric::Dims;

use self::rope::Rope;

type Read = fn(&serde_json::Value) -> Result<Decoder, Error>;

/// The families, by the `model_type` of their `config.json`.
const FAMILIES: &[(&str, Read)] = &[("llama", llama::read)];

/// The decoder that a checkpoint's `config.json` describes.
///
/// # Errors
/// If the family is unknown, or a key of the configuration is missing or impossible.
pub fn decoder(config: &serde_json::Value) -> Result<Decoder, Error> {
    let Some(name) = config.get("model_type").and_then(|name| name.as_str()) else {
        return Err(Error::NoModelType);
    };
    match FAMILIES.iter().find(|(family, _)| *family == name) {
        Some((_, read)) => read(config),
        None => Err(Error::UnknownFamily(name.into())),
    }
}

/// What is wrong with a checkpoint's `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not say what it is.
    #[error("config.json has no `model_type`")]
    NoModelType,
    /// No file in this folder describes it.
    #[error("config.json: model_type `{0}` is unknown; known: {known}", known = FAMILIES.iter().map(|f| f.0).collect::<Vec<_>>().join(", "))]
    UnknownFamily(String),
    /// A key is missing, mistyped or impossible.
    #[error("{}{key}: {problem}", if key == "config.json" { "" } else { "config.json: " })]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
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
    /// Tensor name of the last norm's weight, [hidden_size].
    pub final_norm: String,
    /// Tensor name of the output head, [vocab_size, hidden_size]; the embedding's where tied.
    pub head: String,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Tensor name of the norm's weight before self-attention, [hidden_size].
    pub attention_norm: String,
    /// The query projection.
    pub q: Linear,
    /// The key projection.
    pub k: Linear,
    /// The value projection.
    pub v: Linear,
    /// The output projection.
    pub o: Linear,
    /// Tensor name of the norm's weight before the MLP, [hidden_size].
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
    /// Tensor name of its bias, [rows], where it has one.
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
