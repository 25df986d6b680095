//! Channels of the MLP: rows of the gate and up projections, with their biases, and columns of the
//! down projection.

use super::{Axis, Kind, Part, Size, Slice, Sublayer, Units, Whole};
use crate::family::Role;

pub(super) static CHANNELS: Kind = Kind {
    name: "channels",
    help: "inner channels of the MLPs, rows of gate and up and columns of down: the result is a \
           smaller dense model",
    whole: Some(Whole { many: "channels", part: Part::Mlp, units, sizes }),
};

fn units(mlp: &Sublayer) -> Result<Units, &'static str> {
    if mlp.router.is_some() {
        return Err("its MLP is a mixture of experts, whose channels are not removed");
    }
    let down = mlp.projections.iter().find(|of| of.role == Role::Down);
    let count = down.ok_or("its MLP has no down projection")?.dims.columns;
    let slices = mlp.projections.iter().enumerate().map(|(linear, of)| {
        let (axis, length) = match of.role {
            Role::Down => (Axis::Columns, of.dims.columns),
            _ => (Axis::Rows, of.dims.rows),
        };
        // Gate and up in one matrix are one after the other.
        Slice { linear, axis, owners: (0..length).map(|i| i % count).collect() }
    });
    Ok(Units { count, slices: slices.collect() })
}

fn sizes(_: &Sublayer, left: usize) -> Vec<Size> {
    vec![Size { keys: &["intermediate_size", "ffn_dim"], value: left }]
}
