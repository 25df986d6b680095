//! Cross-entropy of next-token predictions: L = Σ (log Σ exp(z) − z_target), in nats.
//!
//! ∂L/∂z = softmax(z) − 1 at the target.

use std::sync::Arc;

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::{Matrix, cpu};

/// L = Σ (log Σ exp(z) − z_target).
pub trait CrossEntropy: Device<f32> {
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
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, row.iter().map(|z| (z - max).exp()).sum())
}

impl CrossEntropy for Cpu {
    fn cross_entropy<T: Tape<f32, Self> + 'static>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>, CpuError> {
        let (logits, mut tape) = logits.split_tape();
        let width = logits.shape().1;
        let z = cpu::values(&logits);
        let losses: Vec<f64> = z
            .par_chunks(width)
            .zip(targets)
            .map(|(row, &target)| {
                let (max, sum) = partition(row);
                f64::from(max - row[target as usize]) + f64::from(sum).ln()
            })
            .collect();
        let loss =
            logits.device().try_tensor_from_vec(vec![losses.iter().sum::<f64>() as f32], ())?;

        let (result, targets) = (loss.clone(), targets.to_vec());
        tape.add_backward_op(move |gradients| {
            let scale = cpu::take(gradients, &result)?[0];
            let mut g = Arc::unwrap_or_clone(z);
            g.par_chunks_mut(width).zip(&targets).for_each(|(row, &target)| {
                let (max, sum) = partition(row);
                row.iter_mut().for_each(|z| *z = scale * (*z - max).exp() / sum);
                row[target as usize] -= scale;
            });
            cpu::add(gradients, &logits, &g)
        });
        Ok(loss.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfdx::{
        tensor::{AsArray, Trace},
        tensor_ops::Backward,
    };

    #[test]
    fn loss_and_gradient() {
        let device = Cpu::default();
        let logits = device.tensor_from_vec(vec![0.0, 3f32.ln(), 100.0, 100.0], (2, 2));
        let loss = Cpu::cross_entropy(logits.leaky_trace(), &[0, 1]).unwrap();
        assert!((loss.array() - 8f32.ln()).abs() < 1e-6);
        let gradient = loss.backward().get(&logits).as_vec();
        for (g, expected) in gradient.iter().zip([-0.75, 0.75, 0.5, -0.5]) {
            assert!((g - expected).abs() < 1e-6, "{gradient:?}");
        }
    }
}
