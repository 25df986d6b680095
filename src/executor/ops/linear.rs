//! The linear layer y = x Wᵀ + b.
//!
//! ∂L/∂W = ∂L/∂yᵀ x, ∂L/∂x = ∂L/∂y W, ∂L/∂b = the column sums of ∂L/∂y.

use std::sync::Arc;

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, Gradients, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};

use super::{
    Matrix, cpu,
    gemm::{Threads, View, gemm},
};

/// The weight of a linear layer, [outputs, inputs], and its bias.
///
/// The host keeps the values: dfdx lends no slice of a tensor, and a copy for each product would
/// cost as much time as a product of a few hundred tokens. The tensor is what the tape knows.
#[derive(Clone, Debug)]
pub struct Weight<D: Device<f32>> {
    device: D,
    dims: (usize, usize),
    values: Arc<Vec<f32>>,
    bias: Option<Tensor<(usize,), f32, D>>,
    traced: Option<Matrix<D>>,
}

impl<D: Device<f32>> Weight<D> {
    /// A weight of `dims`, (outputs, inputs), that no gradient is wanted of.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn frozen(
        device: &D,
        values: Vec<f32>,
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<Self, D::Err> {
        let bias = match bias {
            Some(bias) => Some(device.try_tensor_from_vec(bias, (dims.0,))?),
            None => None,
        };
        Ok(Self { device: device.clone(), dims, values: Arc::new(values), bias, traced: None })
    }

    /// The same weight, whose gradient is wanted.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn traced(&self) -> Result<Self, D::Err> {
        let tensor = self.device.try_tensor_from_vec(self.values.to_vec(), self.dims)?;
        Ok(Self { traced: Some(tensor), ..self.clone() })
    }

    /// The same layer with other values, that no gradient is wanted of.
    pub fn with_values(&self, values: Vec<f32>) -> Self {
        Self { values: Arc::new(values), traced: None, ..self.clone() }
    }

    /// The number of inputs.
    pub fn inputs(&self) -> usize {
        self.dims.1
    }

    /// The values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// Whether the gradient of a linear layer's input is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// It is: something before this layer has weights.
    Wanted,
    /// It is not, and not computed: this layer is the first of its group.
    Skipped,
}

/// y = x Wᵀ + b.
pub trait Linear: Device<f32> {
    /// The layer's output, [tokens, outputs], for `x` of [tokens, inputs].
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn linear<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Weight<Self>,
        input_gradient: InputGradient,
    ) -> Result<Matrix<Self, T>, Self::Err>;

    /// Takes the gradient of a weight, row-major, out of the gradients; `None` for a frozen one.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn take_gradient(
        gradients: &mut Gradients<f32, Self>,
        weight: &Weight<Self>,
    ) -> Result<Option<Vec<f32>>, Self::Err>;
}

impl Linear for Cpu {
    fn linear<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Weight<Self>,
        input_gradient: InputGradient,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let (tokens, inputs) = *x.shape();
        let (outputs, _) = weight.dims;
        let x_values = cpu::values(&x);

        let mut y = vec![0.0; tokens * outputs];
        let mut beta = 0.0;
        if let Some(bias) = &weight.bias {
            let bias = cpu::values(bias);
            y.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(&bias));
            beta = 1.0;
        }
        let (x_view, w_view) =
            (View::new(&x_values, tokens, inputs), View::new(&weight.values, outputs, inputs));
        gemm(&mut y, outputs, beta, 1.0, x_view, w_view.t(), Threads::All);
        let y = x.device().try_tensor_from_vec(y, (tokens, outputs))?;

        let (output, weight) = (y.clone(), weight.clone());
        tape.add_backward_op(move |gradients| {
            let g = cpu::take(gradients, &output)?;
            let g_view = View::new(&g, tokens, outputs);
            let x_view = View::new(&x_values, tokens, inputs);
            let w_view = View::new(&weight.values, outputs, inputs);
            if let Some(tensor) = &weight.traced {
                let gw = gradients.get_or_alloc_mut(tensor)?;
                gemm(gw, inputs, 1.0, 1.0, g_view.t(), x_view, Threads::All);
            }
            if let Some(bias) = &weight.bias {
                let gb = gradients.get_or_alloc_mut(bias)?;
                for row in g.chunks_exact(outputs) {
                    gb.iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
                }
            }
            if input_gradient == InputGradient::Wanted {
                let gx = gradients.get_or_alloc_mut(&x)?;
                gemm(gx, inputs, 1.0, 1.0, g_view, w_view, Threads::All);
            }
            Ok(())
        });
        Ok(y.put_tape(tape))
    }

    fn take_gradient(
        gradients: &mut Gradients<f32, Self>,
        weight: &Weight<Self>,
    ) -> Result<Option<Vec<f32>>, CpuError> {
        weight.traced.as_ref().map(|tensor| cpu::take(gradients, tensor)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check_gradient, noise, weighted_sum};
    use dfdx::{
        tensor::{AsArray, Trace},
        tensor_ops::Backward,
    };

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let device = Cpu::default();
        for bias in [None, Some(noise(4, 3))] {
            let weight = Weight::frozen(&device, noise(20, 1), (4, 5), bias).unwrap();
            check_gradient((3, 5), |x| Cpu::linear(x, &weight, InputGradient::Wanted));

            let x = noise(15, 2);
            let loss = |w: Vec<f32>| {
                let weight = weight.with_values(w).traced().unwrap();
                let x = device.tensor_from_vec(x.clone(), (3, 5)).leaky_trace();
                let y = Cpu::linear(x, &weight, InputGradient::Skipped).unwrap();
                (weighted_sum(y), weight)
            };
            let (sum, traced) = loss(weight.values().to_vec());
            let gradient = Cpu::take_gradient(&mut sum.backward(), &traced).unwrap().unwrap();
            for (i, gradient) in gradient.iter().enumerate() {
                let shifted = |h: f32| {
                    let mut w = weight.values().to_vec();
                    w[i] += h;
                    loss(w).0.split_tape().0.array()
                };
                let slope = (shifted(0.01) - shifted(-0.01)) / 0.02;
                assert!((slope - gradient).abs() < 1e-2, "{slope} {gradient}");
            }
        }
    }
}
