//! Exact swaps (SparseSwaps, arXiv 2512.10922): again and again, the kept and the pruned weight of
//! a matrix change places whose swap lowers the squared error of the output most.
//!
//! Let r = w − m⊙w be the pruned part of a row w, and e the target minus the row's dense output.
//! The error over the tokens x is
//!
//! Σ (rᵀx + e)² = rᵀG r + 2 rᵀb + Σ e², with G = Σ x xᵀ and b = Σ e x.
//!
//! With c = G r + b, pruning i adds wᵢ²Gᵢᵢ + 2 wᵢcᵢ, bringing j back adds wⱼ²Gⱼⱼ − 2 wⱼcⱼ, and
//! doing both adds another −2 wᵢwⱼGᵢⱼ. A swap changes c by two rows of G. G may be shrunk towards
//! its diagonal first.

use std::ops::Range;

use barber_metric::{Dims, LayerStats};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Error, Mask, Pattern, Scope, Tile};

/// The error of a matrix's output, as a quadratic function of its weights.
#[derive(Clone, Copy, Debug)]
pub struct OutputError<'a> {
    /// G = Σ x xᵀ, [columns, columns], symmetric; or its mean over samples.
    pub gram: &'a [f32],
    /// Σ e xᵀ, [rows, columns], with e the target minus the dense output; `None` if the target is
    /// the dense output.
    pub shift: Option<&'a [f32]>,
    /// Shrinkage of G towards its diagonal, from 0 to 1: with few samples, inputs that are
    /// independent seem correlated (Ledoit and Wolf, 2004).
    pub shrinkage: f32,
}

impl OutputError<'_> {
    /// Whether all inputs are zero in all tokens, so that the weights have no effect.
    pub fn has_no_inputs(&self, columns: usize) -> bool {
        self.gram.iter().step_by(columns + 1).all(|square| *square == 0.0)
    }

    /// The mean squared input, 1 if every input is zero: the weights then stay as they are with any
    /// damping.
    pub(super) fn mean_square(&self, columns: usize) -> f64 {
        let squares = self.gram.iter().step_by(columns + 1).map(|square| f64::from(*square));
        match squares.sum::<f64>() / columns.max(1) as f64 {
            0.0 => 1.0,
            mean => mean,
        }
    }

    /// The right sides of the normal equations, [rows, columns]: G w + Σ e x of each row w.
    pub(super) fn right_sides(&self, weight: &[f32], Dims { rows, columns }: Dims) -> Vec<f32> {
        let mut right = self.shift.map_or_else(|| vec![0.0; weight.len()], <[f32]>::to_vec);
        let sum = MatMut::from_row_major_slice_mut(&mut right, rows, columns);
        let dense = MatRef::from_row_major_slice(weight, rows, columns);
        let gram = MatRef::from_row_major_slice(self.gram, columns, columns);
        matmul(sum, Accum::Add, dense, gram, 1.0 - self.shrinkage, Par::rayon(0));
        let diagonal = self.gram.iter().step_by(columns + 1);
        for (right, weight) in right.chunks_mut(columns.max(1)).zip(weight.chunks(columns.max(1))) {
            let inputs = weight.iter().zip(diagonal.clone());
            right.iter_mut().zip(inputs).for_each(|(b, (w, g))| *b += self.shrinkage * w * g);
        }
        right
    }

    /// Checks that the sums fit the matrix, and that no number is NaN.
    pub(super) fn check(&self, name: &str, dims: Dims, weight: &[f32]) -> Result<(), Error> {
        let (columns, gram) = (dims.columns, "numbers of its Gram matrix");
        Error::check_length(name, "weights", weight.len(), dims.len())?;
        Error::check_length(name, gram, self.gram.len(), columns * columns)?;
        Error::check_numbers(name, columns, weight)?;
        Error::check_numbers(name, columns, self.gram)?;
        let Some(shift) = self.shift else { return Ok(()) };
        Error::check_length(name, "numbers of its target's shift", shift.len(), dims.len())?;
        Error::check_numbers(name, columns, shift)
    }
}

/// Number of rows whose slopes are computed together. Swaps within rows give the same bits for some
/// of a matrix's blocks of rows as for all.
pub(crate) const BLOCK: usize = 96;

/// The result of swaps in a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Swapped {
    /// Number of swaps.
    pub swaps: usize,
    /// The error before the swaps, without Σ e², which no mask changes.
    pub before: f64,
    /// The error after the swaps, without Σ e².
    pub after: f64,
}

/// Number of pruned weights for which a partner is searched in each step: those that lower the
/// error most. If none has a partner, all are tried.
const CANDIDATES: usize = 8;

/// The least relative gain of a swap, so that it exceeds rounding errors: a multiple of wᵢ²Gᵢᵢ +
/// wⱼ²Gⱼⱼ.
const TOLERANCE: f32 = 1e-5;

/// Swaps weights of a matrix until no swap lowers the error, or `limit` swaps per row are done.
/// Swaps are within rows; with [`Scope::Layer`] then also between rows, which may change the number
/// of weights that a row keeps; under an N:M pattern within tiles.
///
/// # Errors
/// If a slice does not fit the matrix, a value is not a number, the mask does not follow the
/// pattern, or the scope is neither row nor layer. On an error the mask is not changed.
pub fn swap(
    stats: &LayerStats<'_>,
    mask: &mut Mask,
    error: OutputError<'_>,
    scope: Scope,
    pattern: Pattern,
    limit: usize,
) -> Result<Swapped, Error> {
    let &LayerStats { name, dims, weight, .. } = stats;
    let columns = dims.columns;
    error.check(name, dims, weight)?;
    if !matches!(scope, Scope::Row | Scope::Layer) {
        return Err(Error::SwapScope { scope });
    }
    pattern.check(name, mask)?;
    let tile = pattern.tile_of(name, columns)?;
    if dims.is_empty() {
        return Ok(Swapped::default());
    }

    let mut kept = mask.to_bools();
    let mut slope = slopes(weight, &kept, error, columns);
    let before = value(weight, &kept, &slope, error.shift);
    let diagonal: Vec<f32> = (0..columns).map(|j| error.gram[j * columns + j]).collect();
    let scale = 1.0 - error.shrinkage;
    let problem = Problem { gram: error.gram, scale, diagonal: &diagonal, tile };
    let rows = weight.par_chunks(columns);
    let rows = rows.zip(kept.par_chunks_mut(columns).zip(slope.par_chunks_mut(columns)));
    let mut rows: Vec<Row<'_>> =
        rows.map(|(weight, (kept, slope))| Row { weight, kept, slope }).collect();
    let mut swaps = problem.within(&mut rows, limit);
    if scope == Scope::Layer && tile.is_none() {
        let between = problem.between(&mut rows, limit.saturating_mul(dims.rows));
        swaps += between;
        if between > 0 {
            swaps += problem.within(&mut rows, limit);
        }
    }
    drop(rows);
    // Rounding has accumulated in the slopes, so the final error is computed from new ones.
    let slope = slopes(weight, &kept, error, columns);
    let after = value(weight, &kept, &slope, error.shift);
    *mask = Mask::from_bools(dims, &kept);
    Ok(Swapped { swaps, before, after })
}

/// c = G r + b of each row, [rows, columns].
fn slopes(weight: &[f32], kept: &[bool], error: OutputError<'_>, columns: usize) -> Vec<f32> {
    let removed = weight.par_iter().zip(kept).map(|(w, kept)| if *kept { 0.0 } else { *w });
    let removed: Vec<f32> = removed.collect();
    let mut slope = error.shift.map_or_else(|| vec![0.0; weight.len()], <[f32]>::to_vec);
    let gram = MatRef::from_row_major_slice(error.gram, columns, columns);
    let blocks = slope.chunks_mut(BLOCK * columns).zip(removed.chunks(BLOCK * columns));
    for (slope, removed) in blocks {
        let rows = removed.len() / columns;
        let target = MatMut::from_row_major_slice_mut(slope, rows, columns);
        let removed = MatRef::from_row_major_slice(removed, rows, columns);
        matmul(target, Accum::Add, removed, gram, 1.0 - error.shrinkage, Par::rayon(0));
    }
    if error.shrinkage > 0.0 {
        let rows = slope.par_chunks_mut(columns).zip(weight.par_chunks(columns));
        rows.zip(kept.par_chunks(columns)).for_each(|((slope, weight), kept)| {
            for (j, slope) in slope.iter_mut().enumerate().filter(|(j, _)| !kept[*j]) {
                *slope += error.shrinkage * weight[j] * error.gram[j * columns + j];
            }
        });
    }
    slope
}

/// rᵀG r + 2 rᵀb of all rows together: rᵀ(c + b).
fn value(weight: &[f32], kept: &[bool], slope: &[f32], shift: Option<&[f32]>) -> f64 {
    let at = |i: usize| {
        let shift = shift.map_or(0.0, |shift| f64::from(shift[i]));
        f64::from(weight[i]) * (f64::from(slope[i]) + shift)
    };
    (0..weight.len()).filter(|&i| !kept[i]).map(at).sum()
}

/// The state of a row.
struct Row<'a> {
    weight: &'a [f32],
    kept: &'a mut [bool],
    /// c, half the derivatives of the error.
    slope: &'a mut [f32],
}

/// A swap, and its change of the error.
#[derive(Clone, Copy)]
struct Swap {
    goes: usize,
    comes: usize,
    change: f32,
}

/// The part of the problem that all rows share.
struct Problem<'a> {
    gram: &'a [f32],
    /// Factor of the Gram matrix off the diagonal: 1 − shrinkage.
    scale: f32,
    diagonal: &'a [f32],
    tile: Option<Tile>,
}

/// Buffers for the search in a row.
#[derive(Default)]
struct Work {
    /// Change of the error if a kept weight is pruned; infinite for pruned weights.
    costs: Vec<f32>,
    /// Change of the error if a pruned weight comes back; infinite for kept weights.
    gains: Vec<f32>,
    /// Pruned weights, ordered by their gains.
    candidates: Vec<usize>,
}

impl Problem<'_> {
    /// Swaps within each row, at most `limit` times; returns the number of swaps.
    fn within(&self, rows: &mut [Row<'_>], limit: usize) -> usize {
        let row = |work: &mut Work, row: &mut Row<'_>| {
            let mut swaps = 0;
            while swaps < limit
                && let Some(swap) = self.best(row, work)
            {
                self.prune(row, swap.goes);
                self.bring_back(row, swap.comes);
                swaps += 1;
            }
            swaps
        };
        rows.par_iter_mut().map_init(Work::default, row).sum()
    }

    /// Swaps weights between rows, at most `limit` times: prunes the weight with the least cost of
    /// all rows, and brings back the weight with the best gain of another row.
    fn between(&self, rows: &mut [Row<'_>], limit: usize) -> usize {
        let mut ends: Vec<Ends> = rows.par_iter().map(|row| self.ends(row)).collect();
        let mut swaps = 0;
        while swaps < limit {
            let least = |of: &dyn Fn(&Ends) -> f32, but: Option<usize>| {
                let rows = (0..ends.len()).filter(|row| Some(*row) != but);
                rows.min_by(|a, b| of(&ends[*a]).total_cmp(&of(&ends[*b])))
            };
            let Some(from) = least(&|ends| ends.cost.1, None) else { break };
            let Some(to) = least(&|ends| ends.gain.1, Some(from)) else { break };
            let ((goes, cost), (comes, gain)) = (ends[from].cost, ends[to].gain);
            let weighs = self.weighs(&rows[from], goes) + self.weighs(&rows[to], comes);
            // False if the sum is NaN.
            let lowers = cost + gain < -TOLERANCE * weighs;
            if !lowers {
                break;
            }
            self.prune(&mut rows[from], goes);
            self.bring_back(&mut rows[to], comes);
            for row in [from, to] {
                ends[row] = self.ends(&rows[row]);
            }
            swaps += 1;
        }
        swaps
    }

    /// wᵢ²Gᵢᵢ.
    fn weighs(&self, row: &Row<'_>, i: usize) -> f32 {
        row.weight[i] * row.weight[i] * self.diagonal[i]
    }

    fn gram_row(&self, i: usize) -> &[f32] {
        let columns = self.diagonal.len();
        &self.gram[i * columns..(i + 1) * columns]
    }

    fn prune(&self, row: &mut Row<'_>, i: usize) {
        row.kept[i] = false;
        self.change(row, i, row.weight[i]);
    }

    /// Updates the row after the removed part of weight `i` changed by `change`.
    fn change(&self, row: &mut Row<'_>, i: usize, change: f32) {
        add(row.slope, self.gram_row(i), self.scale * change);
        row.slope[i] += (1.0 - self.scale) * change * self.diagonal[i];
    }

    fn bring_back(&self, row: &mut Row<'_>, j: usize) {
        row.kept[j] = true;
        self.change(row, j, -row.weight[j]);
    }

    /// The ends of a row.
    fn ends(&self, row: &Row<'_>) -> Ends {
        self.ends_in(row, 0..row.weight.len())
    }

    /// The ends of some weights of a row.
    fn ends_in(&self, row: &Row<'_>, weights: Range<usize>) -> Ends {
        let mut ends = Ends { cost: (0, f32::INFINITY), gain: (0, f32::INFINITY) };
        for i in weights {
            let (weighs, slope) = (self.weighs(row, i), 2.0 * row.weight[i] * row.slope[i]);
            let (end, change) = if row.kept[i] {
                (&mut ends.cost, weighs + slope)
            } else {
                (&mut ends.gain, weighs - slope)
            };
            if change < end.1 {
                *end = (i, change);
            }
        }
        ends
    }

    /// The best swap of a row that the search finds; `None` if no swap lowers the error.
    fn best(&self, row: &Row<'_>, work: &mut Work) -> Option<Swap> {
        work.costs.resize(row.weight.len(), 0.0);
        work.gains.resize(row.weight.len(), 0.0);
        changes(row, self.diagonal, &mut work.costs, &mut work.gains);
        let found = match self.tile {
            Some(Tile { m, .. }) => self.best_in_tiles(row, work, m),
            None => {
                let pruned = (0..row.weight.len()).filter(|&i| !row.kept[i]);
                work.candidates.clear();
                work.candidates.extend(pruned);
                let Work { costs, gains, candidates } = &mut *work;
                if candidates.len() > CANDIDATES {
                    candidates.select_nth_unstable_by(CANDIDATES, |a, b| {
                        gains[*a].total_cmp(&gains[*b]).then(a.cmp(b))
                    });
                }
                let (first, rest) = candidates.split_at(candidates.len().min(CANDIDATES));
                let best = |candidates: &[usize]| self.best_of(row, costs, gains, candidates);
                best(first).or_else(|| best(rest))
            }
        };
        found.filter(|swap| self.lowers(row, swap))
    }

    /// Whether a swap lowers the error by more than rounding errors.
    fn lowers(&self, row: &Row<'_>, swap: &Swap) -> bool {
        let weighs = self.weighs(row, swap.goes) + self.weighs(row, swap.comes);
        swap.change < -TOLERANCE * weighs
    }

    /// The best swap that brings back one of the candidates; `None` if none lowers the error.
    fn best_of(
        &self,
        row: &Row<'_>,
        costs: &[f32],
        gains: &[f32],
        candidates: &[usize],
    ) -> Option<Swap> {
        let mut found: Option<Swap> = None;
        for &comes in candidates {
            let factor = -2.0 * self.scale * row.weight[comes];
            let gain = gains[comes];
            let gram = self.gram_row(comes);
            let best = found.map_or(0.0, |found| found.change);
            let better = gain + least(costs, row.weight, gram, factor) < best;
            if !better {
                continue;
            }
            let costs = costs.iter().zip(row.weight).zip(gram);
            let costs = costs.map(|((cost, w), g)| gain + (cost + factor * (w * g)));
            let lowest = costs.enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b));
            found = lowest.map(|(goes, change)| Swap { goes, comes, change });
        }
        found.filter(|swap| self.lowers(row, swap))
    }

    /// The best swap inside a tile.
    fn best_in_tiles(&self, row: &Row<'_>, work: &Work, m: usize) -> Option<Swap> {
        let mut found: Option<Swap> = None;
        for start in (0..row.weight.len()).step_by(m) {
            for comes in (start..start + m).filter(|&i| !row.kept[i]) {
                let (gain, gram) = (work.gains[comes], self.gram_row(comes));
                for goes in (start..start + m).filter(|&i| row.kept[i]) {
                    let both =
                        -2.0 * self.scale * row.weight[comes] * row.weight[goes] * gram[goes];
                    let swap = Swap { goes, comes, change: gain + work.costs[goes] + both };
                    if swap.change < found.map_or(0.0, |found| found.change)
                        && self.lowers(row, &swap)
                    {
                        found = Some(swap);
                    }
                }
            }
        }
        found
    }
}

/// The kept weight of a row with the least cost, and the pruned weight with the best gain, each
/// with its change of the error; infinite if there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ends {
    /// Column of the weight to prune, and the change of the error.
    pub cost: (usize, f32),
    /// Column of the weight to bring back, and the change of the error.
    pub gain: (usize, f32),
}

/// The best swap of each row, for an error that is a quadratic function of the pruned part of the
/// row. `slope`, [rows, columns], is c, half the derivatives; `squares` is the diagonal of G. The
/// term −2 wᵢwⱼGᵢⱼ is left out. Under an N:M pattern both weights are in the same tile.
///
/// # Errors
/// If a slice does not fit the matrix, or the mask does not follow the pattern.
pub fn row_ends(
    stats: &LayerStats<'_>,
    mask: &Mask,
    slope: &mut [f32],
    squares: &[f32],
    pattern: Pattern,
) -> Result<Vec<Ends>, Error> {
    let &LayerStats { name, dims, weight, .. } = stats;
    Error::check_length(name, "weights", weight.len(), dims.len())?;
    Error::check_length(name, "slopes", slope.len(), dims.len())?;
    Error::check_length(name, "squares of inputs", squares.len(), dims.columns)?;
    pattern.check(name, mask)?;
    let tile = pattern.tile_of(name, dims.columns)?;
    let problem = Problem { gram: &[], scale: 0.0, diagonal: squares, tile };
    let mut kept = mask.to_bools();
    let rows = weight.par_chunks(dims.columns);
    let rows = rows.zip(kept.par_chunks_mut(dims.columns).zip(slope.par_chunks_mut(dims.columns)));
    let width = tile.map_or(dims.columns, |tile| tile.m);
    let ends = |(weight, (kept, slope))| {
        let row = Row { weight, kept, slope };
        let starts = (0..dims.columns).step_by(width);
        let tiles = starts.map(|start| problem.ends_in(&row, start..start + width));
        let change = |ends: &Ends| ends.cost.1 + ends.gain.1;
        let none = Ends { cost: (0, f32::INFINITY), gain: (0, f32::INFINITY) };
        tiles.fold(none, |best, ends| if change(&ends) < change(&best) { ends } else { best })
    };
    Ok(rows.map(ends).collect())
}

/// Computes the change of the error for each weight.
fn changes(row: &Row<'_>, diagonal: &[f32], costs: &mut [f32], gains: &mut [f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let inputs = row.weight.iter().zip(&*row.slope).zip(&*row.kept).zip(diagonal);
            for ((((w, c), kept), g), (cost, gain)) in inputs.zip(costs.iter_mut().zip(gains)) {
                let (weighs, slope) = (w * w * g, 2.0 * w * c);
                *cost = if *kept { weighs + slope } else { f32::INFINITY };
                *gain = if *kept { f32::INFINITY } else { weighs - slope };
            }
        },
    );
}

/// The least of cost + factor · w · g.
fn least(costs: &[f32], weight: &[f32], gram: &[f32], factor: f32) -> f32 {
    const LANES: usize = 32;
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [f32::INFINITY; LANES];
            let whole = costs.chunks_exact(LANES).zip(weight.chunks_exact(LANES));
            for ((costs, weight), gram) in whole.zip(gram.chunks_exact(LANES)) {
                for i in 0..LANES {
                    let change = costs[i] + factor * (weight[i] * gram[i]);
                    lanes[i] = if change < lanes[i] { change } else { lanes[i] };
                }
            }
            let done = costs.len() / LANES * LANES;
            let rest = costs[done..].iter().zip(&weight[done..]).zip(&gram[done..]);
            let rest = rest.map(|((cost, w), g)| cost + factor * (w * g));
            lanes.into_iter().chain(rest).fold(f32::INFINITY, f32::min)
        },
    )
}

/// sum += factor · row.
fn add(sum: &mut [f32], row: &[f32], factor: f32) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x),
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::SplitMix64;

    const ALL: Pattern = Pattern::UNSTRUCTURED;
    const TWO_OF_FOUR: Pattern = Pattern::n_of_m(2, 4);

    /// A matrix, the inputs that it has seen and what its target differs by.
    struct Case {
        dims: Dims,
        weight: Vec<f32>,
        inputs: Vec<f32>,
        departure: Vec<f32>,
        mask: Mask,
    }

    impl Case {
        fn new(rows: usize, columns: usize, pattern: Pattern, seed: u64) -> Self {
            let mut random = SplitMix64::new(seed);
            let mut noise = |length: usize| -> Vec<f32> {
                (0..length).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect()
            };
            let tokens = 2 * columns;
            let dims = Dims { rows, columns };
            let mut inputs = noise(tokens * columns);
            for x in inputs.chunks_mut(columns) {
                (1..columns).for_each(|j| x[j] += 0.7 * x[j - 1]);
            }
            let (weight, departure) = (noise(dims.len()), noise(rows * tokens));
            let scores = noise(dims.len());
            let kept = |i: usize| match pattern.tile(columns) {
                None => scores[i] > 0.0,
                Some(Tile { n, m }) => {
                    let higher = |&j: &usize| (scores[j], j) > (scores[i], i);
                    (i / m * m..(i / m + 1) * m).filter(higher).count() < n
                }
            };
            Self { dims, mask: Mask::from_fn(dims, kept), weight, inputs, departure }
        }

        fn tokens(&self) -> usize {
            self.inputs.len() / self.dims.columns
        }

        fn gram(&self) -> Vec<f32> {
            let columns = self.dims.columns;
            let at = |k: usize| {
                self.inputs.chunks(columns).map(|x| x[k / columns] * x[k % columns]).sum()
            };
            (0..columns * columns).map(at).collect()
        }

        fn shift(&self) -> Vec<f32> {
            let (columns, tokens) = (self.dims.columns, self.tokens());
            let at = |k: usize| {
                let departures = &self.departure[k / columns * tokens..];
                let inputs = self.inputs.chunks(columns).zip(departures);
                inputs.map(|(x, e)| x[k % columns] * e).sum()
            };
            (0..self.dims.len()).map(at).collect()
        }

        /// Σ (rᵀx + e)² − Σ e² of a mask, token by token.
        fn error(&self, mask: &Mask, departs: bool) -> f64 {
            let (columns, tokens) = (self.dims.columns, self.tokens());
            let mut error = 0.0;
            for row in 0..self.dims.rows {
                for (t, x) in self.inputs.chunks(columns).enumerate() {
                    let removed = (0..columns).filter(|j| !mask.get(row * columns + j));
                    let lost: f64 = removed
                        .map(|j| f64::from(self.weight[row * columns + j]) * f64::from(x[j]))
                        .sum();
                    let e = if departs { f64::from(self.departure[row * tokens + t]) } else { 0.0 };
                    error += (lost + e).powi(2) - e * e;
                }
            }
            error
        }

        fn swapped(
            &self,
            departs: bool,
            scope: Scope,
            pattern: Pattern,
            limit: usize,
        ) -> (Mask, Swapped) {
            let (gram, shift, mut mask) = (self.gram(), self.shift(), self.mask.clone());
            let stats = LayerStats {
                name: "w",
                dims: self.dims,
                weight: &self.weight,
                ..LayerStats::default()
            };
            let error =
                OutputError { gram: &gram, shift: departs.then_some(&shift), shrinkage: 0.0 };
            let found = swap(&stats, &mut mask, error, scope, pattern, limit).expect("a mask");
            (mask, found)
        }
    }

    proptest! {
        #[test]
        fn swaps_keep_counts_and_patterns_and_lower_the_error(
            seed in any::<u64>(),
            columns in (1..7_usize).prop_map(|tiles| 4 * tiles),
            rows in 1..4_usize,
            limit in 0..30_usize,
            departs in any::<bool>(),
            layer in any::<bool>(),
            tiles in any::<bool>(),
        ) {
            let pattern = if tiles { TWO_OF_FOUR } else { ALL };
            let scope = if layer { Scope::Layer } else { Scope::Row };
            let case = Case::new(rows, columns, pattern, seed);
            let (mask, found) = case.swapped(departs, scope, pattern, limit);
            prop_assert_eq!(mask.kept(), case.mask.kept());
            pattern.check("w", &mask).expect("the pattern");
            if !layer || tiles {
                for row in 0..rows {
                    let kept = |mask: &Mask| {
                        (row * columns..(row + 1) * columns).filter(|&i| mask.get(i)).count()
                    };
                    prop_assert_eq!(kept(&mask), kept(&case.mask));
                }
            }
            let (before, after) = (case.error(&case.mask, departs), case.error(&mask, departs));
            prop_assert!(after <= before, "{} {}", after, before);
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * (1.0 + before.abs());
            prop_assert!(close(found.before, before), "{} {}", found.before, before);
            prop_assert!(close(found.after, after), "{} {}", found.after, after);
            prop_assert_eq!(found.swaps == 0, mask == case.mask);
        }

        #[test]
        fn no_swap_is_left(seed in any::<u64>(), departs in any::<bool>(), tiles in any::<bool>()) {
            let pattern = if tiles { TWO_OF_FOUR } else { ALL };
            let case = Case::new(1, 24, pattern, seed);
            let (mask, _) = case.swapped(departs, Scope::Row, pattern, usize::MAX);
            let error = case.error(&mask, departs);
            for goes in (0..24).filter(|&i| mask.get(i)) {
                for comes in (0..24).filter(|&j| !mask.get(j) && (!tiles || j / 4 == goes / 4)) {
                    let mut other = mask.clone();
                    other.set(goes, false);
                    other.set(comes, true);
                    let change = case.error(&other, departs) - error;
                    prop_assert!(change > -1e-3, "{} {}: {}", goes, comes, change);
                }
            }
        }

        #[test]
        fn the_first_swap_is_the_best(seed in any::<u64>(), departs in any::<bool>()) {
            // As few pruned weights as candidates: all of them are tried.
            let mut case = Case::new(1, 2 * CANDIDATES, ALL, seed);
            case.mask = Mask::from_fn(case.dims, |i| i % 2 == 0);
            let (mask, found) = case.swapped(departs, Scope::Row, ALL, 1);
            let mut least = case.error(&case.mask, departs);
            for goes in (0..case.dims.len()).step_by(2) {
                for comes in (1..case.dims.len()).step_by(2) {
                    let mut other = case.mask.clone();
                    other.set(goes, false);
                    other.set(comes, true);
                    least = least.min(case.error(&other, departs));
                }
            }
            prop_assert!(found.swaps <= 1);
            prop_assert!((case.error(&mask, departs) - least).abs() < 1e-3);
        }
    }

    #[test]
    fn a_shrunk_matrix_is_as_if_it_were_given_so() {
        let case = Case::new(3, 24, ALL, 5);
        let (gram, shift) = (case.gram(), case.shift());
        let shrunk: Vec<f32> = (0..gram.len())
            .map(|k| if k / 24 == k % 24 { gram[k] } else { 0.75 * gram[k] })
            .collect();
        let stats = LayerStats {
            name: "w",
            dims: case.dims,
            weight: &case.weight,
            ..LayerStats::default()
        };
        let found = [(&gram, 0.25), (&shrunk, 0.0)].map(|(gram, shrinkage)| {
            let mut mask = case.mask.clone();
            let error = OutputError { gram, shift: Some(&shift), shrinkage };
            let found = swap(&stats, &mut mask, error, Scope::Row, ALL, 4).unwrap();
            (mask, found.swaps)
        });
        assert!(found[0].1 > 0);
        assert_eq!(found[0], found[1]);
    }

    #[test]
    fn between_rows_the_better_use_wins() {
        // The second row's weights weigh more: it gets what the first one can do without.
        let dims = Dims { rows: 2, columns: 2 };
        let weight = [1.0, 1.0, 5.0, 4.0];
        let stats = LayerStats { name: "w", dims, weight: &weight, ..LayerStats::default() };
        let error = OutputError { gram: &[1.0, 0.0, 0.0, 1.0], shift: None, shrinkage: 0.0 };
        let mut mask = Mask::from_bools(dims, &[true, false, true, false]);
        let found = swap(&stats, &mut mask, error, Scope::Layer, ALL, 9).unwrap();
        assert_eq!(mask.to_bools(), [false, false, true, true]);
        assert_eq!(found, Swapped { swaps: 1, before: 17.0, after: 2.0 });
    }

    #[test]
    fn what_is_wrong_is_said_and_changes_nothing() {
        let case = Case::new(2, 8, ALL, 1);
        let (gram, shift) = (case.gram(), case.shift());
        let (mut nan, mut overfull) = (gram.clone(), Mask::kept_everywhere(case.dims));
        nan[3] = f32::NAN;
        let mut check = |gram: &[f32], shift: &[f32], scope, pattern, message: &str| {
            let stats = LayerStats {
                name: "w",
                dims: case.dims,
                weight: &case.weight,
                ..LayerStats::default()
            };
            let error = OutputError { gram, shift: Some(shift), shrinkage: 0.0 };
            let found = swap(&stats, &mut overfull, error, scope, pattern, 1).unwrap_err();
            assert!(found.to_string().contains(message), "{found}");
            assert_eq!(overfull, Mask::kept_everywhere(case.dims));
        };
        check(&gram[1..], &shift, Scope::Row, ALL, "63 numbers of its Gram matrix");
        check(&gram, &shift[1..], Scope::Row, ALL, "shift");
        check(&nan, &shift, Scope::Row, ALL, "row 0, column 3 is not a number");
        check(&gram, &shift, Scope::Column, ALL, "not a `column`");
        check(&gram, &shift, Scope::Row, TWO_OF_FOUR, "2:4 allows 2");
    }
}
