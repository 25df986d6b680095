//! Rounds weights to a storage format.

use super::{Dtype, Error};

impl Dtype {
    /// The weights of tensor `name`, rounded to the nearest values of the format, as little-endian
    /// bytes.
    ///
    /// # Errors
    /// If a weight is too large for the format.
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

    /// The weights of tensor `name`, rounded to the nearest values of the format.
    ///
    /// # Errors
    /// If a weight is too large for the format.
    pub(crate) fn rounded(self, name: &str, values: Vec<f32>) -> Result<Vec<f32>, Error> {
        match self {
            Self::F64 | Self::F32 => Ok(values),
            Self::F16 | Self::Bf16 => Ok(self.decode(&self.round(name, &values)?)),
        }
    }
}
