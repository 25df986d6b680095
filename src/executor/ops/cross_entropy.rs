//! Cross-entropy of next-token predictions: L = Σ (log Σ exp(z) − z_target), in nats.
//!
//! ∂L/∂z = softmax(z) − 1 at the target.

use dfdx::tensor::{Cpu, CpuError, PutTape, Tape, Tensor, TensorFromVec};
use rayon::prelude::*;

use super::{
    Hold, Matrix,
    cpu::{self, exp},
};
use crate::simd::simd;

/// L = Σ (log Σ exp(z) − z_target).
pub trait CrossEntropy: Hold {
    /// The sum over rows of `logits`, [tokens, vocabulary], of the cross-entropy with each row's
    /// target token.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn cross_entropy<T: Tape<f32, Self> + 'static>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err>;
}

/// The largest logit of a row and the sum of exp(z − largest).
fn partition(row: &[f32]) -> (f32, f32) {
    simd!({
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (max, cpu::sum(row, row, |z, _| exp(z - max)))
    })
}

impl CrossEntropy for Cpu {
    fn cross_entropy<T: Tape<f32, Self> + 'static>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>, CpuError> {
        let (logits, mut tape) = logits.split_tape();
        let width = logits.shape().1;
        let rows = logits.values.par_chunks(width).zip(targets);
        let losses: Vec<f64> = rows
            .map(|(row, &target)| {
                let (max, sum) = partition(row);
                f64::from(max - row[target as usize]) + f64::from(sum).ln()
            })
            .collect();
        let loss =
            logits.device().try_tensor_from_vec(vec![losses.iter().sum::<f64>() as f32], ())?;

        let (result, targets) = (loss.clone(), targets.to_vec());
        tape.add_backward_op(move |gradients| {
            let scale = cpu::take_scalar(gradients, &result)?;
            let mut g = logits.to_vec();
            g.par_chunks_mut(width).zip(&targets).for_each(|(row, &target)| {
                let (max, sum) = partition(row);
                simd!(row.iter_mut().for_each(|z| *z = scale * exp(*z - max) / sum));
                row[target as usize] -= scale;
            });
            cpu::add(gradients, &logits, g)
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
        let logits = matrix(vec![0.0, 3f32.ln(), 80.0, 80.0], (2, 2));
        let loss = Cpu::cross_entropy(traced(logits.clone()), &[0, 1]).unwrap();
        assert!((loss.as_vec()[0] - 8f32.ln()).abs() < 1e-6);
        let gradient = gradient(&mut loss.backward(), &logits);
        for (g, expected) in gradient.iter().zip([-0.75, 0.75, 0.5, -0.5]) {
            assert!((g - expected).abs() < 1e-6, "{gradient:?}");
        }
    }
}
