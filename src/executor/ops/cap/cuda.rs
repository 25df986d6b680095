//! The soft cap on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Cap, Matrix,
    gpu::{Grid, Result, Slice, kernels},
};

kernels! {
    fn cap(n: usize, x: &Slice, cap: f32, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = cap * tanhf(x[i] / cap);
"
}

impl Cap for Cuda {
    fn cap(x: &Matrix<Self>, c: f32) -> Result<Matrix<Self>> {
        let (gpu, count) = (x.gpu(), x.count());
        let mut y = gpu.stale(count)?;
        cap(gpu, Grid::each(count), count, &x.values, c, &mut y)?;
        x.beside(y, x.shape())
    }
}
