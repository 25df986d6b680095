//! The architecture of LLaMA and its successors: RMS norms, rotary positions, a gated MLP.
//! [`Style`] has the differences between families.

use barber_metric::Dims;

use super::{
    Activation, Attention, Decoder, Embedding, HEAD, Inner, Layer, Norm, NormKind, Projection,
    Role, Sublayer, activation,
    config::{self, Error, Object},
    rope,
};

/// Maximum number of channels of a head.
const WIDEST_HEAD: usize = 1 << 16;

/// The settings that distinguish a family.
pub(super) struct Style {
    /// The default of `num_key_value_heads`; `None` for the number of query heads.
    pub(super) kv_heads: Option<usize>,
    /// The default of `head_dim`; `None` for the hidden size divided by the number of heads.
    pub(super) head_dim: Option<usize>,
    /// The default of `rms_norm_eps`.
    pub(super) epsilon: f64,
    /// The default of `tie_word_embeddings`.
    pub(super) tied: bool,
    /// Whether the query, key and value projections have biases.
    pub(super) qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub(super) output_bias: bool,
    /// Whether the linear layers of the MLP have biases.
    pub(super) mlp_bias: bool,
    /// Whether query, key and value are one matrix, and gate and up another.
    pub(super) fused: bool,
    /// Whether queries and keys have norms.
    pub(super) head_norms: bool,
    /// Whether each part has a norm after it as well as before, all scaled by 1 + weight.
    pub(super) sandwich: bool,
    /// The key of the activation, and its default.
    pub(super) activation: (&'static str, Activation),
    /// The number whose square root divides the scores; `None` for the width of a head.
    pub(super) query_scale: Option<f64>,
    /// The soft cap of the scores.
    pub(super) score_cap: Option<f32>,
    /// The soft cap of the logits.
    pub(super) logit_cap: Option<f32>,
    /// Whether the embedding is multiplied by √hidden_size.
    pub(super) scaled_embedding: bool,
    /// The settings of the position code.
    pub(super) rope: rope::Style,
}

impl Style {
    /// The style with this default of `max_position_embeddings`.
    pub(super) const fn with_positions(mut self, max_positions: usize) -> Self {
        self.rope.max_positions = max_positions;
        self
    }

    /// The style of LLaMA.
    pub(super) const fn llama() -> Self {
        Self {
            kv_heads: None,
            head_dim: None,
            epsilon: 1e-6,
            tied: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            fused: false,
            head_norms: false,
            sandwich: false,
            activation: ("hidden_act", Activation::Silu),
            query_scale: None,
            score_cap: None,
            logit_cap: None,
            scaled_embedding: false,
            rope: rope::Style {
                max_positions: 2048,
                original_max_positions: None,
                partial: false,
                renamed: &[],
            },
        }
    }

    /// The decoder of a `config.json`; `window` gives the sliding window of each layer.
    pub(super) fn decoder(
        &self,
        config: &Object<'_>,
        window: impl Fn(usize) -> Option<usize>,
    ) -> Result<Decoder, Error> {
        let required = |key| config.size(key)?.ok_or_else(|| config.missing(key));
        let hidden_size = required("hidden_size")?;
        let intermediate_size = required("intermediate_size")?;
        let vocab_size = required("vocab_size")?;
        let count = "num_hidden_layers";
        let count = config.layers(count)?.ok_or_else(|| config.missing(count))?;
        let (heads, kv_heads, head_dim) = self.heads(config, hidden_size)?;
        let epsilon = config.below_one("rms_norm_eps")?.unwrap_or(self.epsilon);
        let (key, default) = self.activation;
        let activation = config.choice(key, activation::NAMES)?.unwrap_or(default);
        let rope = rope::read(config, &self.rope, head_dim)?;
        let scale = match self.query_scale {
            Some(scale) => (scale as f32).sqrt().recip(),
            None => (head_dim as f32).sqrt().recip(),
        };
        let norm = |name: String, width| Norm {
            weight: Some(format!("{name}.weight")),
            bias: None,
            width,
            epsilon: epsilon as f32,
            kind: if self.sandwich { NormKind::RmsOnePlus } else { NormKind::Rms },
        };
        let shape = Shape {
            hidden_size,
            intermediate_size,
            queries: heads * head_dim,
            keys: kv_heads * head_dim,
        };
        let layer = |index: usize| {
            let prefix = format!("model.layers.{index}");
            let named = |name: &str| norm(format!("{prefix}.{name}"), hidden_size);
            let of_head = |name: &str| norm(format!("{prefix}.self_attn.{name}"), head_dim);
            let [after_attention, before_mlp, after_mlp] = if self.sandwich {
                ["post_attention", "pre_feedforward", "post_feedforward"]
                    .map(|name| Some(named(&format!("{name}_layernorm"))))
            } else {
                [None, Some(named("post_attention_layernorm")), None]
            };
            let attention = Attention {
                heads,
                kv_heads,
                head_dim,
                scale,
                window: window(index),
                score_cap: self.score_cap,
                head_norms: self.head_norms.then(|| ["q_norm", "k_norm"].map(of_head)),
            };
            Layer {
                attention: Sublayer {
                    input_norm: Some(named("input_layernorm")),
                    projections: self.attention(&prefix, &shape),
                    inner: Inner::Attention(attention),
                    output_norm: after_attention,
                    residual_norm: None,
                },
                mlp: Sublayer {
                    input_norm: before_mlp,
                    projections: self.mlp(&prefix, &shape),
                    inner: Inner::Gated(activation),
                    output_norm: after_mlp,
                    residual_norm: None,
                },
            }
        };
        let weight = "model.embed_tokens.weight".to_owned();
        let tied = config.boolean("tie_word_embeddings")?.unwrap_or(self.tied);
        Ok(Decoder {
            hidden_size,
            vocab_size,
            rope: Some(rope),
            layers: (0..count).map(layer).collect(),
            final_norm: Some(norm("model.norm".into(), hidden_size)),
            project_out: None,
            head: if tied { weight.clone() } else { HEAD.to_owned() },
            logit_cap: self.logit_cap,
            embedding: Embedding {
                weight,
                width: hidden_size,
                scale: if self.scaled_embedding { (hidden_size as f32).sqrt() } else { 1.0 },
                project_in: None,
                positions: None,
            },
        })
    }

    /// The numbers of query heads and key heads, and the width of a head.
    fn heads(
        &self,
        config: &Object<'_>,
        hidden_size: usize,
    ) -> Result<(usize, usize, usize), Error> {
        let heads = "num_attention_heads";
        let heads = config.size(heads)?.ok_or_else(|| config.missing(heads))?;
        let kv_heads = config.size_or("num_key_value_heads", self.kv_heads)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("it must divide `num_attention_heads`, {heads}");
            return Err(config.invalid("num_key_value_heads", kv_heads, problem));
        }
        let (head_dim, source) = match config.size_or("head_dim", self.head_dim)? {
            Some(head_dim) => (head_dim, "head_dim"),
            None if hidden_size.is_multiple_of(heads) => (hidden_size / heads, "hidden_size"),
            None => {
                let problem = format!(
                    "without `head_dim` it must be a multiple of `num_attention_heads`, {heads}"
                );
                return Err(config.invalid("hidden_size", hidden_size, problem));
            }
        };
        let odd = |problem: &str| {
            let found = config.size(source).ok().flatten().unwrap_or(head_dim);
            let problem = format!("{heads} heads of {head_dim} channels: {problem}");
            config.invalid(source, found, problem)
        };
        if !head_dim.is_multiple_of(2) {
            return Err(odd("rotary positions need an even number"));
        }
        let width = heads.checked_mul(head_dim).filter(|width| *width <= config::MOST / 3);
        match width.filter(|_| head_dim <= WIDEST_HEAD) {
            Some(_) => Ok((heads, kv_heads, head_dim)),
            None => Err(odd("that is too many")),
        }
    }

    fn attention(&self, layer: &str, shape: &Shape) -> Vec<Projection> {
        let &Shape { hidden_size: hidden, queries, keys, .. } = shape;
        let input = |name, role, rows| projection(layer, name, role, (rows, hidden), self.qkv_bias);
        let mut all = if self.fused {
            vec![input("self_attn.qkv_proj", Role::QueryKeyValue, queries + 2 * keys)]
        } else {
            vec![
                input("self_attn.q_proj", Role::Query, queries),
                input("self_attn.k_proj", Role::Key, keys),
                input("self_attn.v_proj", Role::Value, keys),
            ]
        };
        let (name, dims) = ("self_attn.o_proj", (hidden, queries));
        all.push(projection(layer, name, Role::Output, dims, self.output_bias));
        all
    }

    fn mlp(&self, layer: &str, shape: &Shape) -> Vec<Projection> {
        let &Shape { hidden_size: hidden, intermediate_size: inner, .. } = shape;
        let input = |name, role, rows| projection(layer, name, role, (rows, hidden), self.mlp_bias);
        let mut all = if self.fused {
            vec![input("mlp.gate_up_proj", Role::GateUp, 2 * inner)]
        } else {
            vec![input("mlp.gate_proj", Role::Gate, inner), input("mlp.up_proj", Role::Up, inner)]
        };
        all.push(projection(layer, "mlp.down_proj", Role::Down, (hidden, inner), self.mlp_bias));
        all
    }
}

/// The shape that all layers of a model share.
struct Shape {
    hidden_size: usize,
    intermediate_size: usize,
    queries: usize,
    keys: usize,
}

/// The projection of this name in the decoder layer whose tensor names start with `layer`.
pub(super) fn projection(
    layer: &str,
    name: &str,
    role: Role,
    (rows, columns): (usize, usize),
    bias: bool,
) -> Projection {
    Projection {
        name: name.into(),
        role,
        expert: None,
        weight: format!("{layer}.{name}.weight"),
        bias: bias.then(|| format!("{layer}.{name}.bias")),
        dims: Dims { rows, columns },
    }
}
