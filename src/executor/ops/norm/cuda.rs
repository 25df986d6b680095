//! Normalisation on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, Norm, Normalise,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    functions "// The mean, if it counts, and the reciprocal of the deviation.
__device__ float2 moments(index_t width, int centred, float epsilon, const float *x) {
    float mean = 0.0f, square = 0.0f;
    if (centred) {
        for (index_t i = threadIdx.x; i < width; i += blockDim.x) mean += x[i];
        mean = block_sum(mean) / width;
    }
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) square += (x[i] - mean) * (x[i] - mean);
    return make_float2(mean, 1.0f / sqrtf(block_sum(square) / width + epsilon));
}
";

    fn normalise(
        width: usize, centred: i32, epsilon: f32, weight: &Slice, biased: i32, bias: &Slice,
        x: &Slice, y: &mut Slice
    ) "
    x += blockIdx.x * width;
    y += blockIdx.x * width;
    float2 m = moments(width, centred, epsilon, x);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) {
        float normal = weight[i] * ((x[i] - m.x) * m.y);
        y[i] = biased ? normal + bias[i] : normal;
    }
"

    /// The gradient is replaced.
    fn normalise_backward(
        width: usize, centred: i32, epsilon: f32, weight: &Slice, x: &Slice, g: &mut Slice
    ) "
    x += blockIdx.x * width;
    g += blockIdx.x * width;
    float2 m = moments(width, centred, epsilon, x);
    float mean = 0.0f, along = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) {
        float h = g[i] * weight[i];
        mean += h;
        along += h * (x[i] - m.x) * m.y;
    }
    mean = centred ? block_sum(mean) / width : 0.0f;
    along = block_sum(along) / width;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        g[i] = (g[i] * weight[i] - mean - (x[i] - m.x) * m.y * along) * m.y;
"
}

impl Normalise for Cuda {
    fn normalise_forward(x: &Matrix<Self>, norm: &Norm<Self>) -> Result<Numbers> {
        let (gpu, width, centred) = (x.gpu(), norm.weight.shape().1, i32::from(norm.centred));
        let grid = Grid::rows(x.count() / width, 1);
        // Without a bias, any address will do.
        let bias = &norm.bias.as_ref().unwrap_or(&norm.weight).values;
        let (weight, biased) = (&norm.weight.values, i32::from(norm.bias.is_some()));
        let mut y = gpu.stale(x.count())?;
        let epsilon = norm.epsilon;
        normalise(gpu, grid, width, centred, epsilon, weight, biased, bias, &x.values, &mut y)?;
        Ok(y)
    }

    fn normalise_backward(x: &Matrix<Self>, norm: &Norm<Self>, mut g: Numbers) -> Result<Numbers> {
        let (width, centred) = (norm.weight.shape().1, i32::from(norm.centred));
        let grid = Grid::rows(x.count() / width, 1);
        let weight = &norm.weight.values;
        normalise_backward(x.gpu(), grid, width, centred, norm.epsilon, weight, &x.values, &mut g)?;
        Ok(g)
    }
}
