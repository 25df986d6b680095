//! Cross-entropy of next-token predictions: L = Σ (log Σ exp(z) − z_target), in nats.
//!
//! ∂L/∂z = softmax(z) − 1 at the target.

use dfdx::tensor::{Cpu, CpuError, Tape, Tensor};
use rayon::prelude::*;

use super::{
    Buffer, Computed, Hold, Matrix,
    cpu::{self, exp},
    tape::record_loss,
};
use crate::simd::simd;

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// L = Σ (log Σ exp(z) − z_target).
pub trait CrossEntropy: Hold {
    /// log Σ exp(z) − z_target of each row, on the host.
    fn cross_entropy_forward(logits: &Matrix<Self>, targets: &[u32])
    -> Result<Vec<f64>, Self::Err>;

    /// ∂L/∂z times `g`.
    fn cross_entropy_backward(logits: &Matrix<Self>, targets: &[u32], g: f32) -> Computed<Self>;

    /// The sum over rows of `logits`, [tokens, vocabulary], of the cross-entropy with each row's
    /// target token.
    fn cross_entropy<T: Tape<f32, Self>>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err> {
        let (logits, tape) = logits.split_tape();
        let loss = Self::cross_entropy_forward(&logits, targets)?.iter().sum();
        let targets = targets.to_vec();
        record_loss(tape, logits, loss, move |logits, g| {
            Self::cross_entropy_backward(logits, &targets, g)
        })
    }
}

/// Number of logits that are summed in f32. Sums of the hundreds of thousands that some vocabularies
/// have would lose the small ones.
const SUMMED: usize = 1 << 10;

/// The largest logit of a row and the sum of exp(z − largest).
pub(super) fn partition(row: &[f32]) -> (f32, f32) {
    simd!({
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sums = row.chunks(SUMMED).map(|z| f64::from(cpu::sum(z, z, |z, _| exp(z - max))));
        (max, sums.sum::<f64>() as f32)
    })
}

impl CrossEntropy for Cpu {
    fn cross_entropy_forward(logits: &Matrix<Self>, targets: &[u32]) -> Result<Vec<f64>, CpuError> {
        let rows = logits.values.par_chunks(logits.shape().1).zip(targets);
        let loss = |(row, &target): (&[f32], &u32)| {
            let (max, sum) = partition(row);
            f64::from(max - row[target as usize]) + f64::from(sum).ln()
        };
        Ok(rows.map(loss).collect())
    }

    fn cross_entropy_backward(
        logits: &Matrix<Self>,
        targets: &[u32],
        scale: f32,
    ) -> Result<Buffer, CpuError> {
        let mut g = logits.to_vec();
        g.par_chunks_mut(logits.shape().1).zip(targets).for_each(|(row, &target)| {
            let (max, sum) = partition(row);
            simd!(row.iter_mut().for_each(|z| *z = scale * exp(*z - max) / sum));
            row[target as usize] -= scale;
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
        let logits = matrix(vec![0.0, 3f32.ln(), 80.0, 80.0], (2, 2));
        let loss = Cpu::cross_entropy(traced(logits.clone()), &[0, 1]).unwrap();
        assert!((loss.as_vec()[0] - 8f32.ln()).abs() < 1e-6);
        let [gradient] = gradients(loss, [&logits]);
        for (g, expected) in gradient.iter().zip([-0.75, 0.75, 0.5, -0.5]) {
            assert!((g - expected).abs() < 1e-6, "{gradient:?}");
        }
        // A large vocabulary, whose small terms count.
        let mut logits = vec![-3.0; 1 << 18];
        logits[7] = 0.0;
        let expected = f64::from((1 << 18) - 1).mul_add((-3f64).exp(), 1.0).ln() as f32;
        let loss = Cpu::cross_entropy(matrix(logits, (1, 1 << 18)), &[7]).unwrap();
        assert!((loss.as_vec()[0] - expected).abs() < 2e-6, "{:?} {expected}", loss.as_vec());
        assert_agrees!(|device: D| {
            let logits = device.hold(noise(5 * 300, 1), (5, 300)).unwrap();
            let loss = D::cross_entropy(traced(logits.clone()), &[3, 0, 299, 2, 2]).unwrap();
            vec![loss.as_vec(), gradients(loss, [&logits]).concat()]
        });
    }
}
