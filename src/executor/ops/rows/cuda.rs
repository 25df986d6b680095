//! Rows of matrices on a GPU.

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Rows,
    gpu::{Gpu, Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    fn gather_rows(
        n: usize, width: usize, rows: &Slice<u64>, scale: &Slice, x: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i < n) y[i] = scale[i / width] * x[rows[i / width] * width + i % width];
"

    fn scatter_rows(
        n: usize, width: usize, rows: &Slice<u64>, scale: &Slice, x: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i < n) y[rows[i / width] * width + i % width] += scale[i / width] * x[i];
"

    /// A thread for each row.
    fn multiply_rows(
        n: usize, width: usize, rows: &Slice<u64>, a: &Slice, b: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i >= n) return;
    float sum = 0.0f;
    for (index_t j = 0; j < width; j++) sum += a[i * width + j] * b[rows[i] * width + j];
    y[i] = sum;
"
}

/// The indices of rows, on the GPU.
fn places(gpu: &Gpu, rows: &[usize]) -> Result<Slice<u64>> {
    gpu.upload(&rows.iter().map(|row| *row as u64).collect::<Vec<_>>())
}

/// The scale of each of some rows, on the GPU.
fn scales(gpu: &Gpu, rows: usize, scale: Option<&[f32]>) -> Result<Slice> {
    match scale {
        Some(scale) => gpu.upload(scale),
        None => gpu.upload(&vec![1.0; rows]),
    }
}

impl Rows for Cuda {
    fn gather(x: &Numbers, width: usize, rows: &[usize], scale: Option<&[f32]>) -> Result<Numbers> {
        let (gpu, count) = (&x.gpu, rows.len() * width);
        let (places, scale) = (places(gpu, rows)?, scales(gpu, rows.len(), scale)?);
        let mut y = gpu.stale(count)?;
        gather_rows(gpu, Grid::each(count), count, width, &places, &scale, x, &mut y)?;
        Ok(y)
    }

    fn scatter(
        y: &mut Numbers,
        width: usize,
        rows: &[usize],
        scale: Option<&[f32]>,
        x: &Numbers,
    ) -> Result<()> {
        let (gpu, count) = (x.gpu.clone(), rows.len() * width);
        let (places, scale) = (places(&gpu, rows)?, scales(&gpu, rows.len(), scale)?);
        scatter_rows(&gpu, Grid::each(count), count, width, &places, &scale, x, y)
    }

    fn row_products(a: &Numbers, b: &Numbers, width: usize, rows: &[usize]) -> Result<Vec<f32>> {
        let (gpu, count) = (&a.gpu, rows.len());
        let (places, mut y) = (places(gpu, rows)?, gpu.stale(count)?);
        multiply_rows(gpu, Grid::each(count), count, width, &places, a, b, &mut y)?;
        gpu.download(&y)
    }
}
