//! SmolLM3: LLaMA with layers without rotary positions.

use super::{
    Decoder, Family,
    config::{Error, Object},
    rms::{LayerAttention, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    doc: "SmolLM3: as LLaMA, every fourth layer without positions",
    decoder,
};

/// The defaults are those of transformers' `SmolLM3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let biased = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
    let attention_bias = biased("attention_bias")?;
    let style = Style {
        kv_heads: Some(4),
        tied: true,
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: biased("mlp_bias")?,
        rope: rope::Style {
            max_positions: 32_768,
            theta: ("rope_theta", 2_000_000.0),
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    let listed = config.numbers("no_rope_layers")?;
    if let (Some(listed), Some(layers)) = (&listed, config.layers("num_hidden_layers")?)
        && listed.len() < layers
    {
        let found = format!("a list of {}", listed.len());
        let problem = format!("`num_hidden_layers` is {layers}");
        return Err(config.invalid("no_rope_layers", found, problem));
    }
    let interval = config.size("no_rope_layer_interval")?.unwrap_or(4);
    // Despite its name, the list has 1 for the layers with rotary positions.
    let rotates = |layer: usize| match &listed {
        Some(listed) => listed.get(layer).is_some_and(|listed| *listed != 0.0),
        None => !(layer + 1).is_multiple_of(interval),
    };
    let sliding = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = config.size("sliding_window")?.filter(|_| sliding);
    let windows = config.windows(window, |layer| !rotates(layer))?;
    style.decoder(config, |layer| LayerAttention {
        window: windows(layer),
        rope: rotates(layer).then_some(0),
    })
}
