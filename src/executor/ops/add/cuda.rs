//! The sum of two matrices on a GPU.

use cudarc::driver::CudaSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Add, Matrix,
    gpu::{Grid, Numbers, Result, kernels},
};

kernels! {
    fn add(n: usize, a: &CudaSlice<f32>, b: &CudaSlice<f32>, y: &mut CudaSlice<f32>) "
    index_t i = ELEMENT;
    if (i < n) y[i] = a[i] + b[i];
"
}

impl Add for Cuda {
    fn add_forward(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Numbers> {
        let (gpu, count) = (a.gpu(), a.count());
        let mut y = gpu.stale(count)?;
        add(gpu, Grid::each(count), count, &a.values, &b.values, &mut y)?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::Merge;

    use crate::executor::ops::{
        Add,
        testing::{assert_agrees, outcome},
    };

    #[test]
    fn the_gpu_agrees() {
        assert_agrees!(|device: D| outcome(device, [(3, 7), (3, 7)], |[a, b]| {
            let ((a, tape), (b, other)) = (a.split_tape(), b.split_tape());
            D::add(a.put_tape(tape.merge(other)), b)
        }));
    }
}
