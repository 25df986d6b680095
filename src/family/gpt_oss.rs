//! gpt-oss (arXiv 2508.10925): a mixture of experts with a limited SwiGLU, biases, sinks of attention,
//! and a sliding window in every other layer. Experts are stored stacked and transposed.

use super::{
    Activation, Decoder, Family, Gating, Role, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names},
    rms::Style,
    rope::{self, Scaling},
};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_oss",
    doc: "gpt-oss in bf16: a mixture of experts with biases and a limited SwiGLU, sinks, windows",
    decoder,
};

/// Of a configuration without any.
const YARN: Scaling = Scaling::Yarn {
    factor: 32.0,
    original_max_positions: 4096,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    attention_factor: 1.346_573_590_279_973,
};

/// The defaults are those of transformers' `GptOssConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let keys = Keys {
        count: (&["num_local_experts", "num_experts"], 128),
        active: 4,
        width: ("intermediate_size", None),
    };
    let names = Names {
        router: "router",
        matrices: &[("gate_up_proj", Role::InterleavedGateUp), ("down_proj", Role::Down)],
        in_memory: ["mlp", "router"],
        ..Names::mlp()
    };
    let experts = Experts::read(config, names, &keys, Scoring::softmax(true))?;
    let key = "swiglu_alpha";
    let activation = match config.number(key)?.unwrap_or(1.702) {
        1.702 => Activation::QuickGelu,
        1.0 => Activation::Silu,
        other => return Err(config.invalid(key, other, "only 1.702 and 1 are supported")),
    };
    let limit = config.above("swiglu_limit", 0.0)?.unwrap_or(7.0) as f32;
    let biased = config.boolean("attention_bias")?.unwrap_or(true);
    let style = Style {
        kv_heads: Some(8),
        head_dim: Some(64),
        epsilon: 1e-5,
        qkv_bias: biased,
        output_bias: biased,
        gating: Some(Gating { activation, limit: Some(limit), offset: 1.0 }),
        sinks: Some("self_attn.sinks"),
        experts: Some(Experts { bias: true, ..experts }),
        rope: rope::Style {
            max_positions: 131_072,
            theta: ("rope_theta", 150_000.0),
            unsaid: &YARN,
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    let window = config.size_or("sliding_window", Some(128))?;
    style.decoder(config, config.windows(window, |layer| layer.is_multiple_of(2))?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Decoder, Error, Inner, decoder, rope::Scaling};

    fn with(keys: Value) -> Result<Decoder, Error> {
        let mut config = json!({
            "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 16, "num_local_experts": 4,
        });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        decoder(&config)
    }

    #[test]
    fn positions_are_yarn_if_nothing_else_is_said() {
        let yarn = with(json!({})).unwrap();
        assert!(matches!(yarn.ropes[0].scaling, Scaling::Yarn { factor: 32.0, .. }));
        assert_eq!(yarn.positions().tokens, 131_072);
        let plain = with(json!({"rope_parameters": {"rope_type": "default"}})).unwrap();
        assert_eq!((&plain.ropes[0].scaling, plain.ropes[0].theta), (&Scaling::Default, 150_000.0));
    }

    #[test]
    fn experts_and_attention_have_biases() {
        let found = with(json!({})).unwrap();
        let shapes: Vec<_> = found.tensors().collect();
        let shape = |name: &str| {
            let name = format!("model.layers.1.{name}");
            shapes.iter().find(|(tensor, _)| *tensor == name).map(|(_, shape)| shape.clone())
        };
        assert_eq!(shape("self_attn.sinks"), Some(vec![16]));
        assert_eq!(shape("self_attn.o_proj.bias"), Some(vec![32]));
        assert_eq!(shape("mlp.router.bias"), Some(vec![4]));
        assert_eq!(shape("mlp.experts.3.gate_up_proj.weight"), Some(vec![32, 32]));
        assert_eq!(shape("mlp.experts.3.down_proj.bias"), Some(vec![32]));
        let windows = found.layers.iter().map(|layer| match &layer.attention.inner {
            Inner::Attention(attention) => attention.window,
            _ => None,
        });
        assert_eq!(windows.collect::<Vec<_>>(), [Some(128), None]);
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let error = with(json!({"swiglu_alpha": 2.0})).unwrap_err().to_string();
        assert!(error.contains("`swiglu_alpha` is 2, but only 1.702 and 1"), "{error}");
        assert!(with(json!({"swiglu_limit": 0.0})).is_err());
    }
}
