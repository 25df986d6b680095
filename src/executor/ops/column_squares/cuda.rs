//! The sums of squares of columns on a GPU.

use std::ops::Range;

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    ColumnSquares, Matrix,
    gpu::{Grid, Result, Slice, kernels},
};

kernels! {
    /// Σ x² of 32 columns of x over a range of rows, by 8 threads a column.
    fn column_squares(width: usize, ranges: &Slice<u64>, x: &Slice, sums: &mut Slice) "
    __shared__ float lanes[8][33];
    index_t column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (index_t row = ranges[2 * blockIdx.y] + threadIdx.y; row < ranges[2 * blockIdx.y + 1]; row += 8)
            sum += x[row * width + column] * x[row * width + column];
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= width) return;
    for (int lane = 1; lane < 8; lane++) sum += lanes[lane][threadIdx.x];
    sums[blockIdx.y * width + column] = sum;
"
}

impl ColumnSquares for Cuda {
    fn column_squares(x: &Matrix<Self>, rows: &[Range<usize>]) -> Result<Vec<Vec<f32>>> {
        let (gpu, width) = (x.gpu(), x.shape().1);
        let ranges: Vec<u64> =
            rows.iter().flat_map(|rows| [rows.start as u64, rows.end as u64]).collect();
        let (ranges, mut sums) = (gpu.upload(&ranges)?, gpu.stale(rows.len() * width)?);
        let blocks = (width.div_ceil(32) as u32, rows.len() as u32);
        let grid = Grid { blocks, threads: (32, 8) };
        column_squares(gpu, grid, width, &ranges, &x.values, &mut sums)?;
        let sums = gpu.download(&sums)?;
        Ok(sums.chunks(width.max(1)).map(<[f32]>::to_vec).collect())
    }
}
