//! Sums over samples on a GPU.

use std::ops::Range;

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, Sums, Trace,
    gpu::{Factor, Gpu, Grid, Numbers, Place, Result, Slice, kernels},
    matrix::cuda::add_to,
};

kernels! {
    fn accumulate_square(n: usize, x: &Slice, sum: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) sum[i] += x[i] * x[i];
"
}

/// C = `keep` C + Aᵀ B, over some rows of both.
fn add_transposed_product(
    sum: &mut Slice,
    keep: f32,
    a: &Matrix<Cuda>,
    b: &Matrix<Cuda>,
    rows: &Range<usize>,
) -> Result<()> {
    let ((_, a_width), (_, b_width)) = (a.shape(), b.shape());
    a.gpu().product(
        (a_width, b_width, rows.len()),
        (1.0, keep),
        Factor::new(&a.values, Place::rows(a_width, rows.start)).transposed(),
        Factor::new(&b.values, Place::rows(b_width, rows.start)),
        (sum, Place::rows(b_width, 0)),
        1,
    )
}

impl Sums for Cuda {
    type Sum = Numbers;

    fn nothing(&self, rows: usize, columns: usize) -> Result<Numbers> {
        Gpu::of(self)?.zeros(rows * columns)
    }

    fn add_sum(sum: &mut Numbers, other: Numbers) -> Result<()> {
        add_to(sum, &other)
    }

    fn sums(sum: Numbers) -> Result<Vec<f32>> {
        sum.gpu.download(&sum)
    }

    fn add_squared_gradients(
        layers: &mut [(&mut Numbers, Trace<Self>)],
        samples: &[Range<usize>],
    ) -> Result<()> {
        for (sum, Trace { input, gradient, .. }) in layers {
            let (gpu, count) = (input.gpu(), input.shape().1 * gradient.shape().1);
            let mut product = gpu.stale(count)?;
            for sample in samples {
                add_transposed_product(&mut product, 0.0, gradient, input, sample)?;
                accumulate_square(gpu, Grid::each(count), count, &product, sum)?;
            }
        }
        Ok(())
    }

    fn add_gram(sum: &mut Numbers, x: &Matrix<Self>) -> Result<()> {
        add_transposed_product(sum, 1.0, x, x, &(0..x.shape().0))
    }

    fn add_product(sum: &mut Numbers, a: &Matrix<Self>, b: &Matrix<Self>) -> Result<()> {
        add_transposed_product(sum, 1.0, a, b, &(0..a.shape().0))
    }
}
