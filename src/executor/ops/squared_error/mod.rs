//! The block's output error: for each sample l = mean((y − t)²) over all positions and channels.
//! L is the sum of those of several samples.
//!
//! ∂L/∂y = 2 (y − t) / n, with the n numbers of its sample.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, Tape, Tensor};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu, tape::record_loss};
use crate::{buffer::stale, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// L = Σ mean((y − t)²).
pub trait SquaredError: Hold {
    /// Σ (y − t)² of each row, on the host.
    fn squared_error_forward(y: &Matrix<Self>, t: &Matrix<Self>) -> Result<Vec<f64>, Self::Err>;

    /// y − t, each row times its number in `scales`.
    fn squared_error_backward(y: &Matrix<Self>, t: &Matrix<Self>, scales: &[f32])
    -> Computed<Self>;

    /// The sum over samples, which are rows of both, of the mean squared difference between an
    /// output and its target.
    fn squared_error<T: Tape<f32, Self>>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
        samples: &[Range<usize>],
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err> {
        let (y, tape) = output.split_tape();
        let (rows, width) = y.shape();
        let sums = Self::squared_error_forward(&y, target)?;
        let mean = |sums: &[f64]| sums.iter().sum::<f64>() / (sums.len() * width) as f64;
        let loss = samples.iter().map(|sample| mean(&sums[sample.clone()])).sum();
        let (target, samples) = (target.clone(), samples.to_vec());
        record_loss(tape, y, loss, move |y, g| {
            let mut scales = vec![0.0; rows];
            for sample in samples {
                let scale = g * 2.0 / (sample.len() * width) as f32;
                scales[sample].fill(scale);
            }
            Self::squared_error_backward(y, &target, &scales)
        })
    }
}

impl SquaredError for Cpu {
    fn squared_error_forward(y: &Matrix<Self>, t: &Matrix<Self>) -> Result<Vec<f64>, CpuError> {
        let width = y.shape().1;
        let rows = y.values.par_chunks(width).zip(t.values.par_chunks(width));
        let sum = |(y, t)| f64::from(simd!(cpu::sum(y, t, |y, t| (y - t) * (y - t))));
        Ok(rows.map(sum).collect())
    }

    fn squared_error_backward(
        y: &Matrix<Self>,
        t: &Matrix<Self>,
        scales: &[f32],
    ) -> Result<Buffer, CpuError> {
        let width = y.shape().1;
        let mut g = stale(y.values.len());
        let inputs = y.values.par_chunks(width).zip(t.values.par_chunks(width)).zip(scales);
        g.par_chunks_mut(width).zip(inputs).for_each(|(g, ((y, t), scale))| {
            simd!({
                let inputs = y.iter().zip(t);
                g.iter_mut().zip(inputs).for_each(|(g, (y, t))| *g = scale * (y - t));
            });
        });
        Ok(g.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, gradients, matrix, noise, traced};

    #[test]
    fn loss_and_gradient() {
        let y = matrix(vec![1.0, 2.0, 3.0, 5.0, 3.0, 1.0], (3, 2));
        let t = matrix(vec![0.0, 2.0, 5.0, 5.0, 1.0, 0.0], (3, 2));
        let loss = Cpu::squared_error(traced(y.clone()), &t, &[0..2, 2..3]).unwrap();
        assert_eq!(loss.as_vec(), [5.0 / 4.0 + 5.0 / 2.0]);
        let [found] = gradients(loss, [&y]);
        assert_eq!(found, [0.5, 0.0, -1.0, 0.0, 2.0, 1.0]);
        assert_agrees!(|device: D| {
            let [y, t] = [1, 2].map(|seed| device.hold(noise(5 * 300, seed), (5, 300)).unwrap());
            let loss = D::squared_error(traced(y.clone()), &t, &[0..2, 2..5]).unwrap();
            vec![loss.as_vec(), gradients(loss, [&y]).concat()]
        });
    }
}
