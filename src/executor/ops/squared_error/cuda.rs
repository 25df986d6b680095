//! The block's output error on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, SquaredError,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    /// Σ (y − t)² of each row.
    fn squared_error(width: usize, y: &Slice, t: &Slice, sums: &mut Slice) "
    y += blockIdx.x * width;
    t += blockIdx.x * width;
    float sum = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) sum += (y[i] - t[i]) * (y[i] - t[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
"

    fn squared_error_backward(
        n: usize, width: usize, scales: &Slice, y: &Slice, t: &Slice, g: &mut Slice
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
