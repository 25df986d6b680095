//! Gated activations on a GPU.

use dfdx::tensor::Cuda;

use crate::{
    executor::ops::{
        Gated, Matrix,
        gpu::{Grid, Numbers, Result, Slice, kernels},
    },
    family::Activation,
};

kernels! {
    fn gated(n: usize, kind: i32, gate: &Slice, up: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, gate[i], &value, &slope);
    y[i] = value * up[i];
"

    /// The gradient of the output becomes that of the gate.
    fn gated_backward(
        n: usize, kind: i32, gate: &Slice, up: &Slice, g: &mut Slice, g_up: &mut Slice
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
