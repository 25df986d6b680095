//! Channels of the MLP: rows of the gate and up projections, with their biases, and columns of the
//! down projection.

use super::{Axis, Kind, Owners, Part, Sublayer, Units, Whole, config::set, in_each_layer};
use crate::family::Role;

pub(super) static CHANNELS: Kind = Kind {
    name: "channels",
    help: "inner channels of the MLPs, rows of gate and up and columns of down: the result is a \
           smaller dense model",
    whole: Some(Whole {
        many: "channels",
        is_of_model: false,
        has_multiples: true,
        leaves_inputs: true,
        sites: |decoder| in_each_layer(decoder, Part::Mlp, units),
        configure: |config, _, kept| {
            set(config, &["intermediate_size", "ffn_dim"], left(kept));
        },
    }),
};

/// Number of structures that are left of each layer.
pub(super) fn left(kept: &[Vec<bool>]) -> usize {
    kept.first().map_or(0, |kept| kept.iter().filter(|kept| **kept).count())
}

fn units(mlp: &Sublayer) -> Result<Units, &'static str> {
    if mlp.router.is_some() {
        return Err("its MLP is a mixture of experts, whose channels are not removed");
    }
    let down = mlp.projections.iter().find(|of| of.role == Role::Down);
    let count = down.ok_or("its MLP has no down projection")?.dims.columns;
    let owners = mlp.projections.iter().map(|of| match of.role {
        Role::Down => Owners::Each(Axis::Columns, (0..count).collect()),
        // Gate and up in one matrix are one after the other.
        _ => Owners::Each(Axis::Rows, (0..of.dims.rows).map(|i| i % count).collect()),
    });
    Ok((count, owners.collect()))
}
