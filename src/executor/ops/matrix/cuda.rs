//! Matrices on a GPU, and their gradients.

use std::sync::Arc;

use cudarc::driver::DeviceSlice;
use dfdx::tensor::{CpuError, Cuda, Gradients, Tensor};

use crate::executor::ops::{
    Hold, Matrix, Name,
    gpu::{Gpu, Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    fn accumulate(n: usize, x: &Slice, sum: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) sum[i] += x[i];
"

    /// Index of the first number that is not finite; n if there is none.
    fn first_not_finite(n: usize, x: &Slice, place: &mut Slice<u64>) "
    index_t i = ELEMENT;
    if (i < n && !isfinite(x[i])) atomicMin(place, i);
"
}

impl<T> Matrix<Cuda, T> {
    pub(in crate::executor::ops) fn gpu(&self) -> &Arc<Gpu> {
        &self.values.gpu
    }

    /// The number of values.
    pub(in crate::executor::ops) fn count(&self) -> usize {
        self.values.len()
    }
}

/// Adds `other` to `sum`, which has as many values.
pub(in crate::executor::ops) fn add_to(sum: &mut Slice, other: &Numbers) -> Result<()> {
    let count = other.len();
    accumulate(&other.gpu, Grid::each(count), count, other, sum)
}

/// Checks that there are as many values as a matrix has.
pub(in crate::executor::ops) fn check(values: &[f32], shape: (usize, usize)) -> Result<()> {
    if values.len() == shape.0 * shape.1 { Ok(()) } else { Err(CpuError::WrongNumElements.into()) }
}

impl Hold for Cuda {
    type Numbers = Numbers;

    fn upload(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Numbers> {
        check(&values, shape)?;
        Gpu::of(self)?.numbers(&values)
    }

    fn download(numbers: &Numbers) -> Result<Vec<f32>> {
        numbers.gpu.download(numbers)
    }

    fn copy(numbers: &Numbers) -> Result<Numbers> {
        numbers.gpu.copy(numbers)
    }

    fn first_not_finite(x: &Matrix<Self>) -> Result<Option<(usize, f32)>> {
        let (gpu, count) = (x.gpu(), x.count());
        let mut place = gpu.upload(&[count as u64])?;
        first_not_finite(gpu, Grid::each(count), count, &x.values, &mut place)?;
        let at = gpu.download(&place)?[0] as usize;
        Ok(if at < count { Some((at, x.on_host()?[at])) } else { None })
    }

    fn take_gradient(gradients: &mut Gradients<f32, Self>, of: &Name<Self>) -> Result<Numbers> {
        let gradient = &mut **gradients.get_or_alloc_mut(&of.tensor)?;
        let gpu = Gpu::with(gradient)?;
        let gradient = std::mem::replace(gradient, gpu.stale(0)?.slice);
        if gradient.is_empty() {
            gpu.zeros(of.shape.0 * of.shape.1)
        } else {
            Ok(gpu.hold(gradient))
        }
    }

    fn add_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Name<Self>,
        gradient: Numbers,
    ) -> Result<()> {
        let sum = &mut **gradients.get_or_alloc_mut(&of.tensor)?;
        if sum.is_empty() {
            *sum = gradient.slice;
            return Ok(());
        }
        add_to(sum, &gradient)
    }

    fn loss_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Tensor<(), f32, Self>,
    ) -> Result<f32> {
        let gradient = &**gradients.get_or_alloc_mut(of)?;
        Ok(Gpu::with(gradient)?.download(gradient)?[0])
    }
}
