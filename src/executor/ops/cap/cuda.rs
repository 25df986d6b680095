//! The soft cap on a GPU.

use cudarc::driver::CudaSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Cap, Matrix,
    gpu::{Grid, Result, kernels},
};

kernels! {
    fn cap(n: usize, x: &CudaSlice<f32>, cap: f32, y: &mut CudaSlice<f32>) "
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

#[cfg(test)]
mod tests {
    use crate::executor::ops::{
        Cap, Hold,
        testing::{assert_agrees, noise},
    };

    #[test]
    fn the_gpu_agrees() {
        assert_agrees!(|device: D| {
            let x = device.hold(noise(12, 1), (3, 4)).unwrap();
            vec![D::cap(&x, 0.5).unwrap().on_host().unwrap()]
        });
    }
}
