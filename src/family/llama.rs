//! The LLaMA family (arXiv 2302.13971): RMSNorm, rotary positions, grouped-query attention,
//! SwiGLU.

use barber_metric::Dims;
use serde::Deserialize;
use serde_json::Value;

use super::{Decoder, Error, Layer, Linear, rope::Rope};

#[derive(Deserialize)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_epsilon")]
    rms_norm_eps: f32,
    vocab_size: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
}

// The defaults of transformers' `LlamaConfig`.
fn default_epsilon() -> f32 {
    1e-6
}

fn default_activation() -> String {
    "silu".into()
}

fn default_positions() -> usize {
    2048
}

/// Far above any model's, far below what would overflow a product of three.
const LARGEST: usize = 1 << 20;

pub(super) fn read(config: &Value) -> Result<Decoder, Error> {
    let c = Config::deserialize(config)
        .map_err(|e| Error::Key { key: "config.json".into(), problem: e.to_string() })?;
    let bad = |key: &str, problem: String| Error::Key { key: key.into(), problem };
    let kv_heads = c.num_key_value_heads.unwrap_or(c.num_attention_heads);
    for (key, size) in [
        ("hidden_size", c.hidden_size),
        ("intermediate_size", c.intermediate_size),
        ("num_hidden_layers", c.num_hidden_layers),
        ("num_attention_heads", c.num_attention_heads),
        ("num_key_value_heads", kv_heads),
        ("vocab_size", c.vocab_size),
    ] {
        if !(1..=LARGEST).contains(&size) {
            return Err(bad(key, format!("must be from 1 to {LARGEST}, not {size}")));
        }
    }
    if c.hidden_act != "silu" {
        return Err(bad("hidden_act", format!("must be \"silu\", not {:?}", c.hidden_act)));
    }
    if !c.num_attention_heads.is_multiple_of(kv_heads) {
        let problem = format!(
            "{kv_heads} key and value heads do not divide the {} query heads",
            c.num_attention_heads
        );
        return Err(bad("num_key_value_heads", problem));
    }
    let head_dim = c.head_dim.unwrap_or(c.hidden_size / c.num_attention_heads);
    if !(2..=LARGEST).contains(&head_dim) || !head_dim.is_multiple_of(2) {
        return Err(bad("head_dim", format!("must be even and positive, not {head_dim}")));
    }
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_attention_heads * head_dim, kv_heads * head_dim);
    let layers = (0..c.num_hidden_layers).map(|i| {
        let linear = |part: &str, name: &'static str, rows, columns, biased: bool| {
            let prefix = format!("model.layers.{i}.{part}.{name}");
            Linear {
                name,
                weight: format!("{prefix}.weight"),
                bias: biased.then(|| format!("{prefix}.bias")),
                dims: Dims { rows, columns },
            }
        };
        Layer {
            attention_norm: format!("model.layers.{i}.input_layernorm.weight"),
            q: linear("self_attn", "q_proj", q, hidden, c.attention_bias),
            k: linear("self_attn", "k_proj", kv, hidden, c.attention_bias),
            v: linear("self_attn", "v_proj", kv, hidden, c.attention_bias),
            o: linear("self_attn", "o_proj", hidden, q, c.attention_bias),
            mlp_norm: format!("model.layers.{i}.post_attention_layernorm.weight"),
            gate: linear("mlp", "gate_proj", inner, hidden, c.mlp_bias),
            up: linear("mlp", "up_proj", inner, hidden, c.mlp_bias),
            down: linear("mlp", "down_proj", hidden, inner, c.mlp_bias),
        }
    });
    let embedding = "model.embed_tokens.weight".to_owned();
    Ok(Decoder {
        hidden_size: hidden,
        vocab_size: c.vocab_size,
        heads: c.num_attention_heads,
        kv_heads,
        head_dim,
        norm_epsilon: c.rms_norm_eps,
        rope: Rope::read(config, head_dim, c.max_position_embeddings)?,
        head: if c.tie_word_embeddings { embedding.clone() } else { "lm_head.weight".into() },
        embedding,
        layers: layers.collect(),
        final_norm: "model.norm.weight".into(),
    })
}

#[cfg(test)]
mod tests {
    use crate::family::decoder;
    use serde_json::{Value, json};

    fn config(changes: Value) -> Value {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 16, "rms_norm_eps": 1e-5
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    #[test]
    fn shapes_follow_the_config() {
        let d = decoder(&config(json!({"attention_bias": true, "head_dim": 4}))).unwrap();
        assert_eq!(d.layers.len(), 2);
        let shapes: Vec<String> = crate::family::Part::ALL
            .iter()
            .flat_map(|p| d.layers[1].linears(*p))
            .map(|l| format!("{} {} {}", l.name, l.dims, l.bias.is_some()))
            .collect();
        assert_eq!(
            shapes,
            [
                "q_proj [16, 8] true",
                "k_proj [8, 8] true",
                "v_proj [8, 8] true",
                "o_proj [8, 16] true",
                "gate_proj [12, 8] false",
                "up_proj [12, 8] false",
                "down_proj [8, 12] false"
            ]
        );
        assert_eq!(d.head, "lm_head.weight");
        let tied = decoder(&config(json!({"tie_word_embeddings": true}))).unwrap();
        assert_eq!(tied.head, tied.embedding);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (changes, expected) in [
            (json!({"model_type": "bloom"}), "bloom"),
            (json!({"model_type": null}), "model_type"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"hidden_size": 0}), "hidden_size"),
            (json!({"hidden_size": "wide"}), "wide"),
            (json!({"num_hidden_layers": 1_000_000_000_000u64}), "num_hidden_layers"),
            (json!({"hidden_act": "relu"}), "hidden_act"),
            (json!({"head_dim": 3}), "head_dim"),
        ] {
            let error = decoder(&config(changes)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
