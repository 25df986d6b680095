//! The mixtures of experts of Granite 3 (IBM): Granite with experts in place of the MLP, stored
//! stacked.

use super::{
    Decoder, Family, Role, Scoring,
    config::{Error, Object},
    experts::{Experts, Keys, Names},
    granite,
    rms::Style,
};

pub(super) const FAMILY: Family = Family {
    model_type: "granitemoe",
    doc: "Granite 3's mixtures of experts: as Granite, with experts in place of the MLP",
    decoder,
};

/// The defaults are those of transformers' `GraniteMoeConfig`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let keys = Keys {
        count: (&["num_local_experts", "num_experts"], 8),
        active: 2,
        width: ("intermediate_size", None),
    };
    let names = Names {
        module: "block_sparse_moe",
        router: "router.layer",
        matrices: &[("input_linear", Role::GateUp), ("output_linear", Role::Down)],
        in_memory: ["block_sparse_moe", "router"],
    };
    let experts = Experts::read(config, names, &keys, Scoring::softmax(true))?;
    let style = Style { experts: Some(experts), ..granite::style(config)? };
    style.decoder(config, |_| None)
}
