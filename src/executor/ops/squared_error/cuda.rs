//! The block's output error on a GPU.

use cudarc::driver::CudaSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, SquaredError,
    gpu::{Grid, Numbers, Result, kernels},
};

kernels! {
    /// Σ (y − t)² of each row.
    fn squared_error(
        width: usize, y: &CudaSlice<f32>, t: &CudaSlice<f32>, sums: &mut CudaSlice<f32>
    ) "
    y += blockIdx.x * width;
    t += blockIdx.x * width;
    float sum = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) sum += (y[i] - t[i]) * (y[i] - t[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
"

    fn squared_error_backward(
        n: usize, width: usize, scales: &CudaSlice<f32>, y: &CudaSlice<f32>, t: &CudaSlice<f32>,
        g: &mut CudaSlice<f32>
    ) "
    index_t i = ELEMENT;
    if (i < n) g[i] = scales[i / width] * (y[i] - t[i]);
"
}

impl SquaredError for Cuda {
    fn squared_error_forward(y: &Matrix<Self>, t: &Matrix<Self>) -> Result<Vec<f64>> {
        let (gpu, (rows, width)) = (y.gpu(), y.shape());
        let mut sums = gpu.stale(rows)?;
        squared_error(gpu, Grid::rows(rows, 1), width, &y.values, &t.values, &mut sums)?;
        Ok(gpu.download(&sums)?.into_iter().map(f64::from).collect())
    }

    fn squared_error_backward(
        y: &Matrix<Self>,
        t: &Matrix<Self>,
        scales: &[f32],
    ) -> Result<Numbers> {
        let (gpu, count, width) = (y.gpu(), y.count(), y.shape().1);
        let (grid, scales, mut g) = (Grid::each(count), gpu.upload(scales)?, gpu.stale(count)?);
        squared_error_backward(gpu, grid, count, width, &scales, &y.values, &t.values, &mut g)?;
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use crate::executor::ops::{
        Hold, SquaredError,
        testing::{assert_agrees, gradient, noise, traced},
    };

    #[test]
    fn the_gpu_agrees() {
        assert_agrees!(|device: D| {
            let [y, t] = [1, 2].map(|seed| device.hold(noise(5 * 300, seed), (5, 300)).unwrap());
            let loss = D::squared_error(traced(y.clone()), &t, &[0..2, 2..5]).unwrap();
            vec![loss.as_vec(), gradient(loss, &y)]
        });
    }
}
