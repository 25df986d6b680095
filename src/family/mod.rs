//! Model families as data: tensor names, shapes, position code. One file per family; the forward
//! pass in [`crate::executor`] serves all of them.

mod activation;
mod cohere2;
mod config;
mod deepseek_v3;
mod exaone4;
mod experts;
mod gemma2;
mod gemma3;
mod glm4;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod granitemoe;
mod llama;
mod ministral;
mod ministral3;
mod mistral;
mod mistral3;
mod mixtral;
mod nemotron;
mod olmo2;
mod olmo3;
mod olmoe;
mod opt;
mod phi;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rms;
pub mod rope;
mod seed_oss;
mod smollm3;

use std::iter::once;

use barber_metric::Dims;
use serde_json::Value;

use self::config::Object;
use self::rope::Rope;
pub use self::{activation::Activation, config::Error};
use crate::limits::SEQUENCE;

/// A supported model family.
pub struct Family {
    /// The family's `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Description in one line.
    pub doc: &'static str,
    decoder: fn(&Object<'_>) -> Result<Decoder, Error>,
}

/// Tensor name of an output head that is not tied to the embedding, in most families.
const HEAD: &str = "lm_head.weight";

/// Every family, by `model_type`.
pub static FAMILIES: &[Family] = &[
    cohere2::FAMILY,
    deepseek_v3::FAMILY,
    exaone4::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::TEXT,
    glm4::FAMILY,
    gpt_neox::FAMILY,
    gpt_oss::FAMILY,
    granite::FAMILY,
    granitemoe::FAMILY,
    llama::FAMILY,
    ministral::FAMILY,
    ministral3::FAMILY,
    mistral::FAMILY,
    mistral3::FAMILY,
    mixtral::FAMILY,
    nemotron::FAMILY,
    olmo2::FAMILY,
    olmo3::FAMILY,
    olmoe::FAMILY,
    opt::FAMILY,
    phi::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen2_moe::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
    seed_oss::FAMILY,
    smollm3::FAMILY,
];

/// Reads a checkpoint's `config.json`.
///
/// # Errors
/// [`Error`], which names the key, if the family is unknown or the configuration is not valid for
/// it.
///
/// ```
/// let config = serde_json::json!({
///     "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
///     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
///     "tie_word_embeddings": true,
/// });
/// let decoder = llm_barber::family::decoder(&config)?;
/// assert_eq!(decoder.layers[1].attention.projections[1].weight, "model.layers.1.self_attn.k_proj.weight");
/// assert_eq!(decoder.layers[1].attention.projections[1].dims.rows, 32);
/// # Ok::<(), llm_barber::family::Error>(())
/// ```
pub fn decoder(config: &Value) -> Result<Decoder, Error> {
    let config = Object::top(config)?;
    let model_type = config.string("model_type")?.ok_or_else(|| config.missing("model_type"))?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| {
        let known = FAMILIES.iter().map(|family| family.model_type).collect();
        Object::unknown_family(model_type, known)
    })?;
    if config.object("per_layer_config")?.is_some_and(|layers| !layers.is_empty()) {
        let problem = "layers that differ in more than their windows are not supported";
        return Err(config.invalid("per_layer_config", "an object", problem));
    }
    (family.decoder)(&config)
}

/// The decoder of a model that has a text model beside others, such as a vision tower: the
/// configuration of the text model is `text_config`, and its tensor names begin with
/// `language_model.`. Whether the output head is tied is said outside of `text_config`.
fn text_model(
    config: &Object<'_>,
    decoder: impl Fn(&Object<'_>) -> Result<Decoder, Error>,
) -> Result<Decoder, Error> {
    let text = config.object("text_config")?.ok_or_else(|| config.missing("text_config"))?;
    let decoder = decoder(&text)?.renamed(&[("", "language_model.")]);
    let tied = config.boolean("tie_word_embeddings")?.unwrap_or(true);
    let head = if tied { &decoder.embedding.weight } else { &decoder.own_head };
    Ok(Decoder { head: head.clone(), ..decoder })
}

/// A decoder-only transformer, read from a checkpoint's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// Number of channels of the hidden states.
    pub hidden_size: usize,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// The embedding of tokens.
    pub embedding: Embedding,
    /// The rotary position codes; layers may differ in which of them they have.
    pub ropes: Vec<Rope>,
    /// The decoder layers, in order.
    pub layers: Vec<Layer>,
    /// The norm after the last layer, if the model has one.
    pub final_norm: Option<Norm>,
    /// Projection of the last hidden states to the width of the embedding, if the widths differ.
    pub project_out: Option<Projection>,
    /// Tensor name of the output head, [vocab_size, embedding width]; the embedding's if tied.
    pub head: String,
    /// Tensor name of an output head that is not tied to the embedding.
    pub own_head: String,
    /// Tensor name of the output head's bias, if there is one.
    pub head_bias: Option<String>,
    /// Soft cap c of logits: z becomes c · tanh(z / c).
    pub logit_cap: Option<f32>,
}

/// The embedding of tokens as hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Tensor name, [vocab_size, width].
    pub weight: String,
    /// Number of channels of the embedding.
    pub width: usize,
    /// Factor of the embedding's rows.
    pub scale: f32,
    /// Projection to the width of the hidden states, if the widths differ.
    pub project_in: Option<Projection>,
    /// The learned position code, if the model has one.
    pub positions: Option<LearnedPositions>,
}

/// A learned position code: a row for each position, added to the embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedPositions {
    /// Tensor name, [offset + count, hidden_size].
    pub weight: String,
    /// Row of the first position.
    pub offset: usize,
    /// Number of positions.
    pub count: usize,
}

/// A decoder layer: the output of each part is added to the hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Whether the MLP reads the hidden states before attention, not those after it.
    pub parallel: bool,
    /// Self-attention.
    pub attention: Sublayer,
    /// The MLP.
    pub mlp: Sublayer,
}

/// A part of a decoder layer, which computes x + output_norm(y). Projections fed by
/// [`Feed::Hidden`] read input_norm(x); `inner` is applied to their outputs; projections fed by
/// [`Feed::Inner`] read its result, and y is the sum of their outputs. With a `router`, each expert
/// does this for its own tokens, and its outputs are multiplied by their weights; projections of no
/// expert are a shared one, which has all tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sublayer {
    /// The norm before the part.
    pub input_norm: Option<Norm>,
    /// The projections, those of an expert together; projections come after those that feed them.
    pub projections: Vec<Projection>,
    /// The function between the projections fed by the hidden states and those that it feeds.
    pub inner: Inner,
    /// The router of a mixture of experts, if the part is one.
    pub router: Option<Router>,
    /// The norm of the part's output, before it is added to the hidden states.
    pub output_norm: Option<Norm>,
    /// The norm of the hidden states after the part's output was added.
    pub residual_norm: Option<Norm>,
}

/// The router of a mixture of experts: sends each token to a few experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// The projection of hidden states to the logits of experts. It is never pruned.
    pub projection: Projection,
    /// Number of experts of each token.
    pub active: usize,
    /// The choice and the weights of these experts.
    pub scoring: Scoring,
    /// Tensor name of numbers that are added to the experts' scores for the choice alone, `[experts]`.
    pub correction: Option<String>,
    /// The projection to a number whose sigmoid is the weight of the shared expert; `None` for a
    /// weight of 1. It is never pruned.
    pub shared_gate: Option<Projection>,
    /// Start of the experts' tensor names, such as `model.layers.0.mlp.experts`; the expert's number
    /// follows.
    pub experts: String,
    /// The part in its decoder layer, and the router in the part, as transformers 5 calls them in
    /// memory.
    pub in_memory: [&'static str; 2],
}

impl Router {
    /// The fraction of the tokens that a projection of the part reads, on average: an expert's reads
    /// those that are sent to it.
    pub fn share(&self, of: &Projection) -> f64 {
        match of.expert {
            Some(_) => self.active as f64 / self.projection.dims.rows as f64,
            None => 1.0,
        }
    }
}

/// How a router chooses the experts of a token, those with the highest scores, and weighs them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scoring {
    /// The score of a logit.
    pub score: Score,
    /// Whether the scores of the chosen experts are divided by their sum.
    pub normalised: bool,
    /// Factor of the weights.
    pub scale: f32,
    /// The groups of experts, if the experts of a token come from a few of them.
    pub groups: Option<Groups>,
}

/// The score of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// The softmax over the logits of all experts.
    Softmax,
    /// The sigmoid of the expert's logit.
    Sigmoid,
}

/// Groups of consecutive experts. A group's score is the sum of the two highest scores in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups, which have the same number of experts.
    pub count: usize,
    /// Number of groups that the experts of a token come from.
    pub active: usize,
}

impl Scoring {
    /// The softmax over all experts, divided by its sum over the chosen ones if it is `normalised`.
    pub const fn softmax(normalised: bool) -> Self {
        Self { score: Score::Softmax, normalised, scale: 1.0, groups: None }
    }
}

/// The function between the projections of a part.
#[derive(Clone, Debug, PartialEq)]
pub enum Inner {
    /// Causal attention of queries, keys and values.
    Attention(Attention),
    /// A gate times up.
    Gated(Gating),
    /// activation(up).
    Plain(Activation),
}

/// The product of a gate and the inner states: f(min(gate, c)) · (up + b), with up limited to ±c.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gating {
    /// The function f of the gate.
    pub activation: Activation,
    /// The limit c; `None` for no limit.
    pub limit: Option<f32>,
    /// The number b that is added to up.
    pub offset: f32,
}

impl From<Activation> for Gating {
    /// f(gate) · up.
    fn from(activation: Activation) -> Self {
        Self { activation, limit: None, offset: 0.0 }
    }
}

/// The heads of an attention layer, and the tokens that they see.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Number of channels of a query or a key of a head.
    pub head_dim: usize,
    /// Number of channels of a value of a head.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Maximum number of tokens that a token sees, itself included.
    pub window: Option<usize>,
    /// Soft cap c of scores: s becomes c · tanh(s / c).
    pub score_cap: Option<f32>,
    /// Index of the layer's rotary position code in [`Decoder::ropes`], if the layer has one.
    pub rope: Option<usize>,
    /// The norms of queries and of keys, applied before the position code.
    pub head_norms: Option<Box<[Norm; 2]>>,
    /// Tensor name of the sinks, `[heads]`, if there are any: the score of a key without a value,
    /// which every token sees (arXiv 2309.17453).
    pub sinks: Option<String>,
    /// The latents that queries, keys and values are projected from, if they are not projected from
    /// hidden states.
    pub latents: Option<Box<Latents>>,
}

/// Latent attention (arXiv 2405.04434, section 2.1): keys and values are projected from a latent,
/// which is projected from hidden states; queries may be, too. The last channels of a head are rotated;
/// those of keys are projected from hidden states, beside the latent, and shared by all heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Latents {
    /// The norm of the latent of queries, if they have one.
    pub queries: Option<Norm>,
    /// The norm of the latent of keys and values.
    pub keys_and_values: Norm,
    /// Number of channels of a head that are rotated.
    pub rotated: usize,
}

/// A norm of the channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Tensor name of the weight, `[width]`; `None` for a weight of 1.
    pub weight: Option<String>,
    /// Tensor name of the bias, `[width]`, if there is one.
    pub bias: Option<String>,
    /// Number of channels that are normalised together.
    pub width: usize,
    /// Constant that is added to the mean square before its root is taken.
    pub epsilon: f32,
    /// Kind of the norm.
    pub kind: NormKind,
    /// Factor of the result.
    pub scale: f32,
}

/// The kinds of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Root mean square, scaled by 1 + weight.
    RmsOnePlus,
    /// Layer norm: the mean is subtracted first (arXiv 1607.06450).
    Layer,
    /// Layer norm, scaled by 1 + weight.
    LayerOnePlus,
}

/// A linear projection: y = x Wᵀ + b.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// Name in the decoder layer, such as `self_attn.q_proj` or `mlp.experts.3.up_proj`.
    pub name: String,
    /// What the projection computes.
    pub role: Role,
    /// Index of the projection's expert, if it has one: it reads only that expert's tokens.
    pub expert: Option<usize>,
    /// Tensor name of the weight, [rows, columns].
    pub weight: String,
    /// Tensor name of the bias, `[rows]`, if there is one.
    pub bias: Option<String>,
    /// Shape of the weight.
    pub dims: Dims,
}

/// What a projection computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Queries, keys and values in one matrix, in this order of rows.
    QueryKeyValue,
    /// Queries, keys and values in one matrix, in this order of rows for each head of keys.
    HeadQueryKeyValue,
    /// The latent of queries.
    QueryLatent,
    /// Queries, from their latent.
    LatentQuery,
    /// The latent of keys and values, then the rotated channels of keys.
    KeyValueLatent,
    /// Keys without their rotated channels, and values, in this order of rows for each head, from
    /// their latent.
    LatentKeyValue,
    /// The output of attention.
    Output,
    /// The gate of a gated MLP.
    Gate,
    /// The inner states of an MLP.
    Up,
    /// Gate and inner states in one matrix, in this order of rows.
    GateUp,
    /// Gate and inner states in one matrix, whose rows take turns.
    InterleavedGateUp,
    /// The output of an MLP.
    Down,
    /// Conversion between the width of the embedding and that of the hidden states.
    Embedding,
    /// The logits of experts.
    Router,
}

/// The input of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// The hidden states, normalised if the part has a norm.
    Hidden,
    /// The normalised latent of queries.
    QueryLatent,
    /// The normalised latent of keys and values.
    KeyValueLatent,
    /// The result of the part's [`Inner`] function; for an expert, that of the same expert.
    Inner,
}

impl Feed {
    /// All feeds, in the order of a forward pass.
    pub const ALL: [Self; 4] = [Self::Hidden, Self::QueryLatent, Self::KeyValueLatent, Self::Inner];
}

/// The parts of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Self-attention.
    Attention,
    /// The MLP.
    Mlp,
}

impl Part {
    /// The parts, in the order of a forward pass.
    pub const ALL: [Self; 2] = [Self::Attention, Self::Mlp];

    /// The part's name in the default groups.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attention => "self-attention",
            Self::Mlp => "mlp",
        }
    }
}

/// The longest sequence that a model has positions for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PositionLimit {
    /// Number of tokens.
    pub tokens: usize,
    /// Whether longer sequences are impossible, as with a learned table. If not, they can be run,
    /// but the model was not made for them.
    pub hard: bool,
}

impl Decoder {
    /// The longest sequence that the model has positions for. A sliding window does not limit it.
    pub fn positions(&self) -> PositionLimit {
        match (&self.embedding.positions, self.ropes.first()) {
            (Some(learned), _) => PositionLimit { tokens: learned.count, hard: true },
            (None, Some(rope)) => PositionLimit { tokens: rope.longest(), hard: false },
            (None, None) => PositionLimit { tokens: usize::MAX, hard: false },
        }
    }

    /// Number of tokens of a sequence: `wanted`, or else the smaller of 2048 and the model's number
    /// of positions.
    pub fn sequence(&self, wanted: Option<usize>) -> usize {
        wanted.unwrap_or_else(|| self.positions().tokens.min(SEQUENCE))
    }

    /// The value of `max_position_embeddings`, or the family's default.
    pub fn max_positions(&self) -> usize {
        match self.ropes.first() {
            Some(rope) => rope.max_positions,
            None => self.positions().tokens,
        }
    }

    /// Number of weights of the decoder layers' projections that a token is multiplied with: of a
    /// mixture, those of its own experts.
    pub fn active_weights(&self) -> f64 {
        let parts = self.layers.iter().flat_map(|layer| Part::ALL.map(|part| layer.part(part)));
        let all = parts.flat_map(|part| part.projections.iter().map(move |of| (part, of)));
        all.map(|(part, of)| {
            let share = part.router.as_ref().map_or(1.0, |router| router.share(of));
            share * of.dims.len() as f64
        })
        .sum()
    }

    /// All projections of the decoder layers.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> + Clone {
        let parts = self.layers.iter().flat_map(|layer| Part::ALL.map(|part| (layer, part)));
        parts.flat_map(|(layer, part)| layer.projections(part))
    }

    /// The names and shapes of all tensors that the checkpoint must have, in the model's order; a
    /// tied head is not listed.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let table = |name| (name, vec![self.vocab_size, self.embedding.width]);
        let positions = self.embedding.positions.iter();
        let positions = positions.map(|positions| {
            let rows = positions.offset + positions.count;
            (positions.weight.as_str(), vec![rows, self.hidden_size])
        });
        let head = (self.head != self.embedding.weight).then(|| table(self.head.as_str()));
        once(table(self.embedding.weight.as_str()))
            .chain(positions)
            .chain(self.embedding.project_in.iter().flat_map(Projection::tensors))
            .chain(self.layers.iter().flat_map(Layer::tensors))
            .chain(self.final_norm.iter().flat_map(Norm::tensors))
            .chain(self.project_out.iter().flat_map(Projection::tensors))
            .chain(head)
            .chain(self.head_bias.iter().map(|bias| (bias.as_str(), vec![self.vocab_size])))
    }

    /// The decoder with other tensor names: the first of the `prefixes` that a name begins with is
    /// replaced by the prefix beside it.
    #[must_use]
    pub fn renamed(mut self, prefixes: &[(&str, &str)]) -> Self {
        let rename = |name: &mut String| {
            let mut renamed = prefixes
                .iter()
                .filter_map(|(old, new)| name.strip_prefix(old).map(|rest| format!("{new}{rest}")));
            if let Some(renamed) = renamed.next() {
                *name = renamed;
            }
        };
        let norm = |norm: &mut Norm| {
            norm.weight.as_mut().map(rename);
            norm.bias.as_mut().map(rename);
        };
        let projection = |of: &mut Projection| {
            rename(&mut of.weight);
            of.bias.as_mut().map(rename);
        };
        rename(&mut self.embedding.weight);
        rename(&mut self.head);
        rename(&mut self.own_head);
        self.head_bias.as_mut().map(rename);
        self.embedding.positions.iter_mut().for_each(|positions| rename(&mut positions.weight));
        self.embedding.project_in.iter_mut().chain(&mut self.project_out).for_each(projection);
        self.final_norm.iter_mut().for_each(norm);
        for part in self.layers.iter_mut().flat_map(|layer| [&mut layer.attention, &mut layer.mlp])
        {
            part.projections.iter_mut().for_each(projection);
            let norms = [&mut part.input_norm, &mut part.output_norm, &mut part.residual_norm];
            norms.into_iter().flatten().for_each(norm);
            if let Some(router) = &mut part.router {
                projection(&mut router.projection);
                router.shared_gate.as_mut().map(projection);
                rename(&mut router.experts);
                router.correction.as_mut().map(rename);
            }
            if let Inner::Attention(attention) = &mut part.inner {
                attention.head_norms.iter_mut().flat_map(|norms| norms.iter_mut()).for_each(norm);
                if let Some(latents) = &mut attention.latents {
                    latents.queries.iter_mut().for_each(norm);
                    norm(&mut latents.keys_and_values);
                }
                attention.sinks.as_mut().map(rename);
            }
        }
        self
    }
}

impl Decoder {
    /// The decoder of a checkpoint that has the experts of a layer in stacked tensors with the names
    /// that transformers 5 has in memory: the gate and up projections of an expert are one matrix.
    #[must_use]
    pub fn stacked(mut self) -> Self {
        for layer in &mut self.layers {
            let Some(router) = &mut layer.mlp.router else { continue };
            let within = router.experts.rsplit('.').nth(1).unwrap_or_default().to_owned();
            let [module, of_router] = router.in_memory;
            let rename = |name: &mut String| {
                let mut parts: Vec<&str> = name.split('.').collect();
                parts.iter_mut().filter(|part| **part == within).for_each(|part| *part = module);
                *name = parts.join(".");
            };
            let prefix = router.experts.strip_suffix(&format!("{within}.experts"));
            let in_layer = format!("{module}.{of_router}");
            router.projection.weight = format!("{}{in_layer}.weight", prefix.unwrap_or_default());
            router.projection.name = in_layer;
            rename(&mut router.experts);
            let mut all = std::mem::take(&mut layer.mlp.projections);
            for of in &mut all {
                rename(&mut of.name);
                rename(&mut of.weight);
                of.bias.as_mut().map(rename);
            }
            layer.mlp.projections = all
                .chunk_by(|a, b| a.expert == b.expert)
                .flat_map(|own| match own {
                    [gate, up, down] if gate.expert.is_some() => {
                        fuse(&router.experts, module, gate.dims.rows + up.dims.rows, [gate, down])
                    }
                    [gate_up, down] if gate_up.expert.is_some() => {
                        fuse(&router.experts, module, gate_up.dims.rows, [gate_up, down])
                    }
                    others => others.to_vec(),
                })
                .collect();
        }
        self
    }
}

/// The matrices of an expert whose gate and up projections are one, of so many `rows`.
fn fuse(
    experts: &str,
    module: &str,
    rows: usize,
    [first, down]: [&Projection; 2],
) -> Vec<Projection> {
    let of = |name: &str, role, dims, like: &Projection| {
        let expert = like.expert.unwrap_or_default();
        let weight = format!("{experts}.{expert}.{name}.weight");
        let name = format!("{module}.experts.{expert}.{name}");
        Projection { name, role, weight, dims, ..like.clone() }
    };
    let dims = Dims { rows, columns: first.dims.columns };
    vec![
        of("gate_up_proj", Role::GateUp, dims, first),
        of("down_proj", Role::Down, down.dims, down),
    ]
}

impl Norm {
    fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.weight.iter().chain(&self.bias).map(|name| (name.as_str(), vec![self.width]))
    }
}

impl Sublayer {
    /// Number of experts; 0 if the part is no mixture.
    pub fn experts(&self) -> usize {
        self.router.as_ref().map_or(0, |router| router.projection.dims.rows)
    }

    fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let attention = match &self.inner {
            Inner::Attention(attention) => Some(attention),
            Inner::Gated(_) | Inner::Plain(_) => None,
        };
        let sinks = attention.and_then(|of| Some((of.sinks.as_deref()?, vec![of.heads])));
        let head_norms = attention.and_then(|of| of.head_norms.as_deref());
        let latents = attention.and_then(|of| of.latents.as_deref());
        let latents =
            latents.into_iter().flat_map(|of| of.queries.iter().chain([&of.keys_and_values]));
        let norms = self.input_norm.iter().chain(head_norms.into_iter().flatten()).chain(latents);
        let norms = norms.chain(&self.output_norm).chain(&self.residual_norm);
        let router = self.router.iter();
        let router = router.flat_map(|of| [&of.projection].into_iter().chain(&of.shared_gate));
        let projections = router.chain(&self.projections);
        let correction = self.router.as_ref().and_then(|of| of.correction.as_deref());
        let correction = correction.map(|name| (name, vec![self.experts()]));
        let norms = norms.flat_map(Norm::tensors);
        norms.chain(sinks).chain(correction).chain(projections.flat_map(Projection::tensors))
    }
}

impl Projection {
    /// The feed of the projection.
    pub const fn feed(&self) -> Feed {
        match self.role {
            Role::Output | Role::Down => Feed::Inner,
            Role::LatentQuery => Feed::QueryLatent,
            Role::LatentKeyValue => Feed::KeyValueLatent,
            _ => Feed::Hidden,
        }
    }

    /// The last segment of the name, such as `q_proj`, which all projections of a role have.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }

    /// Whether a recipe's `[[blocks]]` can name the projection `name`: its name, or a suffix after
    /// a dot.
    pub fn is_called(&self, name: &str) -> bool {
        let before = self.name.strip_suffix(name);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    }

    /// The names and shapes of the weight and of the bias, if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let bias = self.bias.iter().map(|bias| (bias.as_str(), vec![self.dims.rows]));
        once((self.weight.as_str(), vec![self.dims.rows, self.dims.columns])).chain(bias)
    }
}

impl Layer {
    /// The sublayer of a part.
    pub fn part(&self, part: Part) -> &Sublayer {
        match part {
            Part::Attention => &self.attention,
            Part::Mlp => &self.mlp,
        }
    }

    fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        // The parts of a parallel layer may share a norm.
        let norms = [&self.attention.input_norm, &self.mlp.input_norm];
        let shared = norms[0].iter().filter(|norm| Some(*norm) == norms[1].as_ref());
        let shared = shared.flat_map(Norm::tensors).count();
        self.attention.tensors().chain(self.mlp.tensors().skip(shared))
    }

    /// The projections of one part.
    pub fn projections(&self, part: Part) -> &[Projection] {
        &self.part(part).projections
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
        path::Path,
    };

    use serde_json::json;

    use super::*;
    use crate::checkpoint::Reader;

    #[test]
    fn lists_exactly_what_transformers_saves() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits");
        let (mut checkpoints, mut families) = (0, BTreeSet::new());
        for checkpoint in fs::read_dir(folder).unwrap() {
            let checkpoint = checkpoint.unwrap().path();
            let config = fs::read(checkpoint.join("config.json")).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            let found = decoder(&config).unwrap();
            let listed = || found.tensors().map(|(name, shape)| (name.to_owned(), shape));
            assert_eq!(listed().count(), listed().collect::<BTreeMap<_, _>>().len());
            let listed: BTreeMap<_, _> = listed().collect();
            // The matrices of experts are by themselves, stacked or not.
            let reader = Reader::open(&checkpoint).unwrap();
            let shape = |name: &str| reader.tensor(name).unwrap().shape.to_vec();
            let mut saved: BTreeMap<_, _> =
                reader.names().map(|name| (name.to_owned(), shape(name))).collect();
            // The other models beside a text model.
            if found.own_head.starts_with("language_model.") {
                saved.retain(|name, _| name.starts_with("language_model."));
            }
            assert_eq!(listed, saved, "{}", checkpoint.display());
            checkpoints += 1;
            families.insert(config["model_type"].as_str().unwrap().to_owned());
        }
        assert_eq!(checkpoints, 71);
        assert_eq!(families, FAMILIES.iter().map(|of| of.model_type.to_owned()).collect());
    }

    #[test]
    fn a_decoder_without_its_head_has_no_prefix() {
        let config = json!({
            "model_type": "opt", "vocab_size": 16, "hidden_size": 8, "ffn_dim": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 4,
        });
        let bare = decoder(&config).unwrap().renamed(&[("model.", "")]);
        for (name, _) in bare.tensors() {
            assert!(name.starts_with("decoder."), "{name}");
        }
        assert_eq!(bare.head, bare.embedding.weight);
    }

    #[test]
    fn layer_types_decide_who_slides() {
        let mut config = json!({
            "model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 4, "use_sliding_window": true, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        });
        let windows = |config: &Value| {
            decoder(config).map(|decoder| {
                let window = |layer: &Layer| match &layer.attention.inner {
                    Inner::Attention(attention) => attention.window,
                    Inner::Gated(_) | Inner::Plain(_) => panic!("no attention"),
                };
                decoder.layers.iter().map(window).collect::<Vec<_>>()
            })
        };
        assert_eq!(windows(&config).unwrap(), [Some(3), None]);
        config["layer_types"][1] = "linear_attention".into();
        let error = windows(&config).unwrap_err().to_string();
        assert!(error.contains("linear_attention") && error.contains("known: full"), "{error}");
        config["layer_types"] = json!(["sliding_attention"]);
        let error = windows(&config).unwrap_err().to_string();
        assert!(error.contains("`layer_types` is a list of 1"), "{error}");
        config["layer_types"] = json!(["sliding_attention", "full_attention"]);
        config["sliding_window"] = Value::Null;
        let error = windows(&config).unwrap_err().to_string();
        assert!(error.contains("`layer_types`") && error.contains("`sliding_window`"), "{error}");
        config["layer_types"] = Value::Null;
        config["max_window_layers"] = 0.into();
        assert_eq!(windows(&config).unwrap(), [None, None]);
    }

    #[test]
    fn positions_end_softly_or_hard() {
        let limit = |family: &str, key: &str, value: Value| {
            let mut config = json!({
                "model_type": family, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
                "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 4,
            });
            config[key] = value;
            let found = decoder(&config).unwrap();
            assert_eq!(found.max_positions() == found.positions().tokens, key != "rope_scaling");
            found.positions()
        };
        let soft = |tokens| PositionLimit { tokens, hard: false };
        for (family, tokens) in [
            ("cohere2", 8192),
            ("deepseek_v3", 4096),
            ("exaone4", 2048),
            ("gemma2", 8192),
            ("gemma3_text", 131_072),
            ("glm4", 131_072),
            ("gpt_neox", 2048),
            ("granite", 2048),
            ("granitemoe", 2048),
            ("llama", 2048),
            ("ministral", 131_072),
            ("mistral", 131_072),
            ("mixtral", 131_072),
            ("nemotron", 4096),
            ("olmo2", 2048),
            ("olmo3", 2048),
            ("olmoe", 4096),
            ("phi", 2048),
            ("phi3", 4096),
            ("qwen2", 32_768),
            ("qwen2_moe", 32_768),
            ("qwen3", 32_768),
            ("qwen3_moe", 32_768),
            ("seed_oss", 524_288),
            ("smollm3", 32_768),
        ] {
            assert_eq!(limit(family, "max_position_embeddings", Value::Null), soft(tokens));
            assert_eq!(limit(family, "max_position_embeddings", json!(100)), soft(100));
            assert_eq!(limit(family, "sliding_window", json!(3)), soft(tokens), "{family}");
        }
        let yarn = json!({
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768,
        });
        assert_eq!(limit("qwen2", "rope_scaling", yarn), soft(131_072));
        let opt = limit("opt", "max_position_embeddings", json!(100));
        assert_eq!(opt, PositionLimit { tokens: 100, hard: true });
    }

    #[test]
    fn absurd_configurations_are_refused() {
        for family in FAMILIES {
            // A model with images has the keys in `text_config`.
            let found = |keys: &Value| {
                let mut config = json!({ "text_config": keys });
                config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
                config["model_type"] = family.model_type.into();
                decoder(&config)
            };
            let mut config = json!({
                "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "ffn_dim": 8,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 4,
            });
            if family.model_type == "ministral3" {
                config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6});
            }
            assert!(found(&config).is_ok(), "{}", family.model_type);
            for key in ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"] {
                let fine = config[key].clone();
                for absurd in [json!(0), json!(-3), json!(u64::MAX), json!(1e30), json!("8")] {
                    config[key] = absurd;
                    let error = found(&config).unwrap_err().to_string();
                    assert!(error.contains(key), "{}: {error}", family.model_type);
                }
                config[key] = fine;
            }
        }
    }
}
