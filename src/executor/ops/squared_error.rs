//! The block's output error: for each sample l = mean((y − t)²) over all positions and channels.
//! L is the sum of those of several samples.
//!
//! ∂L/∂y = 2 (y − t) / n, with the n numbers of its sample.

use std::ops::Range;

use dfdx::tensor::{Cpu, CpuError, PutTape, Tape, Tensor, TensorFromVec};
use rayon::prelude::*;

use super::{Hold, Matrix, cpu};
use crate::{buffer::stale, simd::simd};

/// L = Σ mean((y − t)²).
pub trait SquaredError: Hold {
    /// The sum over samples, which are rows of both, of the mean squared difference between an
    /// output and its target.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
        samples: &[Range<usize>],
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err>;
}

impl SquaredError for Cpu {
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
        samples: &[Range<usize>],
    ) -> Result<Tensor<(), f32, Self, T>, CpuError> {
        let (y, mut tape) = output.split_tape();
        let width = y.shape().1;
        let rows = y.values.par_chunks(width).zip(target.values.par_chunks(width));
        let rows: Vec<f64> =
            rows.map(|(y, t)| f64::from(simd!(cpu::sum(y, t, |y, t| (y - t) * (y - t))))).collect();
        let mean = |rows: &[f64]| rows.iter().sum::<f64>() / (rows.len() * width) as f64;
        let sum: f64 = samples.iter().map(|sample| mean(&rows[sample.clone()])).sum();
        let loss = y.device().try_tensor_from_vec(vec![sum as f32], ())?;

        let (result, target, samples) = (loss.clone(), target.clone(), samples.to_vec());
        tape.add_backward_op(move |gradients| {
            let scale = cpu::take_scalar(gradients, &result)?;
            let mut g = stale(y.values.len());
            for sample in samples {
                let scale = scale * 2.0 / (sample.len() * width) as f32;
                let values = sample.start * width..sample.end * width;
                let inputs = y.values[values.clone()].par_chunks(width);
                let inputs = inputs.zip(target.values[values.clone()].par_chunks(width));
                g[values].par_chunks_mut(width).zip(inputs).for_each(|(g, (y, t))| {
                    simd!({
                        let inputs = y.iter().zip(t);
                        g.iter_mut().zip(inputs).for_each(|(g, (y, t))| *g = scale * (y - t));
                    });
                });
            }
            cpu::add(gradients, &y, g)
        });
        Ok(loss.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor_ops::Backward;

    use super::*;
    use crate::executor::ops::testing::{gradient, matrix, traced};

    #[test]
    fn loss_and_gradient() {
        let y = matrix(vec![1.0, 2.0, 3.0, 5.0, 3.0, 1.0], (3, 2));
        let t = matrix(vec![0.0, 2.0, 5.0, 5.0, 1.0, 0.0], (3, 2));
        let loss = Cpu::squared_error(traced(y.clone()), &t, &[0..2, 2..3]).unwrap();
        assert_eq!(loss.as_vec(), [5.0 / 4.0 + 5.0 / 2.0]);
        let found = gradient(&mut loss.backward(), &y);
        assert_eq!(found, [0.5, 0.0, -1.0, 0.0, 2.0, 1.0]);
    }
}
