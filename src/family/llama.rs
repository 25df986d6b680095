//! The LLaMA family: LLaMA 1 to 3 and other models with their `model_type`, such as SmolLM2,
//! TinyLlama and Vicuna.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    doc: "LLaMA 1 to 3, SmolLM2, TinyLlama, Vicuna: RMSNorm, rotary positions, SwiGLU",
    decoder,
};

/// The defaults are those of transformers' `LlamaConfig`, except for sizes, which every checkpoint
/// has.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
    let attention_bias = biased("attention_bias")?;
    let style = Style {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: biased("mlp_bias")?,
        ..Style::llama()
    };
    style.decoder(config, |_| None)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Decoder, Error, FAMILIES, Inner, decoder};

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
        let heads = |decoder: &Decoder| match &decoder.layers[0].attention.inner {
            Inner::Attention(attention) => {
                (attention.heads, attention.kv_heads, attention.head_dim)
            }
            _ => panic!("not attention"),
        };
        let epsilon = |decoder: &Decoder| decoder.final_norm.as_ref().unwrap().epsilon;
        assert_eq!(heads(&llama), (4, 2, 8));
        assert_eq!(epsilon(&llama), 1e-6);
        let rope = &llama.ropes[0];
        assert_eq!((rope.theta, rope.max_positions), (10_000.0, 2048));
        assert_eq!(llama.head, "lm_head.weight");
        assert_eq!(heads(&with(json!({"num_key_value_heads": null})).unwrap()), (4, 4, 8));
        assert_eq!(heads(&with(json!({"head_dim": null})).unwrap()), (4, 2, 8));
        assert_eq!(epsilon(&with(json!({"rms_norm_eps": 1e-5})).unwrap()), 1e-5);
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
    fn a_tied_head_is_no_tensor_of_its_own() {
        let llama = with(json!({"tie_word_embeddings": true})).unwrap();
        assert_eq!(llama.head, llama.embedding.weight);
        assert_eq!(llama.tensors().count(), 1 + 2 * 9 + 1);
    }

    #[test]
    fn errors_name_the_key() {
        for (keys, message) in [
            (json!({"model_type": null}), "missing key `model_type`"),
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
                "`hidden_size` is 36, but 4 heads of 9 channels: rotary positions need an even number",
            ),
            (
                json!({"head_dim": 7}),
                "`head_dim` is 7, but 4 heads of 7 channels: rotary positions need an even number",
            ),
            (
                json!({"num_key_value_heads": 3}),
                "`num_key_value_heads` is 3, but it must divide `num_attention_heads`, 4",
            ),
            (json!({"vocab_size": 0}), "`vocab_size` is 0, but it must be from 1 to 2147483647"),
            (json!({"vocab_size": -1}), "`vocab_size` is -1, but it must be from 1 to 2147483647"),
            (
                json!({"hidden_act": "mish"}),
                "unknown `hidden_act` \"mish\", the nearest known one is \"swish\", known: gelu, gelu_accurate, gelu_fast, gelu_new, gelu_python, gelu_python_tanh, gelu_pytorch_tanh, quick_gelu, relu, relu2, silu, swish",
            ),
            (
                json!({"per_layer_config": {"0": {}}}),
                "`per_layer_config` is an object, but layers that differ in more than their windows are not supported",
            ),
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
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        let error = with(json!({"model_type": "lama"})).unwrap_err().to_string();
        let expected = format!(
            "config.json: unknown `model_type` \"lama\", the nearest known one is \"llama\", known: \
             {}; a new family is a file in src/family, see the page Families of the book",
            known.join(", ")
        );
        assert_eq!(error, expected);
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
