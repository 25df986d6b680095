//! Compares a tensor of a pruned checkpoint with the dense tensor, and counts its zeros.

use std::borrow::Cow;

use barber_metric::Dims;

use super::{
    Cut, Dtype, Error, TensorView,
    zeros::{has_sign, is_zero},
};
use crate::mask::{Mask, Pattern, Tile};

/// How a pruned tensor differs from the dense one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Number of weights that are zero but not zero in the dense tensor.
    pub pruned: usize,
    /// Number of other weights whose bits differ from the dense tensor's.
    pub changed: usize,
    /// Row-major index of the first changed weight.
    pub first: Option<usize>,
}

impl TensorView<'_> {
    /// Bytes of an element; 1 for formats that Barber does not compute with.
    fn element(&self) -> usize {
        Dtype::of(self.dtype).map_or(1, Dtype::size)
    }

    fn is_zero(element: &[u8]) -> bool {
        element.iter().all(|byte| *byte == 0)
    }

    /// Number of weights that are zero like pruned ones: with no bit set.
    ///
    /// # Errors
    /// If it is compressed and damaged.
    pub fn zeros(&self) -> Result<usize, Error> {
        let bytes = self.bytes()?;
        Ok(bytes.chunks_exact(self.element()).filter(|element| Self::is_zero(element)).count())
    }

    /// The mask of the weights that have a bit set; `None` for a tensor that is not a matrix.
    ///
    /// # Errors
    /// If it is compressed and damaged.
    pub(super) fn not_zero(&self) -> Result<Option<Mask>, Error> {
        let &[rows, columns] = self.shape else { return Ok(None) };
        let (size, bytes) = (self.element(), self.bytes()?);
        let is_zero = |i: usize| Self::is_zero(&bytes[i * size..(i + 1) * size]);
        Ok(Some(Mask::from_fn(Dims { rows, columns }, |i| !is_zero(i))))
    }

    /// Row-major index of the first weight of the first tile that keeps more than `pattern` allows.
    ///
    /// # Errors
    /// If it is compressed and damaged.
    pub fn breach(&self, pattern: Pattern) -> Result<Option<usize>, Error> {
        let Some(&columns @ 1..) = self.shape.last() else { return Ok(None) };
        let Some(Tile { n, m }) = pattern.tile(columns) else { return Ok(None) };
        let size = self.element();
        let bytes = self.bytes()?;
        Ok(bytes.chunks_exact(columns * size).enumerate().find_map(|(row, weights)| {
            let full = |tile: &[u8]| {
                tile.chunks_exact(size).filter(|weight| !Self::is_zero(weight)).count() > n
            };
            let tile = weights.chunks(m * size).position(full)?;
            Some(row * columns + tile * m)
        }))
    }

    /// The difference between this tensor of a pruned checkpoint and the dense tensor, or what a cut
    /// leaves of it, rounded to the format of this one. `None` if the shapes differ, or the format is
    /// not a rounding of the dense one.
    ///
    /// # Errors
    /// If a dense weight does not fit the format, or one of them is compressed and damaged.
    pub fn difference(
        &self,
        dense: &TensorView<'_>,
        cut: Option<&Cut>,
    ) -> Result<Option<Difference>, Error> {
        self.compared(dense, cut, Self::is_zero)
    }

    /// [`TensorView::difference`] for a tensor that another program pruned: zeros may have a sign.
    ///
    /// # Errors
    /// As [`TensorView::difference`].
    pub fn zeroed(&self, dense: &TensorView<'_>) -> Result<Option<Difference>, Error> {
        let sign = has_sign(self.dtype);
        self.compared(dense, None, |element| is_zero(element, sign))
    }

    fn compared(
        &self,
        dense: &TensorView<'_>,
        cut: Option<&Cut>,
        is_zero: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<Difference>, Error> {
        let shape = cut.map_or(dense.shape.into(), |cut| Cow::Owned(cut.shape(dense.shape)));
        if self.shape != &*shape {
            return Ok(None);
        }
        let expected: Cow<'_, [u8]> = match (Dtype::of(dense.dtype), Dtype::of(self.dtype)) {
            _ if self.dtype == dense.dtype => dense.bytes()?,
            (Some(from), Some(to)) => to.round(self.name, &from.decode(&dense.bytes()?))?.into(),
            _ => return Ok(None),
        };
        let expected = match cut {
            Some(cut) => cut.left(dense.shape, &expected).into(),
            None => expected,
        };
        let mut found = Difference::default();
        let size = self.element();
        let bytes = self.bytes()?;
        let pairs = bytes.chunks_exact(size).zip(expected.chunks_exact(size));
        for (i, (own, _)) in pairs.enumerate().filter(|(_, (own, dense))| own != dense) {
            if is_zero(own) {
                found.pruned += 1;
            } else {
                found.changed += 1;
                found.first.get_or_insert(i);
            }
        }
        Ok(Some(found))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn view<'a>(dtype: safetensors::Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        TensorView::dense("w", dtype, shape, Path::new("file"), bytes)
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        Dtype::F32.encode(values)
    }

    #[test]
    fn zeros_and_other_bits_are_told_apart() {
        let (f32, bf16) = (safetensors::Dtype::F32, safetensors::Dtype::BF16);
        let dense = f32s(&[1.0, -2.0, 0.0, 1.001]);
        let dense = view(f32, &[2, 2], &dense);
        let sparse = f32s(&[1.0, 0.0, -0.0, 1.0]);
        let sparse = view(f32, &[2, 2], &sparse);
        assert_eq!(sparse.zeros().unwrap(), 1);
        let found = sparse.difference(&dense, None).unwrap();
        assert_eq!(found, Some(Difference { pruned: 1, changed: 2, first: Some(2) }));
        let found = sparse.zeroed(&dense).unwrap();
        assert_eq!(found, Some(Difference { pruned: 2, changed: 1, first: Some(3) }));
        // In another format, what counts is the rounded dense weight.
        let half = Dtype::Bf16.encode(&[1.0, 0.0, 0.0, 1.0]);
        let bytes = half;
        let half = view(bf16, &[2, 2], &bytes);
        let found = half.difference(&dense, None).unwrap();
        assert_eq!(found, Some(Difference { pruned: 1, changed: 0, first: None }));
        let other = view(bf16, &[4, 1], &bytes);
        assert_eq!(other.difference(&dense, None).unwrap(), None);
    }

    #[test]
    fn a_breach_of_the_pattern_is_found() {
        let f32 = safetensors::Dtype::F32;
        let weights = f32s(&[1.0, 0.0, 0.0, 2.0, 1.0, 0.0, 3.0, 0.0, 1.0, 1.0, 0.0, 1.0]);
        let pattern = Pattern::n_of_m(2, 4);
        assert_eq!(view(f32, &[3, 4], &weights).breach(pattern).unwrap(), Some(8));
        assert_eq!(view(f32, &[2, 4], &weights[..32]).breach(pattern).unwrap(), None);
        assert_eq!(view(f32, &[1, 12], &weights).breach(pattern).unwrap(), Some(8));
        assert_eq!(view(f32, &[3, 4], &weights).breach(Pattern::UNSTRUCTURED).unwrap(), None);
    }
}
