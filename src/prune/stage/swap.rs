//! Exact swaps as a stage (SparseSwaps, arXiv 2512.10922): matrix by matrix, towards the group's
//! target output.

use std::ops::Range;

use barber_metric::{Dims, LayerStats};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Described, Error, Event, Outcome, Run, Shares, Stage, Wrong};
use crate::{
    choice::word,
    executor::{Statistics, ops::Ops},
    mask::{self, Distribution, Mask, OutputError, Scope},
    plan::Member,
    prune::{Tally, group::GroupState},
};

/// Exact swaps, and their keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Swap {
    /// The weights that compete: all of the `model`, a `group`, a `layer`, a `row` (one output) or a
    /// `column` (one input). `swap` has only `row` and `layer`, `end-to-end` has these and `model`,
    /// `rebuild` has all but `model`.
    #[serde(deserialize_with = "word")]
    pub scope: Scope,
    /// Maximum number of swaps per row.
    pub limit: usize,
    /// Shrinkage of the inputs' correlations towards zero, from 0 to 1. With few samples, much of a
    /// measured correlation is chance.
    #[schemars(range(min = 0, max = 1))]
    pub shrinkage: f64,
}

impl Default for Swap {
    fn default() -> Self {
        Self { scope: Scope::Row, limit: 100, shrinkage: 0.2 }
    }
}

impl Stage for Swap {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        Vec::from_iter(wrong_shrinkage(self.shrinkage))
    }

    fn describe(&self, refinement: &Described<'_>) -> String {
        let Self { scope, limit, shrinkage } = self;
        let blend = refinement.blend;
        format!("swap, scope {scope}, at most {limit} a row, shrinkage {shrinkage}, blend {blend}")
    }

    fn scope(&self) -> Option<Scope> {
        Some(self.scope)
    }

    fn scopes(&self) -> &'static [Scope] {
        &[Scope::Row, Scope::Layer]
    }

    fn needs_gram(&self) -> bool {
        true
    }

    fn searches(&self) -> usize {
        self.limit
    }

    fn shares(&self) -> Option<Shares> {
        (self.scope == Scope::Row).then_some(Shares::Rows(1.0))
    }

    fn count(&self, tally: &mut Tally<'_>) {
        tally.error();
        tally.grams();
        tally.held_out();
    }
}

/// The error of a shrinkage outside 0 to 1.
pub(super) fn wrong_shrinkage(shrinkage: f64) -> Option<Wrong> {
    (!(0.0..=1.0).contains(&shrinkage)).then(|| Wrong {
        key: "shrinkage",
        why: format!("must be from 0 to 1, got {shrinkage}"),
        help: "0 keeps the samples' correlations, 1 drops them",
    })
}

impl Run for Swap {
    const HELP: &'static str = "exact swaps of a kept and a pruned weight where that lowers the \
                                matrix's output error most (arXiv 2512.10922)";

    fn run<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        _: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, Error> {
        let before = state.error()?;
        let masks = state.masks();
        let mut scores = Distribution::new("|w|·‖x‖");
        state.each_matrix(|state, member, found| self.matrix(state, member, found, &mut scores))?;
        state.loss = None;
        // Each matrix's error falls on the calibration samples; the group's must fall on the
        // held-out samples, too.
        let accepted = state.lowers_held_out(before)?;
        if !accepted {
            state.set(&masks);
            state.loss = Some(before);
        }
        let after = (!accepted).then_some(before);
        Ok(Outcome { before, after, accepted, scores: accepted.then_some(scores) })
    }
}

impl Swap {
    fn matrix<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        member: Member,
        statistics: &Statistics,
        scores: &mut Distribution,
    ) -> Result<(), Error> {
        let linear = state.linear(member).clone();
        let dense = state.model.values(&linear)?;
        let values = state.pruned.values(&linear.weight)?;
        let weight = values.as_deref().unwrap_or(&dense);
        let shift =
            shift(&dense, values.as_deref(), linear.dims, statistics, state.refinement.blend);
        let (name, dims) = (linear.weight.as_str(), linear.dims);
        let stats = LayerStats { name, dims, weight, ..LayerStats::default() };
        let shrinkage = self.shrinkage as f32;
        let error = OutputError { gram: gram(statistics), shift: shift.as_deref(), shrinkage };
        let scope = member.rule.scope.unwrap_or(self.scope);
        let before = state.mask(member);
        let (pattern, limit) = (member.rule.pattern, self.limit);
        let swapped = |of: Range<usize>| {
            let (stats, mut mask, error) = of_rows(&stats, &before, error, of);
            mask::swap(&stats, &mut mask, error, scope, pattern, limit).map(|_| mask)
        };
        let mask = match scope {
            // Each rank finds the masks of some rows.
            Scope::Row => {
                let ranks = &state.model.executor.ranks;
                let kept = ranks.of_rows(dims.rows, mask::BLOCK, |rows| {
                    Ok::<_, Error>(swapped(rows)?.to_bools())
                })?;
                Mask::from_bools(dims, &kept)
            }
            _ => swapped(0..dims.rows)?,
        };
        // The output error that each weight's removal alone would cause.
        let squares: Vec<f32> = error.gram.iter().step_by(dims.columns + 1).copied().collect();
        let stats = LayerStats { input_square: Some(&squares), ..stats };
        let lost = mask::weight_norm(&stats)?;
        scores.matrix(&before, &mask, |i| lost[i]);
        state.pruned.masks.insert(linear.weight, mask);
        Ok(())
    }
}

/// A matrix' part of some rows, with their mask and their output error.
pub(super) fn of_rows<'a>(
    stats: &LayerStats<'a>,
    mask: &Mask,
    error: OutputError<'a>,
    rows: Range<usize>,
) -> (LayerStats<'a>, Mask, OutputError<'a>) {
    let columns = stats.dims.columns;
    let (dims, weights) =
        (Dims { rows: rows.len(), columns }, rows.start * columns..rows.end * columns);
    let stats = LayerStats { dims, weight: &stats.weight[weights.clone()], ..*stats };
    (
        stats,
        mask.of_rows(rows),
        OutputError { shift: error.shift.map(|shift| &shift[weights]), ..error },
    )
}

/// The Gram matrix, which the pass computed.
pub(super) fn gram(statistics: &Statistics) -> &[f32] {
    statistics.gram.as_ref().map_or(&[], |gram| &gram[..])
}

/// Σ e xᵀ of a matrix, [rows, columns], where e is the target minus the unpruned output with the
/// current `values` V, or with the dense weights W: β W (x̃ − x) on a dense stream, and (W − V) x
/// where V differs from W.
pub(super) fn shift(
    dense: &[f32],
    values: Option<&[f32]>,
    Dims { rows, columns }: Dims,
    statistics: &Statistics,
    blend: f32,
) -> Option<Vec<f32>> {
    if statistics.departure.is_none() && values.is_none() {
        return None;
    }
    let mut shift = vec![0.0; dense.len()];
    let mut add = |left: &[f32], right: &[f32], factor: f32| {
        let sum = MatMut::from_row_major_slice_mut(&mut shift, rows, columns);
        let left = MatRef::from_row_major_slice(left, rows, columns);
        let right = MatRef::from_row_major_slice(right, columns, columns);
        matmul(sum, Accum::Add, left, right, factor, Par::rayon(0));
    };
    if let Some(departure) = &statistics.departure {
        add(dense, departure, blend);
    }
    if let Some(values) = values {
        let less: Vec<f32> = dense.iter().zip(values).map(|(w, v)| w - v).collect();
        add(&less, gram(statistics), 1.0);
    }
    Some(shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shift_is_what_the_target_differs_by() {
        // One row, two inputs, one token: x = (1, 2), x̃ = (3, 1), W = (5, 7), V = (5, 6).
        let dims = Dims { rows: 1, columns: 2 };
        let found = |departure: Option<Vec<f32>>| Statistics {
            gram: Some(vec![1.0, 2.0, 2.0, 4.0].into()),
            departure: departure.map(Into::into),
            ..Statistics::default()
        };
        let both = found(Some(vec![2.0, 4.0, -1.0, -2.0]));
        // e = β (5 · 2 − 7) + 2, times x.
        let shifted = shift(&[5.0, 7.0], Some(&[5.0, 6.0]), dims, &both, 0.5).unwrap();
        assert_eq!(shifted, [3.5, 7.0]);
        assert_eq!(shift(&[5.0, 7.0], None, dims, &both, 1.0).unwrap(), [3.0, 6.0]);
        assert_eq!(shift(&[5.0, 7.0], None, dims, &found(None), 0.5), None);
    }
}
