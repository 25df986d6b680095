//! Magnitude: a weight matters as much as it is large.

use barber_metric::LayerStats;
use rayon::prelude::*;

/// |W|.
pub(super) fn scores(stats: &LayerStats<'_>) -> Vec<f32> {
    stats.weight.par_iter().map(|weight| weight.abs()).collect()
}
