//! The divergence of predictions on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Divergence, Matrix,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    /// KL(softmax(t) ‖ softmax(z)) of each row.
    fn divergence(width: usize, logits: &Slice, targets: &Slice, losses: &mut Slice) "
    logits += blockIdx.x * width;
    targets += blockIdx.x * width;
    float2 z = partition(width, logits), t = partition(width, targets);
    float apart = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        apart += expf(targets[i] - t.x) * ((targets[i] - t.x) - (logits[i] - z.x));
    apart = block_sum(apart);
    if (threadIdx.x == 0) losses[blockIdx.x] = apart / t.y + logf(z.y) - logf(t.y);
"

    fn divergence_backward(
        width: usize, scale: f32, logits: &Slice, targets: &Slice, g: &mut Slice
    ) "
    logits += blockIdx.x * width;
    targets += blockIdx.x * width;
    g += blockIdx.x * width;
    float2 z = partition(width, logits), t = partition(width, targets);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        g[i] = scale * (expf(logits[i] - z.x) / z.y - expf(targets[i] - t.x) / t.y);
"
}

impl Divergence for Cuda {
    fn divergence_forward(logits: &Matrix<Self>, targets: &Matrix<Self>) -> Result<Vec<f64>> {
        let (gpu, (rows, width)) = (logits.gpu(), logits.shape());
        let mut losses = gpu.stale(rows)?;
        let grid = Grid::rows(rows, 1);
        divergence(gpu, grid, width, &logits.values, &targets.values, &mut losses)?;
        Ok(gpu.download(&losses)?.into_iter().map(f64::from).collect())
    }

    fn divergence_backward(
        logits: &Matrix<Self>,
        targets: &Matrix<Self>,
        scale: f32,
    ) -> Result<Numbers> {
        let (gpu, (rows, width)) = (logits.gpu(), logits.shape());
        let (grid, mut g) = (Grid::rows(rows, 1), gpu.stale(rows * width)?);
        divergence_backward(gpu, grid, width, scale, &logits.values, &targets.values, &mut g)?;
        Ok(g)
    }
}
