//! Weights as a format stores them: rounded to the nearest, or too large for it.

use super::{Dtype, Error};

impl Dtype {
    /// The weights of tensor `name` to little-endian bytes, rounded to the nearest.
    ///
    /// # Errors
    /// If one is too large for the format.
    pub(super) fn round(self, name: &str, values: &[f32]) -> Result<Vec<u8>, Error> {
        let bytes = self.encode(values);
        let mut pairs = values.iter().zip(self.decode(&bytes));
        match pairs.position(|(value, stored)| value.is_finite() != stored.is_finite()) {
            None => Ok(bytes),
            Some(index) => {
                let (name, value) = (name.to_owned(), values[index]);
                Err(Error::Overflow { name, value, index, dtype: self.name() })
            }
        }
    }

    /// The weights of tensor `name` as they are when they are stored in this format.
    ///
    /// # Errors
    /// If one is too large for the format.
    pub(crate) fn rounded(self, name: &str, values: Vec<f32>) -> Result<Vec<f32>, Error> {
        match self {
            Self::F64 | Self::F32 => Ok(values),
            Self::F16 | Self::Bf16 => Ok(self.decode(&self.round(name, &values)?)),
        }
    }
}
