//! The matrices that the operations work on.

use std::{fmt, sync::Arc};

use dfdx::{
    tensor::{Cpu, CpuError, Gradients, NoneTape, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};

use crate::{
    buffer::{Buffer, copy},
    find,
};

/// Where a device keeps the values of a matrix.
///
/// They lie beside the tensor, which is empty and only the name under which the tape knows the
/// matrix: dfdx lends no slice of a tensor, on the CPU copying each operand of each operation would
/// cost a tenth of the time, and on a GPU only dfdx's own kernels could work on it.
pub trait Hold: Device<f32> {
    /// The values beside the tensor.
    type Values: Clone + fmt::Debug;

    /// A matrix of row-major values.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn hold(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Matrix<Self>, Self::Err>;

    /// The values, row-major, on the host.
    ///
    /// # Errors
    /// If the device is lost.
    fn host<T>(matrix: &Matrix<Self, T>) -> Result<Vec<f32>, Self::Err>;

    /// The first value that is NaN or infinite, if there is one, and where it is, row-major.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn first_not_finite(matrix: &Matrix<Self>) -> Result<Option<(usize, f32)>, Self::Err>;

    /// Takes the gradient of a matrix, row-major, out of the gradients; zeros if it has none.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn take_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Matrix<Self>,
    ) -> Result<Vec<f32>, Self::Err>;
}

/// A matrix on a device; the hidden states of samples are one of [tokens, channels].
#[derive(Debug)]
pub struct Matrix<D: Hold, T = NoneTape> {
    pub(super) tensor: Tensor<(usize, usize), f32, D, T>,
    pub(super) values: D::Values,
    pub(super) shape: (usize, usize),
}

impl<D: Hold, T: Clone> Clone for Matrix<D, T> {
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.clone(), values: self.values.clone(), shape: self.shape }
    }
}

impl<D: Hold, T> Matrix<D, T> {
    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The values, row-major, on the host.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn on_host(&self) -> Result<Vec<f32>, D::Err> {
        D::host(self)
    }

    /// Its device.
    pub fn device(&self) -> &D {
        self.tensor.device()
    }
}

impl<D: Hold, T: Tape<f32, D>> Matrix<D, T> {
    /// The matrix and its tape.
    pub fn split_tape(self) -> (Matrix<D>, T) {
        let (tensor, tape) = self.tensor.split_tape();
        (Matrix { tensor, values: self.values, shape: self.shape }, tape)
    }
}

impl<D: Hold> Matrix<D> {
    /// The matrix with a tape.
    pub fn put_tape<T: Tape<f32, D>>(self, tape: T) -> Matrix<D, T> {
        Matrix { tensor: self.tensor.put_tape(tape), values: self.values, shape: self.shape }
    }
}

impl<T> Matrix<Cpu, T> {
    /// The values, row-major.
    pub fn to_vec(&self) -> Vec<f32> {
        copy(&self.values)
    }
}

impl Matrix<Cpu> {
    /// The name under which the tape knows the matrix, alone.
    pub(super) fn without_values(&self) -> Self {
        Self { values: Arc::default(), ..self.clone() }
    }
}

impl Hold for Cpu {
    type Values = Arc<Buffer>;

    fn hold(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Matrix<Self>, CpuError> {
        if values.len() != shape.0 * shape.1 {
            return Err(CpuError::WrongNumElements);
        }
        let tensor = self.try_tensor_from_vec(Vec::new(), (0, 0))?;
        Ok(Matrix { tensor, values: Arc::new(values.into()), shape })
    }

    fn host<T>(matrix: &Matrix<Self, T>) -> Result<Vec<f32>, CpuError> {
        Ok(matrix.to_vec())
    }

    fn first_not_finite(matrix: &Matrix<Self>) -> Result<Option<(usize, f32)>, CpuError> {
        let values: &[f32] = &matrix.values;
        Ok(find::first(values, |value| !value.is_finite()).map(|at| (at, values[at])))
    }

    fn take_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Matrix<Self>,
    ) -> Result<Vec<f32>, CpuError> {
        let gradient = std::mem::take(&mut **gradients.get_or_alloc_mut(&of.tensor)?);
        let (rows, columns) = of.shape();
        Ok(if gradient.is_empty() { vec![0.0; rows * columns] } else { gradient })
    }
}
