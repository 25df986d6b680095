//! Gated activations on a GPU.

use cudarc::driver::CudaSlice;
use dfdx::tensor::Cuda;

use crate::{
    executor::ops::{
        Gated, Matrix,
        gpu::{Grid, Numbers, Result, kernels},
    },
    family::Activation,
};

kernels! {
    fn gated(
        n: usize, kind: i32, gate: &CudaSlice<f32>, up: &CudaSlice<f32>, y: &mut CudaSlice<f32>
    ) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, gate[i], &value, &slope);
    y[i] = value * up[i];
"

    /// The gradient of the output becomes that of the gate.
    fn gated_backward(
        n: usize, kind: i32, gate: &CudaSlice<f32>, up: &CudaSlice<f32>, g: &mut CudaSlice<f32>,
        g_up: &mut CudaSlice<f32>
    ) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, gate[i], &value, &slope);
    g_up[i] = g[i] * value;
    g[i] *= up[i] * slope;
"
}

impl Gated for Cuda {
    fn gated_forward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
    ) -> Result<Numbers> {
        let (gpu, count, kind) = (gate.gpu(), gate.count(), activation as i32);
        let mut y = gpu.stale(count)?;
        gated(gpu, Grid::each(count), count, kind, &gate.values, &up.values, &mut y)?;
        Ok(y)
    }

    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        activation: Activation,
        mut g: Numbers,
    ) -> Result<[Numbers; 2]> {
        let (gpu, count, kind) = (gate.gpu(), gate.count(), activation as i32);
        let (grid, mut g_up) = (Grid::each(count), gpu.stale(count)?);
        gated_backward(gpu, grid, count, kind, &gate.values, &up.values, &mut g, &mut g_up)?;
        Ok([g, g_up])
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        executor::ops::{
            Gated,
            testing::{assert_agrees, outcome},
        },
        family::Activation,
    };

    #[test]
    fn the_gpu_agrees() {
        for activation in Activation::ALL {
            assert_agrees!(|device: D| {
                outcome(device, [(3, 400); 2], |[gate, up]| D::gated(gate, up, activation))
            });
        }
    }
}
