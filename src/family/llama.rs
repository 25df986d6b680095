//! The LLaMA family: LLaMA 1 to 3 and what shares their `model_type`, such as SmolLM2, TinyLlama
//! and Vicuna.

use barber_metric::Dims;

use super::config::{self, Error, Object};
use super::{Decoder, Family, Layer, Linear, rope};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    doc: "LLaMA 1 to 3, SmolLM2, TinyLlama, Vicuna: RMSNorm, rotary positions, SwiGLU",
    decoder,
};

/// Heads wider than this are taken for a mistake.
const WIDEST_HEAD: usize = 1 << 16;

/// Two names of x · sigmoid(x).
const ACTIVATIONS: [&str; 2] = ["silu", "swish"];

/// The defaults are those of transformers' `LlamaConfig`, but for the sizes that no checkpoint
/// leaves out.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let required = |key| config.size(key)?.ok_or_else(|| config.missing(key));
    let hidden_size = required("hidden_size")?;
    let intermediate_size = required("intermediate_size")?;
    let vocab_size = required("vocab_size")?;
    let count = "num_hidden_layers";
    let count = config.layers(count)?.ok_or_else(|| config.missing(count))?;
    let heads = required("num_attention_heads")?;
    let kv_heads = config.size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let problem = format!("it must divide `num_attention_heads`, {heads}");
        return Err(config.invalid("num_key_value_heads", kv_heads, problem));
    }
    let (head_dim, source) = match config.size("head_dim")? {
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
        config.invalid(source, found, format!("{heads} heads of {head_dim} are {problem}"))
    };
    if !head_dim.is_multiple_of(2) {
        return Err(odd("odd, and positions rotate pairs of channels"));
    }
    let attention = heads.checked_mul(head_dim).filter(|width| *width <= config::MOST);
    let Some(attention) = attention.filter(|_| head_dim <= WIDEST_HEAD) else {
        return Err(odd("more than can be"));
    };

    let activation = config.string("hidden_act")?.unwrap_or("silu");
    if !ACTIVATIONS.contains(&activation) {
        return Err(Error::Unknown {
            key: config.path("hidden_act"),
            found: activation.to_owned(),
            known: ACTIVATIONS.to_vec(),
        });
    }
    let norm_epsilon = match config.number("rms_norm_eps")?.unwrap_or(1e-6) {
        epsilon if (0.0..1.0).contains(&epsilon) => epsilon as f32,
        epsilon => {
            return Err(config.invalid("rms_norm_eps", epsilon, "it must be from 0 to below 1"));
        }
    };
    let biased = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
    let tied = biased("tie_word_embeddings")?;
    let shape = Shape {
        hidden_size,
        intermediate_size,
        attention,
        key_value: kv_heads * head_dim,
        attention_bias: biased("attention_bias")?,
        mlp_bias: biased("mlp_bias")?,
    };
    let embedding = "model.embed_tokens.weight".to_owned();
    Ok(Decoder {
        hidden_size,
        vocab_size,
        heads,
        kv_heads,
        head_dim,
        norm_epsilon,
        rope: rope::read(config, head_dim)?,
        head: if tied { embedding.clone() } else { "lm_head.weight".to_owned() },
        embedding,
        layers: (0..count).map(|index| shape.layer(index)).collect(),
        final_norm: "model.norm.weight".to_owned(),
    })
}

/// What all layers of a model share.
struct Shape {
    hidden_size: usize,
    intermediate_size: usize,
    attention: usize,
    key_value: usize,
    attention_bias: bool,
    mlp_bias: bool,
}

impl Shape {
    fn layer(&self, index: usize) -> Layer {
        let prefix = format!("model.layers.{index}");
        let linear = |part: &str, name, rows, columns, bias: bool| Linear {
            name,
            weight: format!("{prefix}.{part}.{name}.weight"),
            bias: bias.then(|| format!("{prefix}.{part}.{name}.bias")),
            dims: Dims { rows, columns },
        };
        let attention =
            |name, rows, columns| linear("self_attn", name, rows, columns, self.attention_bias);
        let mlp = |name, rows, columns| linear("mlp", name, rows, columns, self.mlp_bias);
        Layer {
            attention_norm: format!("{prefix}.input_layernorm.weight"),
            q: attention("q_proj", self.attention, self.hidden_size),
            k: attention("k_proj", self.key_value, self.hidden_size),
            v: attention("v_proj", self.key_value, self.hidden_size),
            o: attention("o_proj", self.hidden_size, self.attention),
            mlp_norm: format!("{prefix}.post_attention_layernorm.weight"),
            gate: mlp("gate_proj", self.intermediate_size, self.hidden_size),
            up: mlp("up_proj", self.intermediate_size, self.hidden_size),
            down: mlp("down_proj", self.hidden_size, self.intermediate_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use safetensors::SafeTensors;
    use serde_json::{Value, json};

    use super::super::{Block, Decoder, Error, decoder};

    fn config() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        })
    }

    fn with(keys: Value) -> Result<Decoder, Error> {
        let mut config = config();
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        decoder(&config)
    }

    #[test]
    fn reads_the_defaults() {
        let llama = decoder(&config()).unwrap();
        assert_eq!((llama.heads, llama.kv_heads, llama.head_dim), (4, 2, 8));
        assert_eq!(llama.norm_epsilon, 1e-6);
        assert_eq!((llama.rope.theta, llama.rope.max_positions), (10_000.0, 2048));
        assert_eq!(llama.head, "lm_head.weight");
        assert_eq!(with(json!({"num_key_value_heads": null})).unwrap().kv_heads, 4);
        assert_eq!(with(json!({"head_dim": null})).unwrap().head_dim, 8);
        assert_eq!(with(json!({"rms_norm_eps": 1e-5})).unwrap().norm_epsilon, 1e-5);
    }

    #[test]
    fn names_and_shapes_every_tensor() {
        let llama = with(json!({"head_dim": 12, "attention_bias": true})).unwrap();
        let tensors: Vec<_> = llama.tensors().collect();
        assert_eq!(tensors.len(), 1 + 2 * (9 + 4) + 2);
        let shape = |name: &str| {
            let found = tensors.iter().find(|(tensor, _)| *tensor == name);
            found.unwrap_or_else(|| panic!("no {name}")).1.clone()
        };
        assert_eq!(shape("model.embed_tokens.weight"), [96, 32]);
        assert_eq!(shape("model.layers.0.input_layernorm.weight"), [32]);
        assert_eq!(shape("model.layers.0.self_attn.q_proj.weight"), [48, 32]);
        assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [24, 32]);
        assert_eq!(shape("model.layers.1.self_attn.v_proj.bias"), [24]);
        assert_eq!(shape("model.layers.1.self_attn.o_proj.weight"), [32, 48]);
        assert_eq!(shape("model.layers.1.post_attention_layernorm.weight"), [32]);
        assert_eq!(shape("model.layers.1.mlp.gate_proj.weight"), [64, 32]);
        assert_eq!(shape("model.layers.1.mlp.down_proj.weight"), [32, 64]);
        assert_eq!(shape("model.norm.weight"), [32]);
        assert_eq!(shape("lm_head.weight"), [96, 32]);
    }

    #[test]
    fn lists_exactly_what_transformers_saves() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits");
        let mut checkpoints = 0;
        for checkpoint in fs::read_dir(folder).unwrap() {
            let checkpoint = checkpoint.unwrap().path();
            let config = fs::read(checkpoint.join("config.json")).unwrap();
            let llama = decoder(&serde_json::from_slice(&config).unwrap()).unwrap();
            let listed: BTreeMap<_, _> =
                llama.tensors().map(|(name, shape)| (name.to_owned(), shape)).collect();
            let mut saved = BTreeMap::new();
            for file in fs::read_dir(&checkpoint).unwrap() {
                let path = file.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                if name.starts_with("model") && name.ends_with(".safetensors") {
                    let bytes = fs::read(path).unwrap();
                    for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                        saved.insert(name, tensor.shape().to_vec());
                    }
                }
            }
            assert_eq!(listed, saved, "{}", checkpoint.display());
            checkpoints += 1;
        }
        assert_eq!(checkpoints, 10);
    }

    #[test]
    fn a_tied_head_is_no_tensor_of_its_own() {
        let llama = with(json!({"tie_word_embeddings": true})).unwrap();
        assert_eq!(llama.head, llama.embedding);
        assert_eq!(llama.tensors().count(), 1 + 2 * 9 + 1);
    }

    #[test]
    fn groups_by_part() {
        let block = |name, layers: &[&'static str]| Block { name, layers: layers.to_vec() };
        assert_eq!(
            decoder(&config()).unwrap().default_blocks(),
            [
                block("self-attention", &["q_proj", "k_proj", "v_proj", "o_proj"]),
                block("mlp", &["gate_proj", "up_proj", "down_proj"]),
            ]
        );
    }

    #[test]
    fn errors_name_the_key() {
        for (keys, message) in [
            (json!({"model_type": null}), "missing key `model_type`"),
            (json!({"model_type": "opt"}), "unknown `model_type` \"opt\", known: llama"),
            (json!({"hidden_size": null}), "missing key `hidden_size`"),
            (
                json!({"hidden_size": "32"}),
                "`hidden_size` must be a whole number, found the string \"32\"",
            ),
            (json!({"hidden_size": 32.0}), "`hidden_size` must be a whole number, found 32.0"),
            (
                json!({"hidden_size": 30}),
                "`hidden_size` is 30, but without `head_dim` it must be a multiple of `num_attention_heads`, 4",
            ),
            (
                json!({"hidden_size": 36}),
                "`hidden_size` is 36, but 4 heads of 9 are odd, and positions rotate pairs of channels",
            ),
            (
                json!({"head_dim": 7}),
                "`head_dim` is 7, but 4 heads of 7 are odd, and positions rotate pairs of channels",
            ),
            (
                json!({"num_key_value_heads": 3}),
                "`num_key_value_heads` is 3, but it must divide `num_attention_heads`, 4",
            ),
            (json!({"vocab_size": 0}), "`vocab_size` is 0, but it must be from 1 to 2147483647"),
            (json!({"vocab_size": -1}), "`vocab_size` is -1, but it must be from 1 to 2147483647"),
            (json!({"hidden_act": "gelu"}), "unknown `hidden_act` \"gelu\", known: silu, swish"),
            (json!({"attention_bias": 1}), "`attention_bias` must be true or false, found 1"),
            (
                json!({"rms_norm_eps": -1.0}),
                "`rms_norm_eps` is -1, but it must be from 0 to below 1",
            ),
            (json!({"rope_scaling": []}), "`rope_scaling` must be an object, found a list"),
        ] {
            let error = with(keys).unwrap_err().to_string();
            assert_eq!(error, format!("config.json: {message}"));
        }
        let error = decoder(&json!([])).unwrap_err().to_string();
        assert_eq!(error, "config.json: must be an object, found a list");
    }

    #[test]
    fn absurd_sizes_allocate_nothing() {
        let huge = 1_000_000_000_000_000_000_u64;
        for key in ["num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"] {
            for value in [huge, u64::MAX, i64::MAX as u64] {
                assert!(with(json!({ key: value })).unwrap_err().to_string().contains(key));
            }
        }
        assert!(with(json!({"num_hidden_layers": 10_001})).is_err());
        let most = i32::MAX - 1;
        assert!(with(json!({"head_dim": most})).is_err());
        let one_head = json!({
            "hidden_size": most, "num_attention_heads": 1, "num_key_value_heads": 1,
        });
        assert!(with(one_head).is_err());
    }
}
