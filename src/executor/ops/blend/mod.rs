//! The blend of two matrices: y = (1 − t) a + t b. With t = 0 it is a, with t = 1 it is b, to the
//! bit.

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{Hold, Matrix, cpu::CHUNK};
use crate::{buffer::stale, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = (1 − t) a + t b.
pub trait Blend: Hold {
    /// The blend of two matrices of one shape.
    fn blend(a: &Matrix<Self>, b: &Matrix<Self>, t: f32) -> Result<Matrix<Self>, Self::Err>;

    /// b − a.
    fn difference(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Matrix<Self>, Self::Err>;
}

/// f(a, b), element by element.
fn combine(
    a: &Matrix<Cpu>,
    b: &Matrix<Cpu>,
    f: impl Fn(f32, f32) -> f32 + Sync,
) -> Result<Matrix<Cpu>, CpuError> {
    let mut y = stale(a.values.len());
    let inputs = a.values.par_chunks(CHUNK).zip(b.values.par_chunks(CHUNK));
    y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| {
        simd!(y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = f(*a, *b)));
    });
    a.beside(y.into(), a.shape())
}

impl Blend for Cpu {
    fn blend(a: &Matrix<Self>, b: &Matrix<Self>, t: f32) -> Result<Matrix<Self>, CpuError> {
        combine(a, b, |a, b| (1.0 - t) * a + t * b)
    }

    fn difference(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Matrix<Self>, CpuError> {
        combine(a, b, |a, b| b - a)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn blends_lie_between() {
        let (a, b) = (matrix(noise(12, 1), (3, 4)), matrix(noise(12, 2), (3, 4)));
        let blend = |t| Cpu::blend(&a, &b, t).unwrap().to_vec();
        assert_eq!(blend(0.0), a.to_vec());
        assert_eq!(blend(1.0), b.to_vec());
        let difference = Cpu::difference(&a, &b).unwrap().to_vec();
        for (i, found) in blend(0.25).into_iter().enumerate() {
            assert!((found - (a.to_vec()[i] + 0.25 * difference[i])).abs() < 1e-6);
        }
        assert_agrees!(|device: D| {
            let [a, b] = [1, 3].map(|seed| device.hold(noise(50 * 33, seed), (50, 33)).unwrap());
            [D::blend(&a, &b, 0.3), D::difference(&a, &b)]
                .map(|y| y.unwrap().on_host().unwrap())
                .to_vec()
        });
    }
}
