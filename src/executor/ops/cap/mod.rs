//! The soft cap of logits: y = c · tanh(x / c) (arXiv 2408.00118).
//!
//! ∂y/∂x = 1 − (y / c)².

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = c · tanh(x / c).
pub trait Cap: Hold {
    /// y.
    fn cap_forward(x: &Matrix<Self>, cap: f32) -> Computed<Self>;

    /// ∂L/∂x, for ∂L/∂y in `g`.
    fn cap_backward(y: &Matrix<Self>, cap: f32, g: Self::Numbers) -> Computed<Self>;

    /// The capped values.
    fn cap<T: Tape<f32, Self>>(x: Matrix<Self, T>, cap: f32) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let y = x.beside(Self::cap_forward(&x, cap)?, x.shape())?;
        let output = y.clone();
        Ok(record(tape, [x.name()], y, move |g| Ok([Self::cap_backward(&output, cap, g)?])))
    }
}

impl Cap for Cpu {
    fn cap_forward(x: &Matrix<Self>, cap: f32) -> Result<Buffer, CpuError> {
        let mut y = x.to_vec();
        y.par_chunks_mut(CHUNK)
            .for_each(|y| y.iter_mut().for_each(|y| *y = cap * (*y / cap).tanh()));
        Ok(y.into())
    }

    fn cap_backward(y: &Matrix<Self>, cap: f32, mut g: Buffer) -> Result<Buffer, CpuError> {
        g.par_chunks_mut(CHUNK).zip(y.values.par_chunks(CHUNK)).for_each(|(g, y)| {
            g.iter_mut().zip(y).for_each(|(g, y)| *g *= 1.0 - (y / cap).powi(2));
        });
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix};

    #[test]
    fn values_stay_within_the_cap() {
        let y = Cpu::cap(matrix(vec![-100.0, 0.0, 0.1, 100.0], (1, 4)), 3.0).unwrap().to_vec();
        assert_eq!((y[0], y[1], y[3]), (-3.0, 0.0, 3.0));
        assert!((y[2] - 0.1).abs() < 1e-4);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check!(|device: D| [(3, 4)], |[x]| D::cap(x, 0.5));
    }
}
