//! Permutes inner channels, so that masks with a pattern N:M lose less: one pass over the dense layers,
//! before all masks.

use std::{collections::BTreeMap, slice::from_ref};

use barber_metric::{LayerStats, Needs};

use super::{Error, Sampled, failed};
use crate::{
    buffer::recycle,
    checkpoint::{Axis, Cut, Masks, Pruned},
    executor::{Outputs, Pass, Probe, Targets, ops::Ops},
    family::Part,
    mask::{self, Amount, Init, Mask, weight_norm},
    model::Model,
    permutation::{Order, PermutedPart, Site},
    plan::{Member, Plan, Rule},
};

/// Finds the order of inner channels in which Wanda's masks of the output projections lose least, by the
/// sum of |W|²·‖x‖². A part keeps the order that it has if the other does not lower the error of its
/// output, that on the held-out samples included. Calls `layer_done` after each layer.
///
/// # Errors
/// If the model cannot be run on the samples, or a mask cannot be made.
pub fn permute<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    samples: Sampled<'_>,
    layer_done: &mut dyn FnMut(),
) -> Result<Vec<PermutedPart>, Error> {
    let executor = &model.executor;
    let mut stream = model.embed(samples.ids, samples.held_out)?;
    let mut permuted = Vec::new();
    for layer in 0..plan.layers.len() {
        for part in Part::ALL {
            let failed = || failed(layer, "permutation");
            let weights = |pruned: &Pruned| model.part(layer, part, pruned);
            let (dense, sites) =
                (weights(&Pruned::dense())?, Site::planned(plan, &model.decoder, (layer, part)));
            let wanted: Vec<usize> = sites.iter().map(|(site, _)| site.output).collect();
            let probe = Some(Probe::new(from_ref(&wanted), Needs::INPUT_SQUARE));
            let pass = Pass { outputs: Outputs::Kept, ..Pass::new(from_ref(&dense), &stream) };
            let mut found = executor.run(Pass { probe, ..pass }).map_err(failed())?;
            let statistics = found.statistics.swap_remove(0);
            let (mut orders, mut before, mut after) = (BTreeMap::new(), Masks::new(), Masks::new());
            for (site, Member { rule, .. }) in &sites {
                let linear = &model.decoder.layers[layer].projections(part)[site.output];
                let values = model.values(linear)?;
                let stats = statistics[site.output].of(linear, &values);
                let mut importances = weight_norm(&stats)?;
                importances.iter_mut().for_each(|score| *score *= *score);
                let groups = site.channels(&importances);
                recycle(importances);
                let order = groups.iter().enumerate().flat_map(|(group, channels)| {
                    let order = channels.permute(rule.pattern);
                    let order = order.unwrap_or_else(|| (0..site.count).collect());
                    order.into_iter().map(move |channel| group * site.count + channel)
                });
                let order = Order(order.collect());
                let name = &linear.weight;
                let same = (0..linear.dims.columns).collect();
                for (masks, columns) in [(&mut before, same), (&mut after, site.columns(&order))] {
                    masks.insert(name.clone(), masked(&stats, *rule, columns)?);
                }
                orders.insert(name.clone(), order);
            }
            if !sites.is_empty() {
                let error = |masks: Masks| {
                    let (sparse, targets) =
                        (weights(&masks.into())?, Targets::Outputs(&found.outputs));
                    let pass = Pass { targets, ..Pass::new(from_ref(&sparse), &stream) };
                    Ok::<_, Error>(executor.run(pass).map_err(failed())?.loss)
                };
                let (before, after) = (error(before)?, error(after)?);
                if !after.improves(before) {
                    orders.clear();
                }
                let part = part.name().to_owned();
                permuted.push(PermutedPart { layer, part, before, after, orders });
            }
            let outputs = Outputs::Known(&found.outputs);
            let pass = Pass { outputs, ..Pass::advancing(from_ref(&dense), &mut stream) };
            executor.run(pass).map_err(failed())?;
        }
        layer_done();
    }
    Ok(permuted)
}

/// Wanda's mask of a matrix with its columns in another order, in the order that they have.
fn masked(stats: &LayerStats<'_>, rule: Rule, columns: Vec<usize>) -> Result<Mask, mask::Error> {
    let dims = stats.dims;
    let mut places = vec![0; columns.len()];
    columns.iter().enumerate().for_each(|(place, column)| places[*column] = place);
    let squares = stats.input_square;
    let squares = squares.map(|all| columns.iter().map(|i| all[*i]).collect::<Vec<f32>>());
    let weight =
        Cut { axis: Axis::Columns, kept: columns }.left(&[dims.rows, dims.columns], stats.weight);
    let stats = LayerStats { weight: &weight, input_square: squares.as_deref(), ..*stats };
    let amount = Amount::Ratio(rule.ratio);
    let mask = Init::default().choose(&stats, rule.pattern, amount, None)?.mask;
    let at = |i: usize| i / dims.columns * dims.columns + places[i % dims.columns];
    Ok(Mask::from_fn(dims, |i| mask.get(at(i))))
}
