//! Cross-entropy on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    CrossEntropy, Matrix,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    functions "// The largest logit of a row and Σ exp(z − largest).
__device__ float2 partition(index_t width, const float *z) {
    float largest = LOWEST, sum = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) largest = fmaxf(largest, z[i]);
    largest = block_max(largest);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) sum += expf(z[i] - largest);
    return make_float2(largest, block_sum(sum));
}
";

    /// log Σ exp(z) − z_target of each row.
    fn cross_entropy(width: usize, logits: &Slice, targets: &Slice<u32>, losses: &mut Slice) "
    logits += blockIdx.x * width;
    float2 p = partition(width, logits);
    if (threadIdx.x == 0) losses[blockIdx.x] = p.x - logits[targets[blockIdx.x]] + logf(p.y);
"

    fn cross_entropy_backward(
        width: usize, scale: f32, logits: &Slice, targets: &Slice<u32>, g: &mut Slice
    ) "
    logits += blockIdx.x * width;
    g += blockIdx.x * width;
    float2 p = partition(width, logits);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        g[i] = scale * (expf(logits[i] - p.x) / p.y - (i == targets[blockIdx.x] ? 1.0f : 0.0f));
"
}

impl CrossEntropy for Cuda {
    fn cross_entropy_forward(logits: &Matrix<Self>, targets: &[u32]) -> Result<Vec<f64>> {
        let (gpu, (rows, width)) = (logits.gpu(), logits.shape());
        let (targets, mut losses) = (gpu.upload(targets)?, gpu.stale(rows)?);
        cross_entropy(gpu, Grid::rows(rows, 1), width, &logits.values, &targets, &mut losses)?;
        Ok(gpu.download(&losses)?.into_iter().map(f64::from).collect())
    }

    fn cross_entropy_backward(
        logits: &Matrix<Self>,
        targets: &[u32],
        scale: f32,
    ) -> Result<Numbers> {
        let (gpu, (rows, width), grid) =
            (logits.gpu(), logits.shape(), Grid::rows(logits.shape().0, 1));
        let (targets, mut g) = (gpu.upload(targets)?, gpu.stale(rows * width)?);
        cross_entropy_backward(gpu, grid, width, scale, &logits.values, &targets, &mut g)?;
        Ok(g)
    }
}
