//! Tensors of the CPU as slices, in and out.

use std::sync::Arc;

use dfdx::{
    shapes::{HasShape, Shape},
    tensor::{Cpu, CpuError, Gradients, Tensor},
};

/// The tensor's values, row-major.
pub(super) fn values<S: Shape, T>(tensor: &Tensor<S, f32, Cpu, T>) -> Arc<Vec<f32>> {
    let mut values = vec![0.0; tensor.shape().num_elements()];
    // Ours are all contiguous: every one was made from a vector.
    tensor.copy_into(&mut values);
    Arc::new(values)
}

/// Takes the gradient of an operation's output out of the gradients: nothing reads it again.
pub(super) fn take<S: Shape, T>(
    gradients: &mut Gradients<f32, Cpu>,
    of: &Tensor<S, f32, Cpu, T>,
) -> Result<Vec<f32>, CpuError> {
    Ok(std::mem::take(&mut **gradients.get_or_alloc_mut(of)?))
}

/// Adds to the gradient of an operation's input.
pub(super) fn add<S: Shape, T>(
    gradients: &mut Gradients<f32, Cpu>,
    of: &Tensor<S, f32, Cpu, T>,
    gradient: &[f32],
) -> Result<(), CpuError> {
    let sum = gradients.get_or_alloc_mut(of)?;
    sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    Ok(())
}
