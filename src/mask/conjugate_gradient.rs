//! Values for the kept weights of a matrix that minimise the error of its output, by conjugate
//! gradients: all rows on one Gram matrix, where least squares in closed form factor one for each row.
//!
//! The equations are those of [`least_squares`](super::least_squares): with K the kept inputs of a row
//! w, A v = (G w + b)_K + λ w_K with A = G_KK + λ. An iteration takes one product of the rows' search
//! directions with G, whatever their masks; A's diagonal is the preconditioner, as in ALPS
//! (arXiv 2406.07831, section 3.2). A row ends when its residual is small, and takes no more part in
//! products.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Error, Mask, OutputError, least_squares::MOST_DAMPING};
use crate::simd::simd;

/// Number of rows that are solved together. It must not depend on the number of threads, as the
/// result must not.
pub(crate) const ROWS: usize = 64;
/// The residual at which a row ends, as a fraction of the dense weights'.
const TOLERANCE: f64 = 1e-5;
/// Maximum number of iterations.
const MOST_ITERATIONS: usize = 300;

/// The fitted values of a matrix, row-major. Pruned weights have their values in `weight`; so have
/// all weights if every input is zero. `damping` is λ as a fraction of the mean diagonal of G.
///
/// # Errors
/// If a slice does not fit the matrix, or no damping makes a row's part of G positive definite.
pub fn conjugate_gradient(
    name: &str,
    weight: &[f32],
    mask: &Mask,
    error: OutputError<'_>,
    damping: f64,
) -> Result<Vec<f32>, Error> {
    let start = Start { values: weight, tolerance: TOLERANCE };
    conjugate_gradient_from(name, weight, mask, error, damping, start)
}

/// Where conjugate gradients begin, and where they end.
#[derive(Clone, Copy)]
pub(super) struct Start<'a> {
    /// The first values of the kept weights, row-major.
    pub(super) values: &'a [f32],
    /// The residual at which a row ends, as a fraction of the dense weights'.
    pub(super) tolerance: f64,
}

/// [`conjugate_gradient`] from values that are nearer to the fitted ones than the dense weights are.
///
/// # Errors
/// As [`conjugate_gradient`].
pub(super) fn conjugate_gradient_from(
    name: &str,
    weight: &[f32],
    mask: &Mask,
    error: OutputError<'_>,
    damping: f64,
    start: Start<'_>,
) -> Result<Vec<f32>, Error> {
    let dims = mask.dims();
    let columns = dims.columns.max(1);
    error.check(name, dims, weight)?;
    Error::check_length(name, "first values", start.values.len(), weight.len())?;
    let (right, mean) = (error.right_sides(weight, dims), error.mean_square(columns));
    let size = ROWS * columns;
    let mut values = weight.to_vec();
    let chunks = values.par_chunks_mut(size).zip(right.par_chunks(size));
    let chunks = chunks.zip(start.values.par_chunks(size)).enumerate();
    chunks.try_for_each(|(i, ((values, right), first))| {
        let is_free = |j: usize| mask.get(i * size + j) && values[j] != 0.0;
        let free: Vec<f32> = (0..values.len()).map(|j| f32::from(is_free(j))).collect();
        let (dense, mut damping) = (values.to_vec(), damping);
        let start = Start { values: first, ..start };
        loop {
            let equations = Equations { error, columns, damping: (damping * mean) as f32 };
            match equations.solve(&dense, right, &free, start) {
                Some(solved) => {
                    let each = values.iter_mut().zip(solved).zip(&free);
                    let fitted = each.filter(|(_, free)| **free == 1.0);
                    fitted.for_each(|((value, solved), _)| *value = solved);
                    return Ok(());
                }
                None if damping < MOST_DAMPING => damping = (10.0 * damping).max(1e-6),
                None => return Err(Error::NotPositiveDefinite { name: name.into(), damping }),
            }
        }
    })?;
    Ok(values)
}

/// The normal equations of some rows.
#[derive(Clone, Copy)]
struct Equations<'a> {
    error: OutputError<'a>,
    columns: usize,
    /// λ.
    damping: f32,
}

/// A row that is not solved yet.
struct Row {
    /// Index of the row.
    index: usize,
    /// rᵀ M⁻¹ r, with r the residual and M the preconditioner, and where the row ends.
    norm: f64,
    last: f64,
}

impl Row {
    fn is_open(&self) -> bool {
        self.norm > self.last && self.norm > f64::MIN_POSITIVE
    }
}

/// Number of lanes of sums, which the compiler keeps in vector registers. The result depends on it.
const LANES: usize = 16;

/// Σ a b c, in f64.
#[inline(always)]
fn sum(a: &[f32], b: &[f32], c: &[f32]) -> f64 {
    let [(a, a_rest), (b, b_rest), (c, c_rest)] = [a, b, c].map(<[f32]>::as_chunks::<LANES>);
    let mut lanes = [0.0; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            lanes[i] += f64::from(a[i]) * f64::from(b[i] * c[i]);
        }
    }
    let rest = a_rest.iter().zip(b_rest).zip(c_rest);
    let rest = rest.map(|((a, b), c)| f64::from(*a) * f64::from(b * c));
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}

impl Equations<'_> {
    /// The values of rows whose `free` entries, which are 1 and not 0, begin at those of `start`; what
    /// is found for the others means nothing. `None` if A is not positive definite.
    fn solve(
        &self,
        dense: &[f32],
        right: &[f32],
        free: &[f32],
        start: Start<'_>,
    ) -> Option<Vec<f32>> {
        let columns = self.columns;
        let diagonal: Vec<f32> =
            self.error.gram.iter().step_by(columns + 1).map(|g| g + self.damping).collect();
        if diagonal.iter().any(|d| *d < 0.0) {
            return None;
        }
        let inverse: Vec<f32> =
            diagonal.iter().map(|d| if *d > 0.0 { 1.0 / d } else { 0.0 }).collect();
        let norms = |residual: &[f32]| -> Vec<f64> {
            residual.chunks(columns).map(|r| simd!(sum(r, r, &inverse))).collect()
        };
        let first = norms(&self.residual(dense, dense, right, free));
        let mut values = start.values.to_vec();
        let mut residual = self.residual(&values, dense, right, free);
        let last = first.into_iter().map(|first| start.tolerance * start.tolerance * first);
        let rows = norms(&residual).into_iter().zip(last).enumerate();
        let rows = rows.map(|(index, (norm, last))| Row { index, norm, last });
        let mut rows: Vec<Row> = rows.filter(Row::is_open).collect();
        let mut search: Vec<f32> = residual
            .chunks(columns)
            .flat_map(|r| r.iter().zip(&inverse).map(|(r, m)| r * m))
            .collect();
        let mut open = Vec::new();
        for _ in 0..MOST_ITERATIONS {
            if rows.is_empty() {
                break;
            }
            open.clear();
            let of = |row: &Row| row.index * columns..(row.index + 1) * columns;
            rows.iter().for_each(|row| open.extend_from_slice(&search[of(row)]));
            let image = self.product(&open);
            for (row, q) in rows.iter_mut().zip(image.chunks(columns)) {
                let of = of(row);
                let (p, free) = (&mut search[of.clone()], &free[of.clone()]);
                let (v, r) = (&mut values[of.clone()], &mut residual[of]);
                let curvature = simd!(sum(q, p, free));
                if !(curvature > 0.0 && curvature.is_finite()) {
                    return None;
                }
                let step = (row.norm / curvature) as f32;
                let norm = simd!({
                    v.iter_mut().zip(&*p).for_each(|(v, p)| *v += step * p);
                    let r_and_q = r.iter_mut().zip(q.iter().zip(free));
                    r_and_q.for_each(|(r, (q, free))| *r -= step * q * free);
                    sum(r, r, &inverse)
                });
                let ratio = (norm / row.norm) as f32;
                row.norm = norm;
                simd!(p.iter_mut().zip(r.iter().zip(&inverse)).for_each(|(p, (r, m))| {
                    *p = r * m + ratio * *p;
                }));
            }
            rows.retain(Row::is_open);
        }
        values.iter().all(|v| v.is_finite()).then_some(values)
    }

    /// The residual of the values v of some rows, right + λ w − A v.
    fn residual(&self, values: &[f32], dense: &[f32], right: &[f32], free: &[f32]) -> Vec<f32> {
        let kept: Vec<f32> =
            values.iter().zip(free).map(|(v, free)| if *free == 1.0 { *v } else { 0.0 }).collect();
        let mut residual = self.product(&kept);
        for ((r, (b, w)), free) in residual.iter_mut().zip(right.iter().zip(dense)).zip(free) {
            *r = if *free == 1.0 { b + self.damping * w - *r } else { 0.0 };
        }
        residual
    }

    /// The product of rows with G + λ, G shrunk towards its diagonal.
    fn product(&self, rows: &[f32]) -> Vec<f32> {
        let (columns, OutputError { gram, shrinkage, .. }) = (self.columns, self.error);
        let mut image = vec![0.0; rows.len()];
        let count = rows.len() / columns;
        let target = MatMut::from_row_major_slice_mut(&mut image, count, columns);
        let left = MatRef::from_row_major_slice(rows, count, columns);
        let right = MatRef::from_row_major_slice(gram, columns, columns);
        matmul(target, Accum::Replace, left, right, 1.0 - shrinkage, Par::Seq);
        let diagonal: Vec<f32> = gram.iter().step_by(columns + 1).copied().collect();
        for (image, row) in image.chunks_mut(columns).zip(rows.chunks(columns)) {
            simd!(for ((q, p), g) in image.iter_mut().zip(row).zip(&diagonal) {
                *q += (shrinkage * g + self.damping) * p;
            });
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::mask::least_squares;

    /// The change of the output error from the dense weights to `values`, without damping.
    fn objective(values: &[f32], weight: &[f32], mask: &Mask, error: OutputError<'_>) -> f64 {
        let Dims { rows, columns } = mask.dims();
        let at = |i: usize| if mask.get(i) { values[i] } else { 0.0 };
        let of = |row: usize| -> f64 {
            let change = |j| f64::from(weight[row * columns + j] - at(row * columns + j));
            let one = |j: usize| {
                let gram = |k: usize| {
                    let g = f64::from(error.gram[j * columns + k]);
                    if j == k { g } else { g * f64::from(1.0 - error.shrinkage) }
                };
                let image: f64 = (0..columns).map(|k| gram(k) * change(k)).sum();
                let shift = error.shift.map_or(0.0, |shift| f64::from(shift[row * columns + j]));
                change(j) * (image + 2.0 * shift)
            };
            (0..columns).map(one).sum()
        };
        (0..rows).map(of).sum()
    }

    fn gram(inputs: &[f32], columns: usize) -> Vec<f32> {
        let product = |i: usize, j: usize| inputs.chunks(columns).map(|x| x[i] * x[j]).sum();
        (0..columns * columns).map(|k| product(k / columns, k % columns)).collect()
    }

    proptest! {
        #[test]
        fn values_are_those_of_the_closed_form(
            seed in any::<u16>(),
            rows in 1..80_usize,
            columns in 1..40_usize,
            tokens in 1..60_usize,
            shrinkage in 0.0..0.5_f32,
            shifted in any::<bool>(),
        ) {
            let noise = |i: usize| ((i * 7919 + usize::from(seed)) % 1009) as f32 / 504.0 - 1.0;
            // Inputs of very different sizes, as models have them.
            let size = |i: usize| if (i % columns).is_multiple_of(7) { 20.0 } else { 1.0 };
            let inputs: Vec<f32> = (0..tokens * columns).map(|i| size(i) * noise(i)).collect();
            let gram = gram(&inputs, columns);
            let weight: Vec<f32> = (0..rows * columns).map(|i| noise(3 * i + 5)).collect();
            let shift: Vec<f32> = weight.iter().map(|w| 0.3 * w).collect();
            let shift = shifted.then_some(&shift[..]);
            let error = OutputError { gram: &gram, shift, shrinkage };
            let mask = Mask::from_fn(Dims { rows, columns }, |i| noise(11 * i) > 0.0);
            let exact = least_squares("w", &weight, &mask, error, 0.01).unwrap();
            let found = conjugate_gradient("w", &weight, &mask, error, 0.01).unwrap();
            let root = |x: f64| x.max(0.0).sqrt();
            let scale = 1.0 + root(exact.iter().map(|v| f64::from(v * v)).sum());
            let apart = root(zip_square(&exact, &found));
            prop_assert!(apart < 1e-3 * scale, "{apart} of {scale}");
            let [best, reached] =
                [&exact, &found].map(|of| objective(of, &weight, &mask, error));
            let dense = objective(&weight, &weight, &mask, error);
            prop_assert!((best - reached).abs() <= 1e-3 * (dense.abs() + best.abs()) + 1e-3);
            for i in (0..weight.len()).filter(|i| !mask.get(*i)) {
                prop_assert_eq!(found[i].to_bits(), weight[i].to_bits());
            }
        }

        #[test]
        fn zeros_stay(weight in vec(-2_i8..3, 6), kept in vec(any::<bool>(), 6), x in vec(-1.0..1.0_f32, 18)) {
            let weight: Vec<f32> = weight.into_iter().map(f32::from).collect();
            let gram = gram(&x, 6);
            let mask = Mask::from_bools(Dims { rows: 1, columns: 6 }, &kept);
            let error = OutputError { gram: &gram, shift: None, shrinkage: 0.0 };
            let found = conjugate_gradient("w", &weight, &mask, error, 0.01).unwrap();
            for (i, value) in found.into_iter().enumerate() {
                let given = !kept[i] || weight[i] == 0.0;
                prop_assert!(!given || value.to_bits() == weight[i].to_bits());
            }
        }
    }

    fn zip_square(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn values_do_not_depend_on_where_they_begin() {
        let noise = |i: usize| ((i * 7919) % 1009) as f32 / 504.0 - 1.0;
        let inputs: Vec<f32> = (0..60 * 20).map(noise).collect();
        let (gram, dims) = (gram(&inputs, 20), Dims { rows: 70, columns: 20 });
        let weight: Vec<f32> = (0..dims.len()).map(|i| noise(3 * i + 5)).collect();
        let mask = Mask::from_fn(dims, |i| noise(11 * i) > 0.0);
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.0 };
        let expected = conjugate_gradient("w", &weight, &mask, error, 0.01).unwrap();
        let away: Vec<f32> = expected.iter().map(|v| 1.5 * v + 0.1).collect();
        for (values, tolerance, most) in [(&away, 1e-5, 1e-4), (&expected, 1.0, 1e-6)] {
            let start = Start { values, tolerance };
            let found = conjugate_gradient_from("w", &weight, &mask, error, 0.01, start).unwrap();
            let apart = zip_square(&found, &expected).sqrt();
            assert!(apart <= most * zip_square(&expected, &vec![0.0; 1400]).sqrt(), "{apart}");
        }
        let start = Start { values: &away[1..], tolerance: 1.0 };
        let found = conjugate_gradient_from("w", &weight, &mask, error, 0.01, start);
        assert!(matches!(found, Err(Error::Length { .. })), "{found:?}");
    }

    #[test]
    fn inputs_that_are_all_zero_leave_the_weights() {
        let (gram, weight) = ([0.0; 4], [1.0, -2.0]);
        let mask = Mask::from_bools(Dims { rows: 1, columns: 2 }, &[true, false]);
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.2 };
        for damping in [0.0, 0.01] {
            assert_eq!(conjugate_gradient("w", &weight, &mask, error, damping).unwrap(), weight);
        }
    }

    #[test]
    fn what_is_no_gram_matrix_is_refused() {
        let mask = Mask::kept_everywhere(Dims { rows: 1, columns: 2 });
        let gram = [1.0, 900.0, 900.0, 1.0];
        let shift = [1.0, -1.0];
        let error = OutputError { gram: &gram, shift: Some(&shift), shrinkage: 0.0 };
        let error = conjugate_gradient("w", &[1.0, 2.0], &mask, error, 0.01).unwrap_err();
        assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
    }
}
