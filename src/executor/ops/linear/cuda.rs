//! Linear layers on a GPU: products by cuBLAS.

use std::sync::Arc;

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Linear, Matrix, Weight,
    gpu::{Factor, Gpu, Grid, Numbers, Place, Result, Slice, kernels},
    matrix::cuda::check,
};

kernels! {
    /// Every row becomes the bias.
    fn rows_of(n: usize, width: usize, bias: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = bias[i % width];
"
}

impl Linear for Cuda {
    /// [outputs, inputs].
    type Factor = Arc<Numbers>;

    fn factor(&self, values: &[f32], dims: (usize, usize)) -> Result<Arc<Numbers>> {
        check(values, dims)?;
        Ok(Arc::new(Gpu::of(self)?.numbers(values)?))
    }

    fn linear_forward(
        x: &Matrix<Self>,
        factor: &Arc<Numbers>,
        weight: &Weight<Self>,
    ) -> Result<Numbers> {
        let (gpu, (tokens, inputs), outputs) = (x.gpu(), x.shape(), weight.outputs());
        let count = tokens * outputs;
        let mut y = gpu.stale(count)?;
        if let Some(bias) = &weight.bias {
            rows_of(gpu, Grid::each(count), count, outputs, &bias.values, &mut y)?;
        }
        let keep = if weight.bias.is_some() { 1.0 } else { 0.0 };
        gpu.product(
            (tokens, outputs, inputs),
            (1.0, keep),
            Factor::whole(&x.values, inputs),
            Factor::whole(factor, inputs).transposed(),
            (&mut y, Place::rows(outputs, 0)),
            1,
        )?;
        Ok(y)
    }

    fn linear_backward(
        g: &Matrix<Self>,
        factor: &Arc<Numbers>,
        weight: &Weight<Self>,
    ) -> Result<Numbers> {
        let (gpu, (tokens, outputs), inputs) = (g.gpu(), g.shape(), weight.inputs());
        let mut gx = gpu.stale(tokens * inputs)?;
        gpu.product(
            (tokens, inputs, outputs),
            (1.0, 0.0),
            Factor::whole(&g.values, outputs),
            Factor::whole(factor, inputs),
            (&mut gx, Place::rows(inputs, 0)),
            1,
        )?;
        Ok(gx)
    }
}
