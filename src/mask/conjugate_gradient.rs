//! Values for the kept weights of a matrix that minimise the error of its output, by conjugate
//! gradients: all rows on one Gram matrix, where least squares in closed form factor one for each row.
//!
//! The equations are those of [`least_squares`](super::least_squares): with K the kept inputs of a row
//! w, A v = (G w + b)_K + λ w_K with A = G_KK + λ. An iteration takes one product of the rows' search
//! directions with G, whatever their masks; A's diagonal is the preconditioner, as in ALPS
//! (arXiv 2406.07831, section 3.2). A row ends when its residual is small.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Error, Mask, OutputError, least_squares::MOST_DAMPING};

/// Number of rows that are solved together. It must not depend on the number of threads, as the
/// result must not.
const ROWS: usize = 64;
/// The residual at which a row ends, as a fraction of the first one's norm.
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
    let dims = mask.dims();
    let columns = dims.columns.max(1);
    error.check(name, dims, weight)?;
    let (right, mean) = (error.right_sides(weight, dims), error.mean_square(columns));
    let size = ROWS * columns;
    let mut values = weight.to_vec();
    let chunks = values.par_chunks_mut(size).zip(right.par_chunks(size)).enumerate();
    chunks.try_for_each(|(i, (values, right))| {
        let free: Vec<bool> =
            (0..values.len()).map(|j| mask.get(i * size + j) && values[j] != 0.0).collect();
        let (dense, mut damping) = (values.to_vec(), damping);
        loop {
            let equations = Equations { error, columns, damping: (damping * mean) as f32 };
            match equations.solve(&dense, right, &free) {
                Some(solved) => {
                    values.copy_from_slice(&solved);
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

/// How far a row is solved.
struct Row {
    /// rᵀ M⁻¹ r, with r the residual and M the preconditioner, and what it was at first.
    norm: f64,
    first: f64,
}

impl Row {
    fn is_open(&self) -> bool {
        self.norm > TOLERANCE * TOLERANCE * self.first && self.norm > f64::MIN_POSITIVE
    }
}

impl Equations<'_> {
    /// The values of rows whose `free` entries begin at the dense ones; `None` if A is not positive
    /// definite.
    fn solve(&self, dense: &[f32], right: &[f32], free: &[bool]) -> Option<Vec<f32>> {
        let columns = self.columns;
        let diagonal: Vec<f32> =
            self.error.gram.iter().step_by(columns + 1).map(|g| g + self.damping).collect();
        if diagonal.iter().any(|d| *d < 0.0) {
            return None;
        }
        let inverse: Vec<f32> =
            diagonal.iter().map(|d| if *d > 0.0 { 1.0 / d } else { 0.0 }).collect();
        let mut values = dense.to_vec();
        let kept: Vec<f32> =
            dense.iter().zip(free).map(|(w, free)| if *free { *w } else { 0.0 }).collect();
        // The residual, right + λ w − A v, at v = w_K.
        let mut residual = self.product(&kept);
        for ((r, (b, w)), free) in residual.iter_mut().zip(right.iter().zip(dense)).zip(free) {
            *r = if *free { b + self.damping * w - *r } else { 0.0 };
        }
        let mut search: Vec<f32> = residual
            .chunks(columns)
            .flat_map(|r| r.iter().zip(&inverse).map(|(r, m)| r * m))
            .collect();
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let each = residual.chunks(columns).zip(search.chunks(columns));
        let mut rows: Vec<Row> =
            each.map(|(r, p)| dot(r, p)).map(|first| Row { norm: first, first }).collect();
        for _ in 0..MOST_ITERATIONS {
            if !rows.iter().any(Row::is_open) {
                break;
            }
            let image = self.product(&search);
            let vectors = values.chunks_mut(columns).zip(residual.chunks_mut(columns));
            let vectors = vectors.zip(search.chunks_mut(columns).zip(image.chunks(columns)));
            let open = rows.iter_mut().zip(vectors.zip(free.chunks(columns)));
            for (row, (((v, r), (p, q)), free)) in open.filter(|(row, _)| row.is_open()) {
                let curvature = dot(p, q);
                if !(curvature > 0.0 && curvature.is_finite()) {
                    return None;
                }
                let step = (row.norm / curvature) as f32;
                let mut norm = 0.0;
                for j in (0..columns).filter(|j| free[*j]) {
                    v[j] += step * p[j];
                    r[j] -= step * q[j];
                    norm += f64::from(r[j]) * f64::from(r[j] * inverse[j]);
                }
                let ratio = (norm / row.norm) as f32;
                row.norm = norm;
                for j in (0..columns).filter(|j| free[*j]) {
                    p[j] = r[j] * inverse[j] + ratio * p[j];
                }
                if !row.is_open() {
                    p.fill(0.0);
                }
            }
        }
        values.iter().all(|v| v.is_finite()).then_some(values)
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
        let diagonal = gram.iter().step_by(columns + 1);
        for (image, row) in image.chunks_mut(columns).zip(rows.chunks(columns)) {
            for ((q, p), g) in image.iter_mut().zip(row).zip(diagonal.clone()) {
                *q += (shrinkage * g + self.damping) * p;
            }
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
