//! The Kullback-Leibler divergence of predictions: L = Σ KL(softmax(t) ‖ softmax(z)), in nats.
//!
//! ∂L/∂z = softmax(z) − softmax(t).

use dfdx::tensor::{Cpu, CpuError, Tape, Tensor};
use rayon::prelude::*;

use super::{
    Buffer, Computed, Hold, Matrix,
    cpu::{self, exp},
    cross_entropy::partition,
    tape::record_loss,
};
use crate::simd::simd;

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// L = Σ KL(softmax(t) ‖ softmax(z)).
pub trait Divergence: Hold {
    /// KL(softmax(t) ‖ softmax(z)) of each row, on the host.
    fn divergence_forward(
        logits: &Matrix<Self>,
        targets: &Matrix<Self>,
    ) -> Result<Vec<f64>, Self::Err>;

    /// ∂L/∂z times `g`.
    fn divergence_backward(logits: &Matrix<Self>, targets: &Matrix<Self>, g: f32)
    -> Computed<Self>;

    /// The sum over rows of the divergence of the predictions of `logits`, [tokens, vocabulary],
    /// from those of the `targets`, which are logits too.
    fn divergence<T: Tape<f32, Self>>(
        logits: Matrix<Self, T>,
        targets: Matrix<Self>,
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err> {
        let (logits, tape) = logits.split_tape();
        let loss = Self::divergence_forward(&logits, &targets)?.iter().sum();
        record_loss(tape, logits, loss, move |logits, g| {
            Self::divergence_backward(logits, &targets, g)
        })
    }
}

impl Divergence for Cpu {
    fn divergence_forward(
        logits: &Matrix<Self>,
        targets: &Matrix<Self>,
    ) -> Result<Vec<f64>, CpuError> {
        let width = logits.shape().1;
        let rows = logits.values.par_chunks(width).zip(targets.values.par_chunks(width));
        let loss = |(z, t): (&[f32], &[f32])| {
            let ([z_max, z_sum], [t_max, t_sum]) = (partition(z).into(), partition(t).into());
            // Σ p (t − z) over the unnormalised p, with both shifted by their largest logits.
            let apart = simd!(cpu::sum(t, z, |t, z| exp(t - t_max) * ((t - t_max) - (z - z_max))));
            f64::from(apart) / f64::from(t_sum) + f64::from(z_sum).ln() - f64::from(t_sum).ln()
        };
        Ok(rows.map(loss).collect())
    }

    fn divergence_backward(
        logits: &Matrix<Self>,
        targets: &Matrix<Self>,
        scale: f32,
    ) -> Result<Buffer, CpuError> {
        let (width, mut g) = (logits.shape().1, logits.to_vec());
        g.par_chunks_mut(width).zip(targets.values.par_chunks(width)).for_each(|(row, t)| {
            let ([max, sum], [t_max, t_sum]) = (partition(row).into(), partition(t).into());
            simd!(row.iter_mut().zip(t).for_each(|(z, t)| {
                *z = scale * (exp(*z - max) / sum - exp(*t - t_max) / t_sum);
            }));
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
        // Predictions of 1/4 and 3/4, where 1/2 and 1/2 are right.
        let logits = matrix(vec![0.0, 3f32.ln(), 80.0, 80.0], (2, 2));
        let targets = matrix(vec![7.0, 7.0, -5.0, -5.0], (2, 2));
        let loss = Cpu::divergence(traced(logits.clone()), targets).unwrap();
        let expected = 0.5 * 2f32.ln() + 0.5 * (2f32 / 3.0).ln();
        assert!((loss.as_vec()[0] - expected).abs() < 1e-6);
        let [gradient] = gradients(loss, [&logits]);
        for (g, expected) in gradient.iter().zip([-0.25, 0.25, 0.0, 0.0]) {
            assert!((g - expected).abs() < 1e-6, "{gradient:?}");
        }
        assert_agrees!(|device: D| {
            let logits = device.hold(noise(5 * 300, 1), (5, 300)).unwrap();
            let targets = device.hold(noise(5 * 300, 2), (5, 300)).unwrap();
            let loss = D::divergence(traced(logits.clone()), targets).unwrap();
            vec![loss.as_vec(), gradients(loss, [&logits]).concat()]
        });
    }
}
