//! Some columns of a matrix on a GPU.

use std::ops::Range;

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Columns, Matrix,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    /// `part` columns of each row, from `start` on.
    fn columns(n: usize, width: usize, part: usize, start: usize, x: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[i] = x[i / part * width + start + i % part];
"

    fn columns_backward(
        n: usize, width: usize, part: usize, start: usize, g: &Slice, gx: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i < n) gx[i / part * width + start + i % part] = g[i];
"

    /// Rows of `first` numbers of `a`, each with as many of `b` behind it as fill `width`; `groups`
    /// rows in succession share a row of `b`.
    fn join(
        n: usize, width: usize, first: usize, groups: usize, a: &Slice, b: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i >= n) return;
    index_t row = i / width, column = i % width;
    y[i] = column < first ? a[row * first + column]
                          : b[row / groups * (width - first) + column - first];
"
}

impl Columns for Cuda {
    fn columns_forward(x: &Matrix<Self>, range: Range<usize>) -> Result<Numbers> {
        let ((rows, width), gpu) = (x.shape(), x.gpu());
        let (count, part, start) = (rows * range.len(), range.len(), range.start);
        let mut y = gpu.stale(count)?;
        columns(gpu, Grid::each(count), count, width, part, start, &x.values, &mut y)?;
        Ok(y)
    }

    fn columns_backward(
        (rows, width): (usize, usize),
        range: Range<usize>,
        g: Numbers,
    ) -> Result<Numbers> {
        let (count, part, start) = (rows * range.len(), range.len(), range.start);
        let mut gx = g.gpu.zeros(rows * width)?;
        columns_backward(&g.gpu, Grid::each(count), count, width, part, start, &g, &mut gx)?;
        Ok(gx)
    }

    fn join_forward(a: &Matrix<Self>, b: &Matrix<Self>, groups: usize) -> Result<Numbers> {
        let (gpu, first, (tokens, second)) = (a.gpu(), a.shape().1 / groups, b.shape());
        let width = first + second;
        let count = tokens * groups * width;
        let mut y = gpu.stale(count)?;
        join(gpu, Grid::each(count), count, width, first, groups, &a.values, &b.values, &mut y)?;
        Ok(y)
    }
}
