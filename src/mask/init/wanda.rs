//! Wanda (arXiv 2306.11695): a weight matters as much as what it adds to its output.

use barber_metric::LayerStats;
use rayon::prelude::*;

use crate::mask::Error;

/// |W_ij|·√s_j, s_j being the mean over samples of Σ x_j² over a sample's tokens.
pub(super) fn scores(stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    let &LayerStats { name, dims, weight, input_square, .. } = stats;
    let squares = input_square
        .ok_or_else(|| Error::Missing { name: name.into(), statistic: "input_square" })?;
    Error::check_length(name, "mean squared input norms", squares.len(), dims.columns)?;
    let norms: Vec<f32> = squares.iter().map(|square| square.sqrt()).collect();
    let mut scores = vec![0.0; weight.len()];
    let rows =
        scores.par_chunks_mut(dims.columns.max(1)).zip(weight.par_chunks(dims.columns.max(1)));
    rows.for_each(|(scores, weights)| {
        for ((score, weight), norm) in scores.iter_mut().zip(weights).zip(&norms) {
            *score = weight.abs() * norm;
        }
    });
    Ok(scores)
}
