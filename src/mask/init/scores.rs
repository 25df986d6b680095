//! Initial masks that prune the lowest scores: |W|, Wanda's |W|·‖x‖, or scores of a recipe's
//! metrics.

use barber_metric::{LayerStats, Needs};
use rayon::prelude::*;

use super::{InitialMask, Takes, lowest::Ties};
use crate::mask::{Error, Scope};

pub(super) static MAGNITUDE: InitialMask = InitialMask {
    name: "magnitude",
    prunes: "the lowest |W| of each matrix",
    needs: Needs::NOTHING,
    scope: Scope::Layer,
    metrics: false,
    zeros: false,
    scores: Some(magnitude),
    takes: Takes::LITTLE,
    run: |matrix| matrix.lowest(&magnitude(matrix.stats)?, Ties::Last),
};

pub(super) static WANDA: InitialMask = InitialMask {
    name: "wanda",
    prunes: "the lowest |W|·‖x‖ of each row, ‖x‖ being the norm of a weight's input (arXiv 2306.11695)",
    needs: Needs::INPUT_SQUARE,
    scope: Scope::Row,
    metrics: false,
    zeros: false,
    scores: Some(weight_norm),
    takes: Takes::LITTLE,
    run: |matrix| matrix.lowest(&weight_norm(matrix.stats)?, Ties::First),
};

pub(super) static METRIC: InitialMask = InitialMask {
    name: "metric",
    prunes: "the lowest scores of the pipeline `mask.metric`, of each row or, with `mask.scope`, matrix",
    needs: Needs::NOTHING,
    scope: Scope::Row,
    metrics: true,
    zeros: false,
    scores: None,
    // For metrics of Gram matrices.
    takes: Takes::FACTOR,
    run: |matrix| matrix.lowest(matrix.scores()?, Ties::First),
};

/// |W|, row-major.
fn magnitude(stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    Ok(stats.weight.par_iter().map(|w| w.abs()).collect())
}

/// |W_ij|·‖x_j‖, row-major: what a weight contributes to its output (Wanda, arXiv 2306.11695).
///
/// # Errors
/// If the statistics do not have the norm of the input of each column.
pub fn weight_norm(stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    let &LayerStats { name, dims, weight, .. } = stats;
    let norms = stats
        .input_norms()
        .map_err(|_| Error::Missing { name: name.into(), statistic: "input_square" })?;
    Error::check_length(name, "mean squared input norms", norms.len(), dims.columns)?;
    let mut scores = vec![0.0; weight.len()];
    let columns = dims.columns.max(1);
    let rows = scores.par_chunks_mut(columns).zip(weight.par_chunks(columns));
    rows.for_each(|(scores, weights)| {
        for ((score, weight), norm) in scores.iter_mut().zip(weights).zip(&norms) {
            *score = weight.abs() * norm;
        }
    });
    Ok(scores)
}
