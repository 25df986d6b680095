//! SparseGPT (arXiv 2301.00774): prunes a block of columns, and changes the kept weights to its
//! right to compensate for the error.

use std::num::NonZeroUsize;

use barber_metric::{Dims, LayerStats, Needs};
use faer::{
    Accum, MatMut, MatRef, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::factor::{LltParams, cholesky_in_place, cholesky_in_place_scratch},
        matmul::matmul,
        triangular_inverse::invert_lower_triangular,
    },
};
use rayon::prelude::*;

use super::{
    Initial, InitialMask, Takes, floored,
    lowest::{Ties, prune_lowest},
};
use crate::mask::{Error, Mask, Pattern, Scope, Tile};

pub(super) static SPARSEGPT: InitialMask = InitialMask {
    name: "sparsegpt",
    prunes: "block by block of columns, by the error that it causes, changing kept weights to make up \
             for it (arXiv 2301.00774)",
    needs: Needs::GRAM,
    scope: Scope::Layer,
    metrics: false,
    zeros: false,
    scores: None,
    takes: Takes::FACTOR,
    run: |matrix| prune(matrix.stats, matrix.pattern, matrix.ratio),
};

/// Number of columns that are pruned together, as in the paper.
const BLOCK: usize = 128;
/// The first damping, as a fraction of the Hessian's mean diagonal, as in the paper.
const DAMPING: f64 = 0.01;
/// Maximum damping; more would dominate the Hessian.
const MOST_DAMPING: f64 = 1.0;
/// The division of the work. It must not depend on the number of threads, nor may the result.
const WORK: Par = Par::Rayon(NonZeroUsize::new(16).unwrap());

/// Prunes a matrix. In each block of columns, the weights with the lowest w²/U_jj² over all rows
/// are pruned, so that ⌊`ratio`·n⌋ of the n weights up to the block's end are pruned; with an N:M
/// pattern, the lowest of each tile when it is reached. U is the upper Cholesky factor of the
/// damped Hessian's inverse. Zero weights are pruned first, and stay zero if kept.
fn prune(stats: &LayerStats<'_>, pattern: Pattern, ratio: f64) -> Result<Initial, Error> {
    let &LayerStats { name, dims, weight, gram, .. } = stats;
    Error::check_numbers(name, dims.columns, weight)?;
    let tile = pattern.tile_of(name, dims.columns)?;
    let gram = gram.ok_or_else(|| Error::Missing { name: name.into(), statistic: "gram" })?;
    Error::check_length(name, "numbers of a Gram matrix", gram.len(), dims.columns.pow(2))?;
    if dims.is_empty() {
        return Ok(Initial::of(Mask::kept_everywhere(dims)));
    }
    let (factor, damping) = inverse_factor(name, gram, dims.columns)?;

    let mut values = weight.to_vec();
    // Weights of an input that is always zero have no effect.
    for dead in (0..dims.columns).filter(|j| gram[j * dims.columns + j] == 0.0) {
        values.iter_mut().skip(dead).step_by(dims.columns).for_each(|w| *w = 0.0);
    }
    let mut kept = vec![true; dims.len()];
    // Blocks consist of whole tiles.
    let block = tile.map_or(BLOCK, |Tile { m, .. }| (BLOCK / m).max(1) * m);
    for start in (0..dims.columns).step_by(block) {
        let end = dims.columns.min(start + block);
        let columns = Block { start, end, dims, dense: weight, factor: &factor };
        if tile.is_none() {
            let gone = floored(ratio, dims.rows * columns.start);
            let count = floored(ratio, dims.rows * columns.end) - gone;
            columns.choose(&values, count, &mut kept);
        }
        columns.prune(&mut values, &mut kept, tile);
    }
    if let Some(i) = values.iter().position(|w| !w.is_finite()) {
        let (row, column) = (i / dims.columns, i % dims.columns);
        return Err(Error::NotFinite { name: name.into(), row, column, value: values[i] });
    }
    for ((value, &dense), &kept) in values.iter_mut().zip(weight).zip(&kept) {
        if !kept || dense == 0.0 {
            *value = dense;
        }
    }
    let damping = (damping > DAMPING).then_some(damping);
    Ok(Initial { mask: Mask::from_bools(dims, &kept), values: Some(values), damping })
}

/// A block of columns, `start..end`, of a matrix.
#[derive(Clone, Copy)]
struct Block<'a> {
    start: usize,
    end: usize,
    dims: Dims,
    /// The checkpoint's weights of the matrix, row-major.
    dense: &'a [f32],
    /// The factor U, row-major.
    factor: &'a [f32],
}

impl Block<'_> {
    fn width(&self) -> usize {
        self.end - self.start
    }

    /// Row `j` of U from its diagonal to the end of the block.
    fn factor(&self, j: usize) -> &[f32] {
        &self.factor[j * self.dims.columns..][j..self.end]
    }

    /// The score of a weight of column `j` with the dense value `dense` and the current value
    /// `value`; below all others if `dense` is zero.
    fn score(&self, j: usize, dense: f32, value: f32) -> f32 {
        let ratio = value / self.factor(j)[0];
        if dense == 0.0 { -1.0 } else { ratio * ratio }
    }

    /// Marks the block's lowest `count` weights over all rows as pruned.
    fn choose(&self, values: &[f32], count: usize, kept: &mut [bool]) {
        let dims = Dims { rows: self.dims.rows, columns: self.width() };
        let mut scores = vec![0.0; dims.len()];
        let [dense, values] = [self.dense, values].map(|of| of.par_chunks(self.dims.columns));
        let rows = scores.par_chunks_mut(dims.columns).zip(dense.zip(values));
        rows.for_each(|(scores, (dense, values))| {
            for (score, j) in scores.iter_mut().zip(self.start..self.end) {
                *score = self.score(j, dense[j], values[j]);
            }
        });
        let mask = prune_lowest(dims, &scores, dims.len(), |_| count, Ties::Last).to_bools();
        let rows = kept.par_chunks_mut(self.dims.columns).zip(mask.par_chunks(dims.columns));
        rows.for_each(|(kept, mask)| kept[self.start..self.end].copy_from_slice(mask));
    }

    /// Prunes the block's columns from left to right; subtracts e · U_j from the weights to the
    /// right, with each row's error e = w/U_jj.
    fn prune(&self, values: &mut [f32], kept: &mut [bool], tile: Option<Tile>) {
        let Dims { rows, columns } = self.dims;
        let mut errors = vec![0.0; rows * self.width()];
        let each = values.par_chunks_mut(columns).zip(kept.par_chunks_mut(columns));
        let each = each.zip(self.dense.par_chunks(columns));
        each.zip(errors.par_chunks_mut(self.width())).for_each(
            |(((values, kept), dense), errors)| {
                for j in self.start..self.end {
                    if let Some(Tile { n, m }) =
                        tile.filter(|tile| (j - self.start).is_multiple_of(tile.m))
                    {
                        let tile = j..j + m;
                        let weights = (&dense[tile.clone()], &values[tile.clone()]);
                        self.choose_in_tile(weights, &mut kept[tile], m - n, j);
                    }
                    // A kept zero becomes zero again, so its current value is an error, too.
                    if kept[j] && dense[j] != 0.0 {
                        continue;
                    }
                    let factor = self.factor(j);
                    let error = values[j] / factor[0];
                    errors[j - self.start] = error;
                    let right = values[j..self.end].iter_mut().zip(factor);
                    right.for_each(|(w, u)| *w -= error * u);
                }
            },
        );
        let rest = columns - self.end;
        if rest == 0 {
            return;
        }
        let errors = MatRef::from_row_major_slice(&errors, rows, self.width());
        let factor = MatRef::from_row_major_slice(self.factor, columns, columns);
        let values = MatMut::from_row_major_slice_mut(values, rows, columns);
        let factor = factor.submatrix(self.start, self.end, self.width(), rest);
        let right = values.submatrix_mut(0, self.end, rows, rest);
        matmul(right, Accum::Add, errors, factor, -1.0, WORK);
    }

    /// Marks the lowest `count` weights of the tile that begins at column `first` as pruned.
    fn choose_in_tile(
        &self,
        (dense, values): (&[f32], &[f32]),
        kept: &mut [bool],
        count: usize,
        first: usize,
    ) {
        for _ in 0..count {
            let open = (0..values.len()).filter(|i| kept[*i]);
            let scores = open.map(|i| (i, self.score(first + i, dense[i], values[i])));
            if let Some((lowest, _)) = scores.min_by(|(_, a), (_, b)| a.total_cmp(b)) {
                kept[lowest] = false;
            }
        }
    }
}

/// The upper Cholesky factor U of the inverse of the damped Hessian 2·`gram`, [n, n], row-major,
/// and the damping as a fraction of the mean diagonal. The damping is raised until the matrix is
/// positive definite.
///
/// With P reversing the order of rows and columns and PHP = LLᵀ, H⁻¹ = UᵀU for U = P L⁻¹ P: one
/// factorisation and one triangular inverse instead of an inverse between two factorisations.
fn inverse_factor(name: &str, gram: &[f32], n: usize) -> Result<(Vec<f32>, f64), Error> {
    let diagonal = |j: usize| match 2.0 * f64::from(gram[j * n + j]) {
        0.0 => 1.0,
        square => square,
    };
    let mean = (0..n).map(diagonal).sum::<f64>() / n as f64;
    if !gram.par_iter().all(|x| x.is_finite()) {
        return Err(Error::NotPositiveDefinite { name: name.into(), damping: 0.0 });
    }
    let mut work = vec![0.0; n * n];
    let mut damping = DAMPING;
    loop {
        // As H is symmetric, P H P is its numbers in reverse order.
        work.par_iter_mut().zip(gram.par_iter().rev()).for_each(|(h, g)| *h = 2.0 * f64::from(*g));
        for j in 0..n {
            work[(n - 1 - j) * (n + 1)] = diagonal(j) + damping * mean;
        }
        let matrix = MatMut::from_column_major_slice_mut(&mut work, n, n);
        let parameters: Spec<LltParams, f64> = Spec::default();
        let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, WORK, parameters));
        let stack = MemStack::new(&mut memory);
        match cholesky_in_place(matrix, Default::default(), WORK, stack, parameters) {
            Ok(_) => break,
            Err(_) if damping < MOST_DAMPING => damping *= 10.0,
            Err(_) => return Err(Error::NotPositiveDefinite { name: name.into(), damping }),
        }
    }
    let lower = MatRef::from_column_major_slice(&work, n, n);
    let mut inverse = vec![0.0; n * n];
    let target = MatMut::from_column_major_slice_mut(&mut inverse, n, n);
    invert_lower_triangular(target, lower, WORK);
    drop(work);
    let mut factor = vec![0.0; n * n];
    factor.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
        for (j, u) in row.iter_mut().enumerate().skip(i) {
            *u = inverse[(n - 1 - j) * n + (n - 1 - i)] as f32;
        }
    });
    Ok((factor, damping))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        mask::init::testing::{gram, noise},
        random::SplitMix64,
    };

    fn stats<'a>(weight: &'a [f32], gram: &'a [f32], rows: usize) -> LayerStats<'a> {
        let dims = Dims { rows, columns: weight.len() / rows };
        LayerStats { name: "w", dims, weight, gram: Some(gram), ..LayerStats::default() }
    }

    /// tr(D G Dᵀ) for D, what pruning took from the weights: the output error.
    fn error(dense: &[f32], values: &[f32], mask: &Mask, gram: &[f32]) -> f32 {
        let columns = mask.dims().columns;
        let kept = |i: usize| if mask.get(i) { values[i] } else { 0.0 };
        let lost: Vec<f32> = (0..dense.len()).map(|i| dense[i] - kept(i)).collect();
        let of = |row: &[f32]| -> f32 {
            let pairs = (0..columns.pow(2)).map(|k| (k / columns, k % columns, gram[k]));
            pairs.map(|(i, j, g)| row[i] * g * row[j]).sum()
        };
        lost.chunks(columns).map(of).sum()
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let n = 37;
        let gram = gram(n, 60, 1);
        let (factor, damping) = inverse_factor("w", &gram, n).unwrap();
        assert_eq!(damping, DAMPING);
        let mean = (0..n).map(|j| 2.0 * gram[j * (n + 1)]).sum::<f32>() / n as f32;
        // UᵀU H = 1.
        let at = |i: usize, j: usize| factor[i * n + j];
        let inverse = |i: usize, j: usize| (0..n).map(|k| at(k, i) * at(k, j)).sum::<f32>();
        let hessian =
            |i: usize, j: usize| 2.0 * gram[i * n + j] + if i == j { 0.01 * mean } else { 0.0 };
        for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
            assert!(i <= j || at(i, j) == 0.0);
            let one: f32 = (0..n).map(|k| inverse(i, k) * hessian(k, j)).sum();
            assert!((one - f32::from(u8::from(i == j))).abs() < 2e-3, "{i}, {j}: {one}");
        }
    }

    #[test]
    fn kept_weights_make_up_for_the_pruned() {
        let (rows, columns) = (8, 160);
        let (weight, gram) = (noise(rows * columns, 2), gram(columns, 400, 3));
        for pattern in ["unstructured", "2:4", "3:7"] {
            let columns = if pattern == "3:7" { 154 } else { columns };
            let gram: Vec<f32> =
                gram.chunks(160).take(columns).flat_map(|row| &row[..columns]).copied().collect();
            let weight = &weight[..rows * columns];
            let pattern = pattern.parse().unwrap();
            let found = prune(&stats(weight, &gram, rows), pattern, 0.5).unwrap();
            let values = found.values.unwrap();
            let changed = error(weight, &values, &found.mask, &gram);
            let unchanged = error(weight, weight, &found.mask, &gram);
            assert!(changed < 0.6 * unchanged, "{pattern}: {changed} of {unchanged}");
            pattern.check("w", &found.mask).unwrap();
            for (i, value) in values.iter().enumerate() {
                assert!(found.mask.get(i) || *value == weight[i]);
            }
        }
    }

    #[test]
    fn dead_inputs_go_first() {
        let (rows, columns) = (4, 16);
        let mut gram = gram(columns, 40, 4);
        for i in 0..columns {
            (gram[i * columns + 5], gram[5 * columns + i]) = (0.0, 0.0);
        }
        let weight = noise(rows * columns, 5);
        let ratio = 1.0 / columns as f64;
        let found = prune(&stats(&weight, &gram, rows), Pattern::UNSTRUCTURED, ratio).unwrap();
        for i in 0..rows * columns {
            assert_eq!(found.mask.get(i), i % columns != 5);
        }
    }

    #[test]
    fn a_singular_hessian_is_damped_and_an_indefinite_one_refused() {
        let (rows, columns) = (2, 4);
        let weight = noise(rows * columns, 6);
        let mut gram = vec![0.0; columns * columns];
        (0..columns).for_each(|j| gram[j * (columns + 1)] = 1.0);
        // Not a Gram matrix, but near enough to one for a larger damping.
        (gram[1], gram[columns]) = (1.15, 1.15);
        let found = prune(&stats(&weight, &gram, rows), Pattern::UNSTRUCTURED, 0.5).unwrap();
        assert_eq!(found.damping, Some(1.0));
        (gram[1], gram[columns]) = (3.0, 3.0);
        let error = prune(&stats(&weight, &gram, rows), Pattern::UNSTRUCTURED, 0.5).unwrap_err();
        assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
        gram[0] = f32::NAN;
        let error = prune(&stats(&weight, &gram, rows), Pattern::UNSTRUCTURED, 0.5).unwrap_err();
        assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn zeros_stay_and_go_first(
            rows in 1..5_usize, tiles in 1..40_usize, zeros in 0.0..=1.0, ratio in 0.0..=1.0,
            tiled in any::<bool>(), seed in any::<u64>(),
        ) {
            let (m, mut random) = (4, SplitMix64::new(seed));
            let columns = m * tiles;
            let gram = gram(columns, 2 * columns, seed);
            let mut weight = noise(rows * columns, seed);
            for w in &mut weight {
                if (random.below(1000) as f64) < 1000.0 * zeros {
                    *w = 0.0;
                }
            }
            let pattern = if tiled { Pattern::n_of_m(2, m) } else { Pattern::UNSTRUCTURED };
            let found = prune(&stats(&weight, &gram, rows), pattern, ratio).unwrap();
            let values = found.values.unwrap();
            for (i, w) in weight.iter().enumerate() {
                prop_assert!(*w != 0.0 || values[i] == 0.0);
            }
            // Of weights that compete, no zero is kept while another is pruned.
            let compete: Vec<Vec<usize>> = if tiled {
                (0..weight.len()).step_by(m).map(|start| (start..start + m).collect()).collect()
            } else {
                let of = |start| (0..weight.len()).filter(move |i| (i % columns) / BLOCK == start);
                (0..columns.div_ceil(BLOCK)).map(|start| of(start).collect()).collect()
            };
            for together in compete {
                let kept_zero = together.iter().any(|i| weight[*i] == 0.0 && found.mask.get(*i));
                let pruned = together.iter().any(|i| weight[*i] != 0.0 && !found.mask.get(*i));
                prop_assert!(!(kept_zero && pruned));
            }
        }

        #[test]
        fn exactly_the_share_goes(rows in 1..6_usize, columns in 1..300_usize, ratio in 0.0..=1.0) {
            let mut gram = vec![0.0; columns * columns];
            (0..columns).for_each(|j| gram[j * (columns + 1)] = 1.0 + j as f32);
            let weight = noise(rows * columns, 7);
            let found = prune(&stats(&weight, &gram, rows), Pattern::UNSTRUCTURED, ratio).unwrap();
            prop_assert_eq!(rows * columns - found.mask.kept(), floored(ratio, rows * columns));
        }
    }
}
