//! The matrices that the operations work on.

use std::{fmt, sync::Arc};

use dfdx::{
    tensor::{Cpu, CpuError, Gradients, HasErr, NoneTape, PutTape, SplitTape, Tape, Tensor},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::cpu::CHUNK;
use crate::{
    buffer::{Buffer, copy},
    simd::first,
    simd::simd,
};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// A device that stores the numbers of matrices and their gradients.
///
/// The numbers are stored beside dfdx's tensor, which is empty and only identifies the matrix on
/// the tape. dfdx lends no slices of tensors: on the CPU, copying each operand would cost a tenth
/// of the time; on a GPU, only dfdx's own kernels could use them.
pub trait Hold: Device<f32> {
    /// Numbers in the device's memory.
    type Numbers: fmt::Debug + 'static;

    /// Uploads the numbers of a matrix from the host; an error if they do not fit the shape.
    fn upload(&self, values: Vec<f32>, shape: (usize, usize)) -> Computed<Self>;

    /// The numbers on the host.
    fn download(numbers: &Self::Numbers) -> Result<Vec<f32>, Self::Err>;

    /// A copy of the numbers.
    fn copy(numbers: &Self::Numbers) -> Computed<Self>;

    /// The first value that is NaN or infinite, with its row-major index.
    fn first_not_finite(matrix: &Matrix<Self>) -> Result<Option<(usize, f32)>, Self::Err>;

    /// Takes the gradient of a matrix out of the gradients; zeros if it has none.
    fn take_gradient(gradients: &mut Gradients<f32, Self>, of: &Name<Self>) -> Computed<Self>;

    /// Adds to the gradient of a matrix.
    fn add_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Name<Self>,
        gradient: Self::Numbers,
    ) -> Result<(), Self::Err>;

    /// The gradient of a loss.
    fn loss_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Tensor<(), f32, Self>,
    ) -> Result<f32, Self::Err>;

    /// A matrix of row-major values.
    fn hold(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Matrix<Self>, Self::Err> {
        Matrix::of(self, self.upload(values, shape)?, shape)
    }
}

/// Numbers that an operation computes.
pub type Computed<D> = Result<<D as Hold>::Numbers, <D as HasErr>::Err>;

/// A matrix on a device; the hidden states of samples are one of [tokens, channels].
#[derive(Debug)]
pub struct Matrix<D: Hold, T = NoneTape> {
    tensor: Tensor<(usize, usize), f32, D, T>,
    pub(super) values: Arc<D::Numbers>,
    shape: (usize, usize),
}

/// The identity of a matrix on the tape, without its numbers.
#[derive(Debug)]
pub struct Name<D: Hold> {
    tensor: Tensor<(usize, usize), f32, D>,
    shape: (usize, usize),
}

impl<D: Hold, T: Clone> Clone for Matrix<D, T> {
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.clone(), values: self.values.clone(), shape: self.shape }
    }
}

impl<D: Hold, T> Matrix<D, T> {
    /// Numbers of rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The values, row-major, on the host.
    pub fn on_host(&self) -> Result<Vec<f32>, D::Err> {
        D::download(&self.values)
    }

    /// The matrix's device.
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
    /// The matrix of some numbers of the device.
    pub(super) fn of(
        device: &D,
        numbers: D::Numbers,
        shape: (usize, usize),
    ) -> Result<Self, D::Err> {
        let tensor = device.try_zeros_like(&(0, 0))?;
        Ok(Self { tensor, values: Arc::new(numbers), shape })
    }

    /// A matrix of some numbers of the same device.
    pub(super) fn beside(
        &self,
        numbers: D::Numbers,
        shape: (usize, usize),
    ) -> Result<Self, D::Err> {
        Self::of(self.device(), numbers, shape)
    }

    /// The same numbers in another shape.
    pub(super) fn reshaped(&self, shape: (usize, usize)) -> Self {
        Self { shape, ..self.clone() }
    }

    /// The matrix with a tape.
    pub fn put_tape<T: Tape<f32, D>>(self, tape: T) -> Matrix<D, T> {
        Matrix { tensor: self.tensor.put_tape(tape), values: self.values, shape: self.shape }
    }

    /// Takes the matrix's gradient out of the gradients of a backward pass; zeros if it has none.
    pub fn take_gradient(&self, gradients: &mut Gradients<f32, D>) -> Result<Self, D::Err> {
        self.beside(D::take_gradient(gradients, &self.name())?, self.shape)
    }

    /// The identity of the matrix on the tape.
    pub fn name(&self) -> Name<D> {
        Name { tensor: self.tensor.clone(), shape: self.shape }
    }
}

impl<T> Matrix<Cpu, T> {
    /// The values, row-major.
    pub fn to_vec(&self) -> Vec<f32> {
        copy(&self.values)
    }
}

impl Hold for Cpu {
    type Numbers = Buffer;

    fn upload(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Buffer, CpuError> {
        if values.len() != shape.0 * shape.1 {
            return Err(CpuError::WrongNumElements);
        }
        Ok(values.into())
    }

    fn download(numbers: &Buffer) -> Result<Vec<f32>, CpuError> {
        Ok(copy(numbers))
    }

    fn copy(numbers: &Buffer) -> Result<Buffer, CpuError> {
        Ok(numbers.clone())
    }

    fn first_not_finite(matrix: &Matrix<Self>) -> Result<Option<(usize, f32)>, CpuError> {
        let values: &[f32] = &matrix.values;
        Ok(first(values, |value| !value.is_finite()).map(|at| (at, values[at])))
    }

    fn take_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Name<Self>,
    ) -> Result<Buffer, CpuError> {
        let gradient = std::mem::take(&mut **gradients.get_or_alloc_mut(&of.tensor)?);
        let (rows, columns) = of.shape;
        Ok(if gradient.is_empty() { vec![0.0; rows * columns] } else { gradient }.into())
    }

    fn add_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Name<Self>,
        gradient: Buffer,
    ) -> Result<(), CpuError> {
        let sum = gradients.get_or_alloc_mut(&of.tensor)?;
        if sum.is_empty() {
            **sum = gradient.into_vec();
            return Ok(());
        }
        sum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(sum, g)| {
            simd!(sum.iter_mut().zip(g).for_each(|(sum, g)| *sum += g));
        });
        Ok(())
    }

    fn loss_gradient(
        gradients: &mut Gradients<f32, Self>,
        of: &Tensor<(), f32, Self>,
    ) -> Result<f32, CpuError> {
        Ok(gradients.get_or_alloc_mut(of)?[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, matrix, noise};

    #[test]
    fn values_fit_the_shape() {
        assert!(Cpu::default().hold(vec![0.0; 5], (2, 3)).is_err());
    }

    #[test]
    fn what_is_not_finite_is_found() {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = noise(1000, 1);
            let first = |values: &[f32]| Cpu::first_not_finite(&matrix(values.to_vec(), (10, 100)));
            assert_eq!(first(&values).unwrap(), None);
            (values[977], values[512]) = (wrong, wrong);
            let (place, value) = first(&values).unwrap().unwrap();
            assert_eq!((place, value.to_bits()), (512, wrong.to_bits()));
        }
        assert_agrees!(|device: D| {
            let of = |wrong: f32| {
                let mut values = noise(1000, 1);
                let held = |values: &[f32]| device.hold(values.to_vec(), (10, 100)).unwrap();
                assert_eq!(D::first_not_finite(&held(&values)).unwrap(), None);
                (values[977], values[512]) = (wrong, wrong);
                let (place, value) = D::first_not_finite(&held(&values)).unwrap().unwrap();
                assert_eq!(value.to_bits(), wrong.to_bits());
                place as f32
            };
            vec![[f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(of).to_vec()]
        });
    }
}
