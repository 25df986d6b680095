//! Values for the kept weights of a matrix that minimise the error of its output: least squares of
//! each row on the inputs that it keeps.
//!
//! With K the kept inputs of a row w and b as in [`OutputError`], the values v of the kept weights
//! solve (G_KK + λ) v = (G w + b)_K + λ w_K. λ damps the change, so weights of inputs without
//! information stay as they are. Weights that are zero are not in K and stay zero. Rows with the same K,
//! as where whole channels are removed, share the factors of the matrix.

use std::collections::BTreeMap;

use faer::{
    MatMut, MatRef, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::cholesky::llt::{
        factor::{LltParams, cholesky_in_place, cholesky_in_place_scratch},
        solve::{solve_in_place, solve_in_place_scratch},
    },
};
use rayon::prelude::*;

use super::{Error, Mask, OutputError};

/// Maximum damping: more does not make a matrix positive definite.
pub(super) const MOST_DAMPING: f64 = 100.0;

/// The fitted values of a matrix, row-major. Pruned weights have their values in `weight`; so have
/// all weights if every input is zero. `damping` is λ as a fraction of the mean diagonal of G.
///
/// # Errors
/// If a slice does not fit the matrix, or no damping makes a row's part of G positive definite.
pub fn least_squares(
    name: &str,
    weight: &[f32],
    mask: &Mask,
    error: OutputError<'_>,
    damping: f64,
) -> Result<Vec<f32>, Error> {
    let dims = mask.dims();
    let columns = dims.columns;
    error.check(name, dims, weight)?;
    let (right, mean) = (error.right_sides(weight, dims), error.mean_square(columns));
    let mut groups = BTreeMap::<Vec<u64>, Vec<Row<'_>>>::new();
    let mut values = weight.to_vec();
    for (row, values) in values.chunks_mut(columns.max(1)).enumerate() {
        let mut inputs = vec![0; columns.div_ceil(BITS)];
        let fitted = |j: &usize| mask.get(row * columns + j) && values[*j] != 0.0;
        (0..columns).filter(fitted).for_each(|j| inputs[j / BITS] |= 1_u64 << (j % BITS));
        groups.entry(inputs).or_default().push((row, values));
    }
    let of = |work: &mut Vec<f64>, (inputs, mut rows): (Vec<u64>, Vec<Row<'_>>)| {
        let kept = (0..columns).filter(|j| inputs[j / BITS] >> (j % BITS) & 1 == 1);
        let kept: Vec<usize> = kept.collect();
        let mut damping = damping;
        loop {
            let lambda = damping * mean;
            let factored = factor(&kept, columns, error, lambda, work);
            let solved = factored.then(|| {
                let chunks = rows.par_chunks(RIGHT_SIDES);
                let solved = chunks.map(|rows| solve(&kept, rows, &right, lambda, work));
                solved.collect::<Option<Vec<_>>>()
            });
            match solved.flatten() {
                Some(solved) => {
                    for ((_, values), solved) in rows.iter_mut().zip(solved.into_iter().flatten()) {
                        kept.iter().zip(solved).for_each(|(j, value)| values[*j] = value);
                    }
                    return Ok(());
                }
                None if damping < MOST_DAMPING => damping = (10.0 * damping).max(1e-6),
                None => return Err(Error::NotPositiveDefinite { name: name.into(), damping }),
            }
        }
    };
    groups.into_par_iter().map_init(Vec::new, of).collect::<Result<(), Error>>()?;
    Ok(values)
}

/// A row's index and its weights.
type Row<'a> = (usize, &'a mut [f32]);

/// Number of bits of a word.
const BITS: usize = u64::BITS as usize;
/// Number of rows that are solved together, if they keep the same inputs.
const RIGHT_SIDES: usize = 32;

/// Factors the matrix of the kept inputs in `work`; returns whether it is positive definite.
fn factor(
    kept: &[usize],
    columns: usize,
    error: OutputError<'_>,
    damping: f64,
    work: &mut Vec<f64>,
) -> bool {
    let n = kept.len();
    work.clear();
    for &i in kept {
        let row = &error.gram[i * columns..(i + 1) * columns];
        work.extend(kept.iter().map(|&j| f64::from((1.0 - error.shrinkage) * row[j])));
    }
    for (k, &i) in kept.iter().enumerate() {
        work[k * (n + 1)] = f64::from(error.gram[i * (columns + 1)]) + damping;
    }
    let parameters: Spec<LltParams, f64> = Spec::default();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, parameters));
    let (matrix, memory) =
        (MatMut::from_column_major_slice_mut(work, n, n), MemStack::new(&mut memory));
    cholesky_in_place(matrix, Default::default(), Par::Seq, memory, parameters).is_ok()
}

/// The values of the kept weights of some rows, given by their indices and weights, with the factored
/// matrix of their inputs and the right sides of all rows; `None` if one is not finite.
fn solve(
    kept: &[usize],
    rows: &[Row<'_>],
    right: &[f32],
    damping: f64,
    factored: &[f64],
) -> Option<Vec<Vec<f32>>> {
    let (n, count) = (kept.len(), rows.len());
    let mut solution = Vec::with_capacity(n * count);
    for (row, weight) in rows {
        let right = &right[row * weight.len()..(row + 1) * weight.len()];
        let of = |&j: &usize| f64::from(right[j]) + damping * f64::from(weight[j]);
        solution.extend(kept.iter().map(of));
    }
    let mut memory = MemBuffer::new(solve_in_place_scratch::<f64>(n, count, Par::Seq));
    let factored = MatRef::from_column_major_slice(factored, n, n);
    let target = MatMut::from_column_major_slice_mut(&mut solution, n, count);
    solve_in_place(factored, target, Par::Seq, MemStack::new(&mut memory));
    if n == 0 {
        return Some(vec![Vec::new(); count]);
    }
    let finite = solution.iter().all(|x| x.is_finite());
    finite.then(|| solution.chunks(n).map(|of| of.iter().map(|x| *x as f32).collect()).collect())
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn what_is_kept_makes_up_for_what_is_not() {
        // The inputs are one and the same: the kept weight takes the other's place.
        let gram = [1.0, 1.0, 1.0, 1.0];
        let dims = Dims { rows: 1, columns: 2 };
        let mask = Mask::from_bools(dims, &[true, false]);
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.0 };
        let found = least_squares("w", &[2.0, 3.0], &mask, error, 0.0).unwrap();
        assert_eq!(found, [5.0, 3.0]);
        // A target that is one higher.
        let error = OutputError { gram: &gram, shift: Some(&[1.0, 1.0]), shrinkage: 0.0 };
        let found = least_squares("w", &[2.0, 3.0], &mask, error, 0.0).unwrap();
        assert_eq!(found, [6.0, 3.0]);
        // Damping holds the weight where it was.
        let found = least_squares("w", &[2.0, 3.0], &mask, error, 1e9).unwrap();
        assert!((found[0] - 2.0).abs() < 1e-3);
    }

    #[test]
    fn inputs_that_say_nothing_leave_their_weights() {
        let gram = [4.0, 0.0, 0.0, 0.0];
        let mask = Mask::kept_everywhere(Dims { rows: 2, columns: 2 });
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.0 };
        let weight = [1.0, 2.0, 3.0, 4.0];
        let found = least_squares("w", &weight, &mask, error, 0.01).unwrap();
        found.iter().zip(weight).for_each(|(found, w)| assert!((found - w).abs() < 1e-5));
    }

    /// Fits a matrix of these inputs, token by token, whatever the damping.
    fn fitted(inputs: &[&[f32]], weight: &[f32], kept: &[bool]) -> Vec<Vec<f32>> {
        let columns = weight.len();
        let product = |i: usize, j: usize| inputs.iter().map(|x| x[i] * x[j]).sum();
        let gram: Vec<f32> =
            (0..columns * columns).map(|k| product(k / columns, k % columns)).collect();
        let mask = Mask::from_bools(Dims { rows: 1, columns }, kept);
        let error = |shrinkage| OutputError { gram: &gram, shift: None, shrinkage };
        let settings = [(0.0, 0.0), (0.01, 0.0), (0.0, 0.2), (0.01, 0.2), (0.0, 1.0)];
        let of = |(damping, shrinkage)| {
            least_squares("w", weight, &mask, error(shrinkage), damping).unwrap()
        };
        settings.map(of).into()
    }

    #[test]
    fn inputs_that_say_little_are_no_error() {
        let weight = [1.0, -2.0, 3.0, 0.5];
        let all = [true; 4];
        // All zero: nothing is said of any weight.
        for found in fitted(&[&[0.0; 4][..]; 3], &weight, &[true, false, true, true]) {
            assert_eq!(found, weight);
        }
        // Dead channels; constant inputs, which are one input; one token.
        for inputs in [
            &[&[1.0, 0.0, 2.0, 0.0][..], &[3.0, 0.0, -1.0, 0.0]][..],
            &[&[2.0; 4], &[2.0; 4]],
            &[&[1.0, 2.0, -1.0, 0.5]],
        ] {
            for found in fitted(inputs, &weight, &all) {
                let close = found.iter().zip(&weight).all(|(found, w)| (found - w).abs() < 1e-2);
                assert!(close, "{inputs:?}: {found:?}");
            }
        }
        // A row that keeps nothing.
        for found in fitted(&[&[1.0; 4]], &weight, &[false; 4]) {
            assert_eq!(found, weight);
        }
    }

    proptest! {
        #[test]
        fn zeros_stay(weight in vec(-2_i8..3, 6), kept in vec(any::<bool>(), 6), x in vec(-1.0..1.0_f32, 18)) {
            let weight: Vec<f32> = weight.into_iter().map(f32::from).collect();
            let inputs: Vec<&[f32]> = x.chunks(6).collect();
            for found in fitted(&inputs, &weight, &kept) {
                for (i, value) in found.into_iter().enumerate() {
                    let given = !kept[i] || weight[i] == 0.0;
                    prop_assert!(!given || value.to_bits() == weight[i].to_bits());
                }
            }
        }
    }

    #[test]
    fn rows_that_keep_the_same_inputs_get_what_they_get_alone() {
        let (rows, columns) = (70, 9);
        let noise = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
        let inputs: Vec<f32> = (0..40 * columns).map(noise).collect();
        let product = |i: usize, j: usize| inputs.chunks(columns).map(|x| x[i] * x[j]).sum();
        let gram: Vec<f32> =
            (0..columns * columns).map(|k| product(k / columns, k % columns)).collect();
        let weight: Vec<f32> = (0..rows * columns).map(|i| noise(i) + 1.5).collect();
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.1 };
        // Every third row keeps other inputs.
        let keeps =
            |i: usize| (i % columns + usize::from((i / columns).is_multiple_of(3))) % 4 != 1;
        let mask = Mask::from_fn(Dims { rows, columns }, keeps);
        let all = least_squares("w", &weight, &mask, error, 0.01).unwrap();
        for (row, (own, found)) in weight.chunks(columns).zip(all.chunks(columns)).enumerate() {
            let mask = Mask::from_fn(Dims { rows: 1, columns }, |i| keeps(row * columns + i));
            let alone = least_squares("w", own, &mask, error, 0.01).unwrap();
            for (found, alone) in found.iter().zip(alone) {
                assert!((found - alone).abs() < 1e-5, "{row}: {found} {alone}");
            }
        }
    }

    #[test]
    fn what_is_no_gram_matrix_is_refused() {
        let mask = Mask::kept_everywhere(Dims { rows: 1, columns: 2 });
        let gram = [1.0, 900.0, 900.0, 1.0];
        let error = OutputError { gram: &gram, shift: None, shrinkage: 0.0 };
        let error = least_squares("w", &[1.0, 2.0], &mask, error, 0.01).unwrap_err();
        assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
    }
}
