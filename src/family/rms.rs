//! The architecture of LLaMA and its successors: norms of hidden states, rotary positions, an MLP.
//! [`Style`] has the differences between families.

use barber_metric::Dims;

use super::{
    Activation, Attention, Decoder, Embedding, Gating, Inner, Latents, Layer, Norm, NormKind,
    Projection, Role, Sublayer, activation,
    config::{self, Error, Object},
    experts::Experts,
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
    /// Whether `head_dim` of `config.json` counts; if not, the head size is always the hidden size
    /// divided by the number of heads.
    pub(super) has_head_dim: bool,
    /// The default of `num_attention_heads`; `None` if every checkpoint has it.
    pub(super) heads: Option<usize>,
    /// The default of `vocab_size`; `None` if every checkpoint has it.
    pub(super) vocab_size: Option<usize>,
    /// The key of the norms' epsilon.
    pub(super) epsilon_key: &'static str,
    /// The default of the norms' epsilon.
    pub(super) epsilon: f64,
    /// The default of `tie_word_embeddings`.
    pub(super) tied: bool,
    /// Whether the query, key and value projections have biases.
    pub(super) qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub(super) output_bias: bool,
    /// Whether the linear layers of the MLP have biases.
    pub(super) mlp_bias: bool,
    /// Whether the output head has a bias.
    pub(super) head_bias: bool,
    /// Whether query, key and value are one matrix, and gate and up another.
    pub(super) fused: bool,
    /// Whether gate and up are one matrix, without query, key and value being one.
    pub(super) fused_mlp: bool,
    /// Whether the MLP has a gate.
    pub(super) gated: bool,
    /// Whether the MLP reads the hidden states before attention.
    pub(super) parallel: bool,
    /// The norms of queries and keys.
    pub(super) head_norms: HeadNorms,
    /// The widths of latent attention, if the family has it.
    pub(super) latent: Option<LatentWidths>,
    /// The names of tensors.
    pub(super) names: Names,
    /// The names of the norms around the parts.
    pub(super) norms: NormNames,
    /// Kind of the norms.
    pub(super) norm_kind: NormKind,
    /// Whether the norms have biases.
    pub(super) norm_bias: bool,
    /// The key of the activation, and its default.
    pub(super) activation: (&'static str, Activation),
    /// The gate of the MLP, if the configuration does not say it.
    pub(super) gating: Option<Gating>,
    /// The name of the sinks of attention, if there are any.
    pub(super) sinks: Option<&'static str>,
    /// Factor of the scores; `None` for 1 / √head_dim.
    pub(super) score_scale: Option<f32>,
    /// The soft cap of the scores.
    pub(super) score_cap: Option<f32>,
    /// The soft cap of the logits.
    pub(super) logit_cap: Option<f32>,
    /// Factor of the logits.
    pub(super) logit_scale: f32,
    /// Whether the embedding is multiplied by √hidden_size.
    pub(super) scaled_embedding: bool,
    /// Factor of the embedding.
    pub(super) embedding_scale: f32,
    /// Factor of the parts' outputs.
    pub(super) residual_scale: f64,
    /// The experts in place of the MLP, if the family has them.
    pub(super) experts: Option<Experts>,
    /// The settings of the position code.
    pub(super) rope: rope::Style,
}

/// The norms of queries and keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HeadNorms {
    /// No norms.
    None,
    /// Norms of each head.
    Each,
    /// Norms of all heads together.
    Together,
}

/// The widths of latent attention; all numbers of channels.
#[derive(Clone, Copy)]
pub(super) struct LatentWidths {
    /// The latent of queries, if there is one.
    pub(super) queries: Option<usize>,
    /// The latent of keys and values.
    pub(super) keys_and_values: usize,
    /// A query or key of a head, as far as it is not rotated.
    pub(super) plain: usize,
    /// The rotated channels of a head, and their key in the configuration.
    pub(super) rotated: (usize, &'static str),
    /// A value of a head.
    pub(super) value: usize,
}

/// Constant of the norms of latents.
const LATENT_EPSILON: f64 = 1e-6;

/// The names of modules; those in a layer without its prefix.
pub(super) struct Names {
    /// The embedding of tokens.
    pub(super) embedding: &'static str,
    /// The layers; a layer's index follows.
    pub(super) layers: &'static str,
    /// The norm after the last layer.
    pub(super) final_norm: &'static str,
    /// The output head, if it is not tied to the embedding.
    pub(super) head: &'static str,
    /// Query, key and value in one matrix, and what it is.
    pub(super) fused: (&'static str, Role),
    /// The output of attention.
    pub(super) output: &'static str,
    /// The norms of queries and of keys.
    pub(super) head_norms: [&'static str; 2],
    /// The inner states of the MLP.
    pub(super) up: &'static str,
    /// The output of the MLP.
    pub(super) down: &'static str,
}

/// The names of a layer's norms of hidden states, as far as it has them.
pub(super) struct NormNames {
    pub(super) before_attention: Option<&'static str>,
    pub(super) after_attention: Option<&'static str>,
    pub(super) before_mlp: Option<&'static str>,
    pub(super) after_mlp: Option<&'static str>,
}

/// How the attention of a layer differs from that of other layers.
pub(super) struct LayerAttention {
    /// The sliding window.
    pub(super) window: Option<usize>,
    /// Index of the rotary position code.
    pub(super) rope: Option<usize>,
}

impl From<Option<usize>> for LayerAttention {
    /// A layer with this window, and the only position code.
    fn from(window: Option<usize>) -> Self {
        Self { window, rope: Some(0) }
    }
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
            has_head_dim: true,
            heads: None,
            vocab_size: None,
            epsilon_key: "rms_norm_eps",
            epsilon: 1e-6,
            tied: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            head_bias: false,
            fused: false,
            fused_mlp: false,
            gated: true,
            parallel: false,
            head_norms: HeadNorms::None,
            latent: None,
            names: Names {
                embedding: "model.embed_tokens",
                layers: "model.layers",
                final_norm: "model.norm",
                head: "lm_head",
                fused: ("self_attn.qkv_proj", Role::QueryKeyValue),
                output: "self_attn.o_proj",
                head_norms: ["self_attn.q_norm", "self_attn.k_norm"],
                up: "mlp.up_proj",
                down: "mlp.down_proj",
            },
            norms: NormNames {
                before_attention: Some("input_layernorm"),
                after_attention: None,
                before_mlp: Some("post_attention_layernorm"),
                after_mlp: None,
            },
            norm_kind: NormKind::Rms,
            norm_bias: false,
            activation: ("hidden_act", Activation::Silu),
            gating: None,
            sinks: None,
            score_scale: None,
            score_cap: None,
            logit_cap: None,
            logit_scale: 1.0,
            scaled_embedding: false,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            experts: None,
            rope: rope::Style::llama(),
        }
    }

    /// The decoder of a `config.json`; `attention` gives the sliding window of each layer, or all in
    /// which the layer's attention differs.
    pub(super) fn decoder<A: Into<LayerAttention>>(
        &self,
        config: &Object<'_>,
        attention: impl Fn(usize) -> A,
    ) -> Result<Decoder, Error> {
        let required = |key| config.size(key)?.ok_or_else(|| config.missing(key));
        let hidden_size = required("hidden_size")?;
        let intermediate_size = required("intermediate_size")?;
        let vocab_size = config.size_or("vocab_size", self.vocab_size)?;
        let vocab_size = vocab_size.ok_or_else(|| config.missing("vocab_size"))?;
        let count = "num_hidden_layers";
        let count = config.layers(count)?.ok_or_else(|| config.missing(count))?;
        let (heads, kv_heads, head_dim) = self.heads(config, hidden_size)?;
        let epsilon = config.below_one(self.epsilon_key)?.unwrap_or(self.epsilon);
        let (key, default) = self.activation;
        let activation = config.choice(key, activation::NAMES)?.unwrap_or(default);
        let rotated = self.latent.as_ref().map_or(head_dim, |latent| latent.rotated.0);
        let value_dim = self.latent.as_ref().map_or(head_dim, |latent| latent.value);
        let ropes = rope::read(config, &self.rope, rotated)?;
        let scale = self.score_scale.unwrap_or_else(|| (head_dim as f32).sqrt().recip());
        let norm = |name: String, width, epsilon: f64| Norm {
            weight: Some(format!("{name}.weight")),
            bias: self.norm_bias.then(|| format!("{name}.bias")),
            width,
            epsilon: epsilon as f32,
            kind: self.norm_kind,
            scale: 1.0,
        };
        // A factor m of the parts' outputs is left out by dividing the hidden states by m: then their
        // norms have ε / m² in place of ε.
        let of_states = |name: String| {
            norm(name, hidden_size, epsilon / (self.residual_scale * self.residual_scale))
        };
        let shape = Shape {
            hidden_size,
            intermediate_size,
            queries: heads * head_dim,
            keys: kv_heads * head_dim,
            values: heads * value_dim,
            heads,
        };
        let head_norms = |prefix: &str| {
            let [queries, keys] = match self.head_norms {
                HeadNorms::None => return None,
                HeadNorms::Each => [head_dim, head_dim],
                HeadNorms::Together => [shape.queries, shape.keys],
            };
            let [q, k] = self.names.head_norms.map(|name| format!("{prefix}.{name}"));
            Some(Box::new([norm(q, queries, epsilon), norm(k, keys, epsilon)]))
        };
        let latents = |prefix: &str, latent: &LatentWidths| {
            let norm = |name: &str, width| {
                norm(format!("{prefix}.self_attn.{name}_layernorm"), width, LATENT_EPSILON)
            };
            Box::new(Latents {
                queries: latent.queries.map(|width| norm("q_a", width)),
                keys_and_values: norm("kv_a", latent.keys_and_values),
                rotated,
            })
        };
        let layer = |index: usize| {
            let prefix = format!("{}.{index}", self.names.layers);
            let around =
                |name: Option<&str>| name.map(|name| of_states(format!("{prefix}.{name}")));
            let LayerAttention { window, rope } = attention(index).into();
            let attention = Attention {
                heads,
                kv_heads,
                head_dim,
                value_dim,
                scale,
                window,
                score_cap: self.score_cap,
                rope,
                head_norms: head_norms(&prefix),
                sinks: self.sinks.map(|name| format!("{prefix}.{name}")),
                latents: self.latent.as_ref().map(|latent| latents(&prefix, latent)),
            };
            let experts = self.experts.as_ref().filter(|experts| experts.are_in(index));
            let (router, projections) = match experts {
                Some(experts) => {
                    let (router, all) = experts.part(&prefix, hidden_size);
                    (Some(router), all)
                }
                None => (None, self.mlp(&prefix, &shape)),
            };
            Layer {
                parallel: self.parallel,
                attention: Sublayer {
                    input_norm: around(self.norms.before_attention),
                    projections: self.attention(&prefix, &shape),
                    inner: Inner::Attention(attention),
                    router: None,
                    output_norm: around(self.norms.after_attention),
                    residual_norm: None,
                },
                mlp: Sublayer {
                    input_norm: around(self.norms.before_mlp),
                    projections,
                    inner: match self.gated {
                        true => Inner::Gated(self.gating.unwrap_or(activation.into())),
                        false => Inner::Plain(activation),
                    },
                    router,
                    output_norm: around(self.norms.after_mlp),
                    residual_norm: None,
                },
            }
        };
        let weight = format!("{}.weight", self.names.embedding);
        let own_head = format!("{}.weight", self.names.head);
        let tied = config.boolean("tie_word_embeddings")?.unwrap_or(self.tied);
        let scaled = if self.scaled_embedding { (hidden_size as f32).sqrt() } else { 1.0 };
        let final_norm =
            Norm { scale: self.logit_scale, ..of_states(self.names.final_norm.to_owned()) };
        Ok(Decoder {
            hidden_size,
            vocab_size,
            ropes,
            layers: (0..count).map(layer).collect(),
            final_norm: Some(final_norm),
            project_out: None,
            head: if tied { weight.clone() } else { own_head.clone() },
            own_head,
            head_bias: self.head_bias.then(|| format!("{}.bias", self.names.head)),
            logit_cap: self.logit_cap,
            embedding: Embedding {
                weight,
                width: hidden_size,
                scale: scaled * self.embedding_scale / self.residual_scale as f32,
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
        let heads = config.size_or(heads, self.heads)?.ok_or_else(|| config.missing(heads))?;
        if let Some(LatentWidths { plain, rotated: (rotated, key), value, .. }) = self.latent {
            let problem = match () {
                () if !rotated.is_multiple_of(2) => "rotary positions need an even number",
                () if [plain, rotated, value].iter().any(|width| *width > WIDEST_HEAD)
                    || heads > config::MOST / 3 / (plain + rotated + value) =>
                {
                    "with the other widths that is too many"
                }
                () => return Ok((heads, heads, plain + rotated)),
            };
            return Err(config.invalid(key, rotated, problem));
        }
        let kv_heads = config.size_or("num_key_value_heads", self.kv_heads)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("it must divide `num_attention_heads`, {heads}");
            return Err(config.invalid("num_key_value_heads", kv_heads, problem));
        }
        let given = self.has_head_dim.then(|| config.size_or("head_dim", self.head_dim));
        let (head_dim, source) = match given.transpose()?.flatten() {
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
        let mut all = if let Some(latent) = &self.latent {
            let &LatentWidths { queries: of_queries, keys_and_values, plain, value, .. } = latent;
            let of = |name, role, dims| projection(layer, name, role, dims, false);
            let mut all = match of_queries {
                None => vec![of("self_attn.q_proj", Role::Query, (queries, hidden))],
                Some(width) => vec![
                    input("self_attn.q_a_proj", Role::QueryLatent, width),
                    of("self_attn.q_b_proj", Role::LatentQuery, (queries, width)),
                ],
            };
            let width = keys_and_values + latent.rotated.0;
            all.push(input("self_attn.kv_a_proj_with_mqa", Role::KeyValueLatent, width));
            let dims = (shape.heads * (plain + value), keys_and_values);
            all.push(of("self_attn.kv_b_proj", Role::LatentKeyValue, dims));
            all
        } else if self.fused {
            let (name, role) = self.names.fused;
            vec![input(name, role, queries + 2 * keys)]
        } else {
            vec![
                input("self_attn.q_proj", Role::Query, queries),
                input("self_attn.k_proj", Role::Key, keys),
                input("self_attn.v_proj", Role::Value, keys),
            ]
        };
        let (name, dims) = (self.names.output, (hidden, shape.values));
        all.push(projection(layer, name, Role::Output, dims, self.output_bias));
        all
    }

    fn mlp(&self, layer: &str, shape: &Shape) -> Vec<Projection> {
        let &Shape { hidden_size: hidden, intermediate_size: inner, .. } = shape;
        let input = |name, role, rows| projection(layer, name, role, (rows, hidden), self.mlp_bias);
        let Names { up, down, .. } = self.names;
        let mut all = match self.gated {
            false => vec![input(up, Role::Up, inner)],
            true if self.fused || self.fused_mlp => {
                vec![input("mlp.gate_up_proj", Role::GateUp, 2 * inner)]
            }
            true => vec![input("mlp.gate_proj", Role::Gate, inner), input(up, Role::Up, inner)],
        };
        all.push(projection(layer, down, Role::Down, (hidden, inner), self.mlp_bias));
        all
    }
}

/// The shape that all layers of a model share.
struct Shape {
    hidden_size: usize,
    intermediate_size: usize,
    queries: usize,
    keys: usize,
    /// Number of channels of the heads' outputs.
    values: usize,
    heads: usize,
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
