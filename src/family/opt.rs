//! The OPT family (arXiv 2205.01068): layer norms, learned positions, a plain MLP, biases.

use super::{
    Activation, Attention, Decoder, Embedding, Family, HEAD, Inner, Layer, LearnedPositions, Norm,
    NormKind, Projection, Role, Sublayer, activation,
    config::{Error, Object},
    rms::projection,
};

pub(super) const FAMILY: Family = Family {
    model_type: "opt",
    doc: "OPT and Galactica: LayerNorm, learned positions, a plain MLP, biases",
    decoder,
};

/// Number of unused rows at the start of the position table.
const OFFSET: usize = 2;

/// The defaults are those of transformers' `OPTConfig`, except for sizes, which every checkpoint
/// has.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let required = |key| config.size(key)?.ok_or_else(|| config.missing(key));
    let yes = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(true));
    let hidden_size = required("hidden_size")?;
    let inner = required("ffn_dim")?;
    let heads = required("num_attention_heads")?;
    let count = "num_hidden_layers";
    let count = config.layers(count)?.ok_or_else(|| config.missing(count))?;
    if !hidden_size.is_multiple_of(heads) {
        let problem = format!("it must be a multiple of `num_attention_heads`, {heads}");
        return Err(config.invalid("hidden_size", hidden_size, problem));
    }
    let affine = yes("layer_norm_elementwise_affine")?;
    let activation = config.choice("activation_function", activation::NAMES)?;
    let activation = activation.unwrap_or(Activation::Relu);
    let (biased, before) = (yes("enable_bias")?, yes("do_layer_norm_before")?);
    let head_dim = hidden_size / heads;
    let norm = |name: String| Norm {
        weight: affine.then(|| format!("{name}.weight")),
        bias: affine.then(|| format!("{name}.bias")),
        width: hidden_size,
        epsilon: 1e-5,
        kind: NormKind::Layer,
        scale: 1.0,
    };
    let part = |norm: Norm, projections, inner| Sublayer {
        input_norm: before.then(|| norm.clone()),
        projections,
        inner,
        router: None,
        output_norm: None,
        residual_norm: (!before).then_some(norm),
    };
    let layer = |index: usize| {
        let prefix = format!("model.decoder.layers.{index}");
        let named = |name: &str| norm(format!("{prefix}.{name}"));
        let attention =
            |(name, role)| projection(&prefix, name, role, (hidden_size, hidden_size), biased);
        let heads = Attention {
            heads,
            kv_heads: heads,
            head_dim,
            value_dim: head_dim,
            scale: (head_dim as f32).sqrt().recip(),
            window: None,
            score_cap: None,
            rope: None,
            head_norms: None,
            sinks: None,
            latents: None,
        };
        Layer {
            parallel: false,
            attention: part(
                named("self_attn_layer_norm"),
                [
                    ("self_attn.q_proj", Role::Query),
                    ("self_attn.k_proj", Role::Key),
                    ("self_attn.v_proj", Role::Value),
                    ("self_attn.out_proj", Role::Output),
                ]
                .map(attention)
                .into(),
                Inner::Attention(heads),
            ),
            mlp: part(
                named("final_layer_norm"),
                vec![
                    projection(&prefix, "fc1", Role::Up, (inner, hidden_size), biased),
                    projection(&prefix, "fc2", Role::Down, (hidden_size, inner), biased),
                ],
                Inner::Plain(activation),
            ),
        }
    };
    let width = config.size("word_embed_proj_dim")?.unwrap_or(hidden_size);
    let project = |name, rows, columns| -> Option<Projection> {
        let projection =
            || projection("model.decoder", name, Role::Embedding, (rows, columns), false);
        (width != hidden_size).then(projection)
    };
    let final_norm = before && !config.boolean("_remove_final_layer_norm")?.unwrap_or(false);
    let weight = "model.decoder.embed_tokens.weight".to_owned();
    let tied = yes("tie_word_embeddings")?;
    Ok(Decoder {
        hidden_size,
        vocab_size: required("vocab_size")?,
        ropes: Vec::new(),
        layers: (0..count).map(layer).collect(),
        final_norm: final_norm.then(|| norm("model.decoder.final_layer_norm".into())),
        project_out: project("project_out", width, hidden_size),
        head: if tied { weight.clone() } else { HEAD.to_owned() },
        own_head: HEAD.to_owned(),
        head_bias: None,
        logit_cap: None,
        embedding: Embedding {
            weight,
            width,
            scale: 1.0,
            project_in: project("project_in", hidden_size, width),
            positions: Some(LearnedPositions {
                weight: "model.decoder.embed_positions.weight".into(),
                offset: OFFSET,
                count: config.size("max_position_embeddings")?.unwrap_or(2048),
            }),
        },
    })
}
