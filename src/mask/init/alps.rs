//! ALPS (arXiv 2406.07831): support and values of a matrix's kept weights together, by the alternating
//! direction method of multipliers on the error of its output.
//!
//! With H the damped Hessian, scaled to a unit diagonal, and Ŵ the dense weights, scaled likewise,
//! one iteration is
//!
//! W ← (H Ŵ − V + ρ D)(H + ρ)⁻¹, D ← the largest entries of W + V/ρ, V ← V + ρ (W − D).
//!
//! ρ grows while the support of D still changes, fast at first (section 3.1), and where it no longer
//! changes it is the mask. The kept weights are then those with the least error on that support, by
//! conjugate gradients (section 3.2).

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
use crate::mask::{Error, Mask, OutputError, Scope, conjugate_gradient};

pub(super) static ALPS: InitialMask = InitialMask {
    name: "alps",
    prunes: "the weights of each matrix whose removal causes the least error, changing kept weights to \
             make up for it, found together by ADMM (arXiv 2406.07831)",
    needs: Needs::GRAM,
    scope: Scope::Layer,
    metrics: false,
    zeros: false,
    scores: None,
    // Some sixty iterations, in thirty of which ρ grows, and as many of conjugate gradients.
    takes: Takes { operations: [240.0, 60.0], numbers: [8.0, 8.0] },
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
/// The division of the work. It must not depend on the number of threads, nor may the result.
const WORK: Par = Par::Rayon(NonZeroUsize::new(16).unwrap());

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
    let mask = support(of, error)?.ok_or_else(not_definite)?;
    let values = conjugate_gradient(name, weight, &mask, error, DAMPING)?;
    if let Some(i) = values.iter().position(|w| !w.is_finite()) {
        let (row, column) = (i / dims.columns, i % dims.columns);
        return Err(Error::NotFinite { name: name.into(), row, column, value: values[i] });
    }
    Ok(Initial { mask, values: Some(values), damping: None })
}

/// The mask of a matrix; `None` if the Hessian is not positive definite.
fn support(of: &Matrix<'_>, error: OutputError<'_>) -> Result<Option<Mask>, Error> {
    let &LayerStats { dims, weight, .. } = of.stats;
    let (rows, columns) = (dims.rows, dims.columns);
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
    let product = |out: &mut Vec<f32>, left: &[f32], right: &[f32]| {
        let target = MatMut::from_row_major_slice_mut(out, rows, columns);
        let left = MatRef::from_row_major_slice(left, rows, columns);
        let right = MatRef::from_row_major_slice(right, columns, columns);
        matmul(target, Accum::Replace, left, right, 1.0, WORK);
    };
    // Zero weights go first.
    let lowest = |values: &[f32]| {
        let scores = values.par_iter().zip(weight);
        let scores = scores.map(|(x, w)| if *w == 0.0 { -1.0 } else { x.abs() });
        of.lowest(&scores.collect::<Vec<f32>>(), Ties::First).map(|found| found.mask)
    };
    let mut fixed = vec![0.0; dense.len()];
    product(&mut fixed, &dense, &hessian);

    let mut rho = RHO;
    let Some(mut inverted) = inverse_with(&hessian, rho, columns) else { return Ok(None) };
    let (mut multipliers, mut right) = (vec![0.0_f32; dense.len()], vec![0.0_f32; dense.len()]);
    let (mut values, mut sparse) = (dense.clone(), dense.clone());
    let mut mask = lowest(&dense)?;
    let mut looked = mask.clone();
    for iteration in 1..=MOST_ITERATIONS {
        let sums = right.par_iter_mut().zip(&fixed).zip(multipliers.par_iter().zip(&sparse));
        sums.for_each(|((sum, fixed), (v, d))| *sum = fixed - v + rho * d);
        product(&mut values, &right, &inverted);
        let moved = sparse.par_iter_mut().zip(values.par_iter().zip(&multipliers));
        moved.for_each(|(d, (w, v))| *d = w + v / rho);
        mask = lowest(&sparse)?;
        let rest = sparse.par_iter_mut().enumerate().zip(values.par_iter().zip(&mut multipliers));
        rest.for_each(|((i, d), (w, v))| {
            if !mask.get(i) || weight[i] == 0.0 {
                *d = 0.0;
            }
            *v += rho * (w - *d);
        });
        if !iteration.is_multiple_of(LOOK) {
            continue;
        }
        let changed = mask.without(&looked) as f64 / mask.kept().max(1) as f64;
        let Some((_, growth)) = GROWTH.iter().find(|(least, _)| changed > *least) else { break };
        looked = mask.clone();
        rho *= growth;
        match inverse_with(&hessian, rho, columns) {
            Some(found) => inverted = found,
            None => return Ok(None),
        }
    }
    Ok(Some(mask))
}

/// The inverse of the Hessian plus ρ, [n, n]; `None` if they are not positive definite.
fn inverse_with(hessian: &[f32], rho: f32, n: usize) -> Option<Vec<f32>> {
    let mut work: Vec<f64> = hessian.par_iter().map(|h| f64::from(*h)).collect();
    (0..n).for_each(|j| work[j * (n + 1)] += f64::from(rho));
    let parameters: Spec<LltParams, f64> = Spec::default();
    let mut memory = MemBuffer::new(
        cholesky_in_place_scratch::<f64>(n, WORK, parameters).or(inverse_scratch::<f64>(n, WORK)),
    );
    let stack = MemStack::new(&mut memory);
    let matrix = MatMut::from_column_major_slice_mut(&mut work, n, n);
    cholesky_in_place(matrix, Default::default(), WORK, stack, parameters).ok()?;
    let mut lower = vec![0.0; n * n];
    let target = MatMut::from_column_major_slice_mut(&mut lower, n, n);
    inverse(target, MatRef::from_column_major_slice(&work, n, n), WORK, stack);
    let mut inverted = vec![0.0; n * n];
    inverted.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
        for (j, x) in row.iter_mut().enumerate() {
            // Column-major, and of the lower triangle.
            *x = lower[i.min(j) * n + i.max(j)] as f32;
        }
    });
    Some(inverted)
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
