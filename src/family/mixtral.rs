//! Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in place of the MLP.

use super::{
    Decoder, Family, Role, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names},
    rms::Style,
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "mixtral",
    doc: "Mixtral: as Mistral, with a mixture of experts",
    decoder,
};

/// The defaults are those of transformers' `MixtralConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let window = config.size("sliding_window")?;
    let keys = Keys {
        count: (&["num_local_experts", "num_experts"], 8),
        active: 2,
        width: ("intermediate_size", None),
    };
    let names = Names {
        module: "block_sparse_moe",
        matrices: &[("w1", Role::Gate), ("w3", Role::Up), ("w2", Role::Down)],
        ..Names::mlp()
    };
    let style = Style {
        kv_heads: Some(8),
        epsilon: 1e-5,
        experts: Some(Experts::read(config, names, &keys, Scoring::softmax(true))?),
        rope: rope::Style {
            max_positions: 32 * 4096,
            theta: ("rope_theta", 1e6),
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    style.decoder(config, |_| window)
}
