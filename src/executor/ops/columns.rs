//! Some columns of a matrix: a part of what a fused projection gives.
//!
//! The gradient of the columns is added to theirs; the others get none.

use std::ops::Range;

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, TensorFromVec},
    tensor_ops::Device,
};

use super::{Matrix, cpu};

/// y = x[:, columns].
pub trait Columns: Device<f32> {
    /// Some columns of each row.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Columns for Cpu {
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let (rows, width) = *x.shape();
        let values = cpu::values(&x);
        let y = values.chunks_exact(width).flat_map(|row| &row[columns.clone()]).copied().collect();
        let y = x.device().try_tensor_from_vec(y, (rows, columns.len()))?;
        let output = y.clone();
        tape.add_backward_op(move |gradients| {
            let g = cpu::take(gradients, &output)?;
            let sum = gradients.get_or_alloc_mut(&x)?;
            for (sum, g) in sum.chunks_exact_mut(width).zip(g.chunks_exact(columns.len())) {
                sum[columns.clone()].iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
            }
            Ok(())
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::check_gradient;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check_gradient((3, 7), |x| Cpu::columns(x, 2..5));
    }
}
