//! Compensation as a stage: biases that make up for the means of removed channels and heads (FLAP, arXiv
//! 2312.11983, section 3.4).

use barber_metric::{Dims, Needs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Described, Error, Event, Outcome, Run, Stage, Wrong};
use crate::{
    dtype::Dtype,
    executor::{Pass, Probe, ops::Ops},
    family::{Feed, Projection},
    mask::Mask,
    prune::{Tally, group::GroupState},
    structure::bias_name,
};

/// A compensation. It has no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Compensate {}

impl Stage for Compensate {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        Vec::new()
    }

    fn describe(&self, _: &Described<'_>) -> String {
        "compensate: biases change".into()
    }

    fn takes_structures(&self) -> bool {
        true
    }

    fn changes_biases(&self) -> bool {
        true
    }

    fn count(&self, tally: &mut Tally<'_>) {
        tally.error();
        tally.means();
        tally.forward();
        tally.measures_result();
    }
}

impl Run for Compensate {
    const HELP: &'static str =
        "biases of output projections that keep what removed channels and heads gave on average";

    fn run<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        _: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, Error> {
        let before = state.error()?;
        let (dense, members) = (state.dense()?, state.group.linears());
        let found = state.run(Pass {
            probe: Some(Probe::new(&members, Needs::INPUT_VARIANCE)),
            ..Pass::new(&dense, &state.streams.sparse)
        })?;
        drop(dense);
        let mut names = Vec::new();
        for member in &state.group.members {
            let of = state.linear(*member).clone();
            if of.feed() == Feed::Inner {
                let place = state.place(*member);
                let means = found.statistics[place][member.linear].input_mean.as_deref();
                let bias = compensated(
                    state,
                    &of,
                    means.map_or(&[][..], Vec::as_slice),
                    &state.mask(*member),
                )?;
                names.push(bias_name(&of));
                change(state, &of, &bias)?;
            }
        }
        Outcome::of_change(state, before, |pruned| {
            names.iter().for_each(|name| _ = pruned.forget(name));
        })
    }
}

/// The bias of a projection, plus what the mean inputs of its pruned weights give.
fn compensated<D: Ops>(
    state: &GroupState<'_, D>,
    of: &Projection,
    means: &[f32],
    mask: &Mask,
) -> Result<Vec<f32>, Error> {
    let weights = state.model.values(of)?;
    let bias = state.model.bias(of, state.pruned)?;
    let mut bias = bias.unwrap_or_else(|| vec![0.0; of.dims.rows]);
    let columns = of.dims.columns.max(1);
    for (row, (bias, weights)) in bias.iter_mut().zip(weights.chunks(columns)).enumerate() {
        let gone = weights.iter().zip(means).enumerate();
        let gone = gone.filter(|(column, _)| !mask.get(row * columns + column));
        *bias += gone.map(|(_, (w, mean))| f64::from(*w) * f64::from(*mean)).sum::<f64>() as f32;
    }
    Ok(bias)
}

/// Stores the bias of a projection, in the format of its weights.
fn change<D: Ops>(
    state: &mut GroupState<'_, D>,
    of: &Projection,
    bias: &[f32],
) -> Result<(), Error> {
    let (reader, refinement) = (state.model.reader, state.refinement);
    let name = bias_name(of);
    let like = if of.bias.is_some() { &name } else { &of.weight };
    let dtype = refinement.dtype.or(Dtype::of(reader.tensor(like)?.dtype));
    state.pruned.change(reader, &name, bias, dtype, refinement.scratch)?;
    let dims = Dims { rows: bias.len(), columns: 1 };
    state.pruned.masks.insert(name, Mask::kept_everywhere(dims));
    Ok(())
}
