//! The blend of two matrices on a GPU.

use cudarc::driver::CudaSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Blend, Matrix,
    gpu::{Grid, Result, kernels},
};

kernels! {
    fn blend(n: usize, a: &CudaSlice<f32>, b: &CudaSlice<f32>, t: f32, y: &mut CudaSlice<f32>) "
    index_t i = ELEMENT;
    if (i < n) y[i] = (1.0f - t) * a[i] + t * b[i];
"

    fn difference(n: usize, a: &CudaSlice<f32>, b: &CudaSlice<f32>, y: &mut CudaSlice<f32>) "
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

#[cfg(test)]
mod tests {
    use crate::executor::ops::{
        Blend, Hold,
        testing::{assert_agrees, noise},
    };

    #[test]
    fn the_gpu_agrees() {
        assert_agrees!(|device: D| {
            let [a, b] = [1, 3].map(|seed| device.hold(noise(50 * 33, seed), (50, 33)).unwrap());
            [D::blend(&a, &b, 0.3), D::difference(&a, &b)]
                .map(|y| y.unwrap().on_host().unwrap())
                .to_vec()
        });
    }
}
