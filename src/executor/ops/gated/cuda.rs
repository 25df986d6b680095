//! Gated activations on a GPU.

use dfdx::tensor::Cuda;

use crate::{
    executor::ops::{
        Gated, Matrix,
        gpu::{Grid, Numbers, Result, Slice, kernels},
    },
    family::Gating,
};

kernels! {
    fn gated(
        n: usize, kind: i32, limit: f32, offset: f32, gate: &Slice, up: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    float a = gate[i], b = up[i];
    activation(kind, a > limit ? limit : a, &value, &slope);
    y[i] = value * ((b > limit ? limit : b < -limit ? -limit : b) + offset);
"

    /// The gradient of the output becomes that of the gate.
    fn gated_backward(
        n: usize, kind: i32, limit: f32, offset: f32, gate: &Slice, up: &Slice, g: &mut Slice,
        g_up: &mut Slice
    ) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    float a = gate[i], b = up[i];
    activation(kind, a > limit ? limit : a, &value, &slope);
    g_up[i] = fabsf(b) <= limit ? g[i] * value : 0.0f;
    float limited = b > limit ? limit : b < -limit ? -limit : b;
    g[i] *= a > limit ? 0.0f : (limited + offset) * slope;
"
}

/// The gating as the kernels take it: number of the function, limit, offset.
fn numbers(gating: Gating) -> (i32, f32, f32) {
    (gating.activation as i32, gating.limit.unwrap_or(f32::INFINITY), gating.offset)
}

impl Gated for Cuda {
    fn gated_forward(gate: &Matrix<Self>, up: &Matrix<Self>, gating: Gating) -> Result<Numbers> {
        let (gpu, count) = (gate.gpu(), gate.count());
        let (kind, limit, offset) = numbers(gating);
        let (grid, mut y) = (Grid::each(count), gpu.stale(count)?);
        gated(gpu, grid, count, kind, limit, offset, &gate.values, &up.values, &mut y)?;
        Ok(y)
    }

    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        gating: Gating,
        mut g: Numbers,
    ) -> Result<[Numbers; 2]> {
        let (gpu, count) = (gate.gpu(), gate.count());
        let (kind, limit, offset) = numbers(gating);
        let (grid, mut g_up) = (Grid::each(count), gpu.stale(count)?);
        let (gate, up) = (&gate.values, &up.values);
        gated_backward(gpu, grid, count, kind, limit, offset, gate, up, &mut g, &mut g_up)?;
        Ok([g, g_up])
    }
}
