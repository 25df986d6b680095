//! Ministral 3: LLaMA with YaRN, and queries that grow with their position.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::Style,
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "ministral3",
    doc: "Ministral 3 without images: as LLaMA, with queries that grow with their position",
    decoder,
};

/// The defaults are those of transformers' `Ministral3Config`, except for the position code, which a
/// checkpoint must have: that default has many settings.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    if config.object("rope_parameters")?.is_none() {
        return Err(config.missing("rope_parameters"));
    }
    let style = Style {
        kv_heads: Some(8),
        head_dim: Some(128),
        epsilon: 1e-5,
        rope: rope::Style { max_positions: 262_144, scaled_queries: true, ..rope::Style::llama() },
        ..Style::llama()
    };
    let window = config.size("sliding_window")?;
    style.decoder(config, |_| window)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::decoder;

    #[test]
    fn a_position_code_is_needed() {
        let config = |code: Value| {
            json!({
                "model_type": "ministral3", "vocab_size": 10, "hidden_size": 8, "head_dim": 4,
                "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
                "intermediate_size": 6, "rope_parameters": code,
            })
        };
        assert!(decoder(&config(json!({"rope_type": "default", "rope_theta": 1e6}))).is_ok());
        let error = decoder(&config(Value::Null)).unwrap_err().to_string();
        assert_eq!(error, "config.json: missing key `rope_parameters`");
    }
}
