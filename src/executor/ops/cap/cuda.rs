//! The soft cap on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Cap, Matrix,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    fn cap(n: usize, x: &Slice, cap: f32, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = cap * tanhf(x[i] / cap);
"

    fn cap_backward(n: usize, y: &Slice, cap: f32, g: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) g[i] *= 1.0f - (y[i] / cap) * (y[i] / cap);
"
}

impl Cap for Cuda {
    fn cap_forward(x: &Matrix<Self>, c: f32) -> Result<Numbers> {
        let (gpu, count) = (x.gpu(), x.count());
        let mut y = gpu.stale(count)?;
        cap(gpu, Grid::each(count), count, &x.values, c, &mut y)?;
        Ok(y)
    }

    fn cap_backward(y: &Matrix<Self>, c: f32, mut g: Numbers) -> Result<Numbers> {
        let (gpu, count) = (y.gpu(), y.count());
        cap_backward(gpu, Grid::each(count), count, &y.values, c, &mut g)?;
        Ok(g)
    }
}
