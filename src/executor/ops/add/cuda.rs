//! The sum of two matrices on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Add, Matrix,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    fn add(n: usize, a: &Slice, b: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = a[i] + b[i];
"
}

impl Add for Cuda {
    fn add_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Numbers> {
        let (gpu, count) = (a.gpu(), a.count());
        let mut y = gpu.stale(count)?;
        add(gpu, Grid::each(count), count, &a.values, &b.values, &mut y)?;
        Ok(y)
    }
}
