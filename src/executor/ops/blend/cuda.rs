//! The blend of two matrices on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Blend, Matrix,
    gpu::{Grid, Result, Slice, kernels},
};

kernels! {
    fn blend(n: usize, a: &Slice, b: &Slice, t: f32, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = (1.0f - t) * a[i] + t * b[i];
"

    fn difference(n: usize, a: &Slice, b: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = b[i] - a[i];
"
}

impl Blend for Cuda {
    fn blend(a: &Matrix<Self>, b: &Matrix<Self>, t: f32) -> Result<Matrix<Self>> {
        let (gpu, count) = (a.gpu(), a.count());
        let mut y = gpu.stale(count)?;
        blend(gpu, Grid::each(count), count, &a.values, &b.values, t, &mut y)?;
        a.beside(y, a.shape())
    }

    fn difference(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Matrix<Self>> {
        let (gpu, count) = (a.gpu(), a.count());
        let mut y = gpu.stale(count)?;
        difference(gpu, Grid::each(count), count, &a.values, &b.values, &mut y)?;
        a.beside(y, a.shape())
    }
}
