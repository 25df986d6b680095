//! The block's output error L = mean((y − t)²), over all positions and channels of one sample.
//!
//! ∂L/∂y = 2 (y − t) / n.

use dfdx::{
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};

use super::{Matrix, cpu};

/// L = mean((y − t)²).
pub trait SquaredError: Device<f32> {
    /// The mean squared difference between an output and its target.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
    ) -> Result<Tensor<(), f32, Self, T>, Self::Err>;
}

impl SquaredError for Cpu {
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
    ) -> Result<Tensor<(), f32, Self, T>, CpuError> {
        let (output, mut tape) = output.split_tape();
        let (y, t) = (cpu::values(&output), cpu::values(target));
        let n = y.len() as f64;
        let sum: f64 = y.iter().zip(t.iter()).map(|(y, t)| f64::from(y - t).powi(2)).sum();
        let loss = output.device().try_tensor_from_vec(vec![(sum / n) as f32], ())?;

        let result = loss.clone();
        tape.add_backward_op(move |gradients| {
            let scale = cpu::take(gradients, &result)?[0] * (2.0 / n) as f32;
            let g: Vec<f32> = y.iter().zip(t.iter()).map(|(y, t)| scale * (y - t)).collect();
            cpu::add(gradients, &output, &g)
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
        let y = device.tensor_from_vec(vec![1.0, 2.0, 3.0, 5.0], (2, 2));
        let t = device.tensor_from_vec(vec![0.0, 2.0, 5.0, 5.0], (2, 2));
        let loss = Cpu::squared_error(y.leaky_trace(), &t).unwrap();
        assert_eq!(loss.array(), 5.0 / 4.0);
        assert_eq!(loss.backward().get(&y).as_vec(), [0.5, 0.0, -1.0, 0.0]);
    }
}
