//! The diagonal of an inverse.

use std::num::NonZeroUsize;

use barber_metric::Error;
use faer::{
    MatMut, MatRef, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::factor::{LltParams, cholesky_in_place, cholesky_in_place_scratch},
        triangular_inverse::invert_lower_triangular,
    },
};

/// Maximum damping; more would dominate the Hessian.
const MOST_DAMPING: f64 = 1.0;
/// The division of the work. It must not depend on the number of threads, nor may the result.
const WORK: Par = Par::Rayon(NonZeroUsize::new(16).unwrap());

/// The diagonal of (H + λI)⁻¹ for H = 2·`gram`, [n, n], with λ a fraction of H's mean diagonal. λ
/// is raised tenfold until the matrix is positive definite despite rounding.
///
/// With H + λI = LLᵀ its inverse is L⁻ᵀL⁻¹, whose diagonal is the sums of squares of L⁻¹'s columns.
pub(super) fn inverse_diagonal(gram: &[f32], n: usize, damping: f64) -> Result<Vec<f64>, Error> {
    let mean = 2.0 * (0..n).map(|j| f64::from(gram[j * n + j])).sum::<f64>() / n.max(1) as f64;
    // If all inputs are zero, all weights are equal.
    if mean == 0.0 {
        return Ok(vec![f64::INFINITY; n]);
    }
    let mut damping = damping;
    let mut factor = loop {
        let mut matrix: Vec<f64> = gram.iter().map(|g| 2.0 * f64::from(*g)).collect();
        matrix.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += damping * mean);
        let parameters: Spec<LltParams, f64> = Spec::default();
        let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, WORK, parameters));
        let target = MatMut::from_column_major_slice_mut(&mut matrix, n, n);
        let stack = MemStack::new(&mut memory);
        match cholesky_in_place(target, Default::default(), WORK, stack, parameters) {
            Ok(_) => break matrix,
            Err(_) if damping < MOST_DAMPING => damping *= 10.0,
            Err(_) => {
                let reason = "the Gram matrix of the inputs is not positive definite";
                return Err(Error::Metric(reason.into()));
            }
        }
    };
    let lower = MatRef::from_column_major_slice(&factor, n, n).to_owned();
    let target = MatMut::from_column_major_slice_mut(&mut factor, n, n);
    invert_lower_triangular(target, lower.as_ref(), WORK);
    let columns = factor.chunks(n).enumerate();
    Ok(columns.map(|(j, column)| column[j..].iter().map(|x| x * x).sum()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_inverse_of_the_damped_hessian() {
        // H = [[2, 1], [1, 4]], λ = 0.5 · 3: the determinant of [[3.5, 1], [1, 5.5]] is 18.25.
        let found = inverse_diagonal(&[1.0, 0.5, 0.5, 2.0], 2, 0.5).expect("positive definite");
        for (found, expected) in found.iter().zip([5.5 / 18.25, 3.5 / 18.25]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn what_is_not_positive_definite_is_damped_more_or_refused() {
        // −1 is an eigenvalue of H/2, and the mean diagonal 1.
        let found = inverse_diagonal(&[1.0, 2.0, 2.0, 1.0], 2, 0.01);
        assert!(matches!(found, Err(Error::Metric(_))), "{found:?}");
        assert!(inverse_diagonal(&[1.0, 1.05, 1.05, 1.0], 2, 0.01).is_ok());
        assert_eq!(inverse_diagonal(&[0.0; 4], 2, 0.01), Ok(vec![f64::INFINITY; 2]));
        assert_eq!(inverse_diagonal(&[], 0, 0.01), Ok(vec![]));
    }
}
