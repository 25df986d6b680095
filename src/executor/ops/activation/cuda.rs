//! Activations on a GPU.

use dfdx::tensor::Cuda;

use crate::{
    executor::ops::{
        Activate, Matrix,
        gpu::{Grid, Numbers, Result, Slice, kernels},
    },
    family::Activation,
};

kernels! {
    functions "// Activations, in the order of the enumeration.
__device__ void activation(int kind, float x, float *value, float *slope) {
    if (kind == 0) {
        float s = 1.0f / (1.0f + expf(-x));
        *value = x * s;
        *slope = s * (1.0f + x * (1.0f - s));
    } else if (kind == 1) {
        float below = 0.5f * (1.0f + erff(x * 0.70710678f));
        *value = x * below;
        *slope = below + x * 0.39894228f * expf(-0.5f * x * x);
    } else if (kind == 2) {
        float t = tanhf(0.7978846f * (x + 0.044715f * x * x * x));
        *value = 0.5f * x * (1.0f + t);
        *slope = 0.5f * (1.0f + t)
            + 0.5f * x * (1.0f - t * t) * 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
    } else if (kind == 3) {
        *value = x > 0.0f ? x : 0.0f;
        *slope = x > 0.0f ? 1.0f : 0.0f;
    } else if (kind == 4) {
        float s = 1.0f / (1.0f + expf(-1.702f * x));
        *value = x * s;
        *slope = s * (1.0f + 1.702f * x * (1.0f - s));
    } else {
        float above = x > 0.0f ? x : 0.0f;
        *value = above * above;
        *slope = 2.0f * above;
    }
}
";

    fn activate(n: usize, kind: i32, x: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    float slope;
    if (i < n) activation(kind, x[i], &y[i], &slope);
"

    /// The gradient is replaced.
    fn activate_backward(n: usize, kind: i32, x: &Slice, g: &mut Slice) "
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, x[i], &value, &slope);
    g[i] *= slope;
"
}

impl Activate for Cuda {
    fn activate_forward(x: &Matrix<Self>, activation: Activation) -> Result<Numbers> {
        let (gpu, count) = (x.gpu(), x.count());
        let mut y = gpu.stale(count)?;
        activate(gpu, Grid::each(count), count, activation as i32, &x.values, &mut y)?;
        Ok(y)
    }

    fn activate_backward(
        x: &Matrix<Self>,
        activation: Activation,
        mut g: Numbers,
    ) -> Result<Numbers> {
        let (gpu, count) = (x.gpu(), x.count());
        activate_backward(gpu, Grid::each(count), count, activation as i32, &x.values, &mut g)?;
        Ok(g)
    }
}
