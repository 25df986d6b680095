//! The soft cap of logits: y = c · tanh(x / c) (arXiv 2408.00118).

use dfdx::tensor::{Cpu, CpuError};
use rayon::prelude::*;

use super::{Hold, Matrix, cpu::CHUNK};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = c · tanh(x / c).
pub trait Cap: Hold {
    /// The capped values. Only an evaluation caps logits: it wants no gradient.
    fn cap(x: &Matrix<Self>, cap: f32) -> Result<Matrix<Self>, Self::Err>;
}

impl Cap for Cpu {
    fn cap(x: &Matrix<Self>, cap: f32) -> Result<Matrix<Self>, CpuError> {
        let mut y = x.to_vec();
        y.par_chunks_mut(CHUNK)
            .for_each(|y| y.iter_mut().for_each(|y| *y = cap * (*y / cap).tanh()));
        x.beside(y.into(), x.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn values_stay_within_the_cap() {
        let y = Cpu::cap(&matrix(vec![-100.0, 0.0, 0.1, 100.0], (1, 4)), 3.0).unwrap().to_vec();
        assert_eq!((y[0], y[1], y[3]), (-3.0, 0.0, 3.0));
        assert!((y[2] - 0.1).abs() < 1e-4);
        assert_agrees!(|device: D| {
            let x = device.hold(noise(12, 1), (3, 4)).unwrap();
            vec![D::cap(&x, 0.5).unwrap().on_host().unwrap()]
        });
    }
}
