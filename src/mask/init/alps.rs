//! ALPS (arXiv 2406.07831): support and values of a matrix's kept weights together, by the alternating
//! direction method of multipliers on the error of its output.
//!
//! With H the damped Hessian, scaled to a unit diagonal, and Ŵ the dense weights, scaled likewise,
//! one iteration is
//!
//! W ← (H Ŵ − V + ρ D)(H + ρ)⁻¹, D ← the largest entries of W + V/ρ, V ← V + ρ (W − D).
//!
//! W is computed as Ŵ + (ρ (D − Ŵ) − V)(H + ρ)⁻¹, and V as ρ (U − D) with U = W + V/ρ, which D is
//! chosen from: the same without a product with H. ρ grows while the support of D still changes, fast
//! at first (section 3.1), and where it no longer changes it is the mask. The kept weights are then
//! those with the least error on that support, by conjugate gradients that begin with D (section 3.2).

use std::num::NonZeroUsize;

use barber_metric::{LayerStats, Needs};
use faer::{
    Accum, MatMut, MatRef, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::{
            factor::{LltParams, cholesky_in_place, cholesky_in_place_scratch},
            inverse::{inverse, inverse_scratch},
        },
        matmul::matmul,
    },
};
use rayon::prelude::*;

use super::{Initial, InitialMask, Matrix, Takes, lowest::Ties};
use crate::{
    mask::{
        Error, Mask, OutputError, Scope,
        conjugate_gradient::{Start, conjugate_gradient_from},
    },
    simd::simd,
};

pub(super) static ALPS: InitialMask = InitialMask {
    name: "alps",
    prunes: "the weights of each matrix whose removal causes the least error, changing kept weights to \
             make up for it, found together by ADMM (arXiv 2406.07831)",
    needs: Needs::GRAM,
    scope: Scope::Layer,
    metrics: false,
    zeros: false,
    scores: None,
    // Some forty iterations, in twelve of which ρ grows, and half as many of conjugate gradients.
    takes: Takes { operations: [120.0, 24.0], numbers: [3.0, 8.0] },
    run: prune,
};

/// The damping of the Hessian, as a fraction of its mean diagonal, as in the paper.
const DAMPING: f64 = 0.01;
/// The first ρ, as in the paper: the scaled Hessian has a unit diagonal.
const RHO: f32 = 0.1;
/// Iterations from one look at the support to the next, as in the paper.
const LOOK: usize = 3;
/// What ρ is multiplied by, with the fraction of the kept weights that have to have changed for it, as
/// in the paper.
const GROWTH: [(f64, f32); 3] = [(0.1, 1.3), (0.005, 1.2), (0.0, 1.1)];
/// Maximum number of iterations. The support ends to change long before.
const MOST_ITERATIONS: usize = 600;
/// The residual of the values, as a fraction of the dense weights'. A smaller one takes several times as
/// many iterations, and lowers the error by less than a ten-thousandth.
const TOLERANCE: f64 = 1e-3;
/// Number of weights that one task of a pass over all of them works on.
const PASS: usize = 1 << 14;
/// Maximum number of rows of a product that one task computes. The division of the work must not depend
/// on the number of threads, nor may the result.
const MOST_ROWS: usize = 256;
/// Number of rows and columns of an inverse for each of the threads that share it, and most of these.
const PER_THREAD: usize = 512;
const MOST_THREADS: usize = 16;

/// Prunes a matrix. Zero weights are pruned first, and stay zero if kept.
fn prune(of: &Matrix<'_>) -> Result<Initial, Error> {
    let &LayerStats { name, dims, weight, gram, .. } = of.stats;
    Error::check_numbers(name, dims.columns, weight)?;
    of.pattern.tile_of(name, dims.columns)?;
    let gram = gram.ok_or_else(|| Error::Missing { name: name.into(), statistic: "gram" })?;
    Error::check_length(name, "numbers of a Gram matrix", gram.len(), dims.columns.pow(2))?;
    let not_definite = || Error::NotPositiveDefinite { name: name.into(), damping: DAMPING };
    if !gram.par_iter().all(|x| x.is_finite()) {
        return Err(not_definite());
    }
    if dims.is_empty() {
        return Ok(Initial::of(Mask::kept_everywhere(dims)));
    }
    let error = OutputError { gram, shift: None, shrinkage: 0.0 };
    let (mask, begun) = support(of, error)?.ok_or_else(not_definite)?;
    let start = Start { values: &begun, tolerance: TOLERANCE };
    let values = conjugate_gradient_from(name, weight, &mask, error, DAMPING, start)?;
    if let Some(i) = values.iter().position(|w| !w.is_finite()) {
        let (row, column) = (i / dims.columns, i % dims.columns);
        return Err(Error::NotFinite { name: name.into(), row, column, value: values[i] });
    }
    Ok(Initial { mask, values: Some(values), damping: None })
}

/// The mask of a matrix, and the values of its kept weights at the last iteration, row-major; `None`
/// if the Hessian is not positive definite.
fn support(of: &Matrix<'_>, error: OutputError<'_>) -> Result<Option<(Mask, Vec<f32>)>, Error> {
    let &LayerStats { dims, weight, .. } = of.stats;
    let columns = dims.columns;
    let damping = DAMPING * error.mean_square(columns);
    let scale: Vec<f32> = (0..columns)
        .map(|j| (f64::from(error.gram[j * (columns + 1)]) + damping).sqrt() as f32)
        .collect();
    let mut hessian = error.gram.to_vec();
    hessian.par_chunks_mut(columns).enumerate().for_each(|(i, row)| {
        row.iter_mut().zip(&scale).for_each(|(h, of)| *h /= scale[i] * of);
        row[i] = 1.0;
    });
    let scaled = weight.par_iter().enumerate().map(|(i, w)| w * scale[i % columns]);
    let dense: Vec<f32> = scaled.collect();
    // Zero weights go first.
    let lowest = |values: &[f32]| {
        let scores = values.par_iter().zip(weight);
        let scores = scores.map(|(x, w)| if *w == 0.0 { -1.0 } else { x.abs() });
        of.lowest(&scores.collect::<Vec<f32>>(), Ties::First).map(|found| found.mask)
    };
    // ρ of the last iteration, and of the next one.
    let (mut before, mut rho) = (RHO, RHO);
    let Some(mut inverted) = inverse_with(&hessian, rho, columns) else { return Ok(None) };
    let (mut right, mut values) = (vec![0.0_f32; dense.len()], vec![0.0_f32; dense.len()]);
    let (mut open, mut sparse) = (dense.clone(), dense.clone());
    let mut mask = lowest(&dense)?;
    let mut looked = mask.clone();
    for iteration in 1..=MOST_ITERATIONS {
        let each = right.par_chunks_mut(PASS).zip(sparse.par_chunks(PASS));
        let each = each.zip(open.par_chunks(PASS).zip(dense.par_chunks(PASS)));
        each.for_each(|((right, sparse), (open, dense))| {
            simd!(for (((r, d), u), w) in right.iter_mut().zip(sparse).zip(open).zip(dense) {
                *r = rho * (d - w) - before * (u - d);
            });
        });
        multiply(&mut values, &right, &inverted, columns);
        let ratio = before / rho;
        let each = open.par_chunks_mut(PASS).zip(sparse.par_chunks(PASS));
        let each = each.zip(values.par_chunks(PASS).zip(dense.par_chunks(PASS)));
        each.for_each(|((open, sparse), (values, dense))| {
            simd!(for (((u, d), x), w) in open.iter_mut().zip(sparse).zip(values).zip(dense) {
                *u = w + x + ratio * (*u - d);
            });
        });
        before = rho;
        mask = lowest(&open)?;
        let each = sparse.par_chunks_mut(PASS).zip(open.par_chunks(PASS));
        each.zip(weight.par_chunks(PASS)).for_each(|((sparse, open), weight)| {
            simd!(for ((d, u), w) in sparse.iter_mut().zip(open).zip(weight) {
                *d = if *w == 0.0 { 0.0 } else { *u };
            });
        });
        mask.apply(&mut sparse);
        if !iteration.is_multiple_of(LOOK) {
            continue;
        }
        let changed = mask.without(&looked) as f64 / mask.kept().max(1) as f64;
        let Some((_, growth)) = GROWTH.iter().find(|(least, _)| changed > *least) else { break };
        looked = mask.clone();
        rho *= growth;
        drop(inverted);
        match inverse_with(&hessian, rho, columns) {
            Some(found) => inverted = found,
            None => return Ok(None),
        }
    }
    sparse.par_iter_mut().enumerate().for_each(|(i, d)| *d /= scale[i % columns]);
    Ok(Some((mask, sparse)))
}

/// The product of a matrix with a symmetric one, [n, n]. Each task computes its own rows, which is
/// faster than sharing one product.
fn multiply(out: &mut [f32], left: &[f32], right: &[f32], n: usize) {
    let rows = (out.len() / n).div_ceil(4).next_multiple_of(16).min(MOST_ROWS);
    let right = MatRef::from_row_major_slice(right, n, n);
    let tasks = out.par_chunks_mut(rows * n).zip(left.par_chunks(rows * n));
    tasks.with_max_len(1).for_each(|(out, left)| {
        let rows = out.len() / n;
        let target = MatMut::from_row_major_slice_mut(out, rows, n);
        let left = MatRef::from_row_major_slice(left, rows, n);
        matmul(target, Accum::Replace, left, right, 1.0, Par::Seq);
    });
}

/// The inverse of the Hessian plus ρ, [n, n]; `None` if they are not positive definite.
fn inverse_with(hessian: &[f32], rho: f32, n: usize) -> Option<Vec<f32>> {
    // Small matrices are not worth more threads.
    let work = match NonZeroUsize::new((n / PER_THREAD).min(MOST_THREADS)) {
        Some(threads) if threads.get() > 1 => Par::Rayon(threads),
        _ => Par::Seq,
    };
    let mut factor = hessian.to_vec();
    (0..n).for_each(|j| factor[j * (n + 1)] += rho);
    let parameters: Spec<LltParams, f32> = Spec::default();
    let mut memory = MemBuffer::new(
        cholesky_in_place_scratch::<f32>(n, work, parameters).or(inverse_scratch::<f32>(n, work)),
    );
    let stack = MemStack::new(&mut memory);
    let matrix = MatMut::from_column_major_slice_mut(&mut factor, n, n);
    cholesky_in_place(matrix, Default::default(), work, stack, parameters).ok()?;
    let mut inverted = vec![0.0; n * n];
    let target = MatMut::from_column_major_slice_mut(&mut inverted, n, n);
    inverse(target, MatRef::from_column_major_slice(&factor, n, n), work, stack);
    // The lower triangle, column-major, is the upper one of rows.
    factor.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
        row[i..].copy_from_slice(&inverted[i * n + i..(i + 1) * n]);
        row[..i].iter_mut().enumerate().for_each(|(j, x)| *x = inverted[j * n + i]);
    });
    Some(factor)
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;
    use crate::{
        dtype::Dtype,
        mask::{
            Pattern,
            init::{
                Amount, Init, floored,
                testing::{gram, noise},
            },
        },
    };

    /// The initial mask of a matrix by an initialiser, and the output error that it causes.
    fn chosen(
        init: &str,
        weight: &[f32],
        gram: &[f32],
        pattern: Pattern,
        ratio: f64,
    ) -> (Initial, f64) {
        let columns = gram.len().isqrt();
        let dims = Dims { rows: weight.len() / columns, columns };
        let stats =
            LayerStats { name: "w", dims, weight, gram: Some(gram), ..LayerStats::default() };
        let found =
            Init::named(init).unwrap().choose(&stats, pattern, Amount::Ratio(ratio), None).unwrap();
        let values = found.values.as_ref().unwrap();
        let change = |i: usize| {
            let kept = if found.mask.get(i) { values[i] } else { 0.0 };
            f64::from(weight[i] - kept)
        };
        let row = |row: usize| -> f64 {
            let change: Vec<f64> = (0..columns).map(|j| change(row * columns + j)).collect();
            let image = |j: usize| -> f64 {
                (0..columns).map(|k| f64::from(gram[j * columns + k]) * change[k]).sum()
            };
            (0..columns).map(|j| change[j] * image(j)).sum()
        };
        let error = (0..dims.rows).map(row).sum();
        (found, error)
    }

    /// On cuts of ten matrices of a real model: the error that an independent implementation reaches,
    /// and never more than SparseGPT's.
    #[test]
    fn real_matrices_lose_less_than_with_sparsegpt() {
        let bytes = std::fs::read("tests/fixtures/alps.safetensors").unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let read = |name: &str| Dtype::F32.decode(tensors.tensor(name).unwrap().data());
        let mut relative = Vec::new();
        for i in 0..10 {
            let [weight, gram] = ["weight", "gram"].map(|of| read(&format!("{i}.{of}")));
            for pattern in ["unstructured", "2:4"] {
                let expected = read(&format!("{i}.objectives.{pattern}"));
                let pattern = pattern.parse().unwrap();
                let [own, other] =
                    ["alps", "sparsegpt"].map(|init| chosen(init, &weight, &gram, pattern, 0.5).1);
                assert!(own <= other, "{i} {pattern}: {own} {other}");
                let theirs = f64::from(expected[1]);
                assert!((other - theirs).abs() < 0.05 * theirs, "{i} {pattern}: {other} {theirs}");
                relative.push(own / f64::from(expected[0]));
            }
        }
        // Ties and rounding may end the iterations at another support.
        assert!(relative.iter().all(|of| (0.95..1.05).contains(of)), "{relative:?}");
        let mean = relative.iter().sum::<f64>() / relative.len() as f64;
        assert!((mean - 1.0).abs() < 0.01, "{relative:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn exactly_the_ratio_goes(rows in 1..6_usize, columns in 1..60_usize, ratio in 0.0..=1.0) {
            let weight = noise(rows * columns, 7);
            let gram = gram(columns, 50, 3);
            let (found, error) = chosen("alps", &weight, &gram, Pattern::UNSTRUCTURED, ratio);
            prop_assert_eq!(weight.len() - found.mask.kept(), floored(ratio, weight.len()));
            // That of no weights at all is the most.
            let (_, most) = chosen("alps", &weight, &gram, Pattern::UNSTRUCTURED, 1.0);
            prop_assert!(error <= 1.001 * most + 1e-3, "{error} {most}");
        }

        #[test]
        fn zero_weights_go_first_and_pruned_ones_keep_their_values(
            weight in proptest::collection::vec(-2_i8..3, 32),
            pattern in prop::sample::select(vec![Pattern::UNSTRUCTURED, Pattern::n_of_m(2, 4)]),
        ) {
            let weight: Vec<f32> = weight.into_iter().map(f32::from).collect();
            let (found, _) = chosen("alps", &weight, &gram(8, 30, 5), pattern, 0.5);
            let values = found.values.unwrap();
            for (i, value) in values.iter().enumerate() {
                let given = !found.mask.get(i) || weight[i] == 0.0;
                prop_assert!(!given || value.to_bits() == weight[i].to_bits());
            }
            let pools: Vec<Vec<usize>> = match pattern.ratio() {
                None => vec![(0..32).collect()],
                Some(_) => (0..8).map(|tile| (4 * tile..4 * tile + 4).collect()).collect(),
            };
            for pool in pools {
                let kept_zero = pool.iter().any(|i| weight[*i] == 0.0 && found.mask.get(*i));
                let pruned = pool.iter().any(|i| weight[*i] != 0.0 && !found.mask.get(*i));
                prop_assert!(!(kept_zero && pruned));
            }
        }
    }

    #[test]
    fn what_is_no_gram_matrix_is_refused() {
        let dims = Dims { rows: 1, columns: 2 };
        let alps = Init::named("alps").unwrap();
        for gram in [[1.0, 900.0, 900.0, 1.0], [f32::INFINITY, 0.0, 0.0, 1.0]] {
            let (weight, gram) = (&[1.0, 2.0][..], Some(&gram[..]));
            let stats = LayerStats { name: "w", dims, weight, gram, ..LayerStats::default() };
            let found = alps.choose(&stats, Pattern::UNSTRUCTURED, Amount::Ratio(0.5), None);
            assert!(matches!(found, Err(Error::NotPositiveDefinite { .. })), "{found:?}");
        }
    }
}
