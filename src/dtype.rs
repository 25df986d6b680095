//! The floating-point formats of weights.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::buffer::stale;

/// A floating-point format of weights. Barber computes in f32, whatever the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 64 bits, only for stored weights.
    #[serde(skip)]
    F64,
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, the upper half of `F32`.
    Bf16,
}

/// Number of elements that one task converts.
const CHUNK: usize = 1 << 16;

impl Dtype {
    /// The format of a tensor; `None` if Barber does not compute with it.
    pub(crate) fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F64 => Some(Self::F64),
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// The format as a tensor's dtype in safetensors.
    pub(crate) const fn stored(self) -> safetensors::Dtype {
        match self {
            Self::F64 => safetensors::Dtype::F64,
            Self::F32 => safetensors::Dtype::F32,
            Self::F16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The format's name in `config.json`.
    pub(crate) const fn torch(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The format of this name in `config.json`.
    pub(crate) fn named(torch: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::Bf16].into_iter().find(|of| of.torch() == torch)
    }

    /// Bytes of an element.
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Number of elements that are NaN or infinite as f32, and the index of the first.
    pub(crate) fn not_finite(self, bytes: &[u8]) -> (usize, Option<usize>) {
        fn look<const SIZE: usize>(
            bytes: &[u8],
            wrong: impl Fn([u8; SIZE]) -> bool + Sync,
        ) -> (usize, Option<usize>) {
            let chunks = bytes.as_chunks::<SIZE>().0.par_chunks(CHUNK).enumerate();
            let found = chunks.map(|(chunk, elements)| {
                let count: usize =
                    elements.iter().map(|element| usize::from(wrong(*element))).sum();
                // Usually there is none.
                let first = elements.iter().position(|element| count > 0 && wrong(*element));
                (count, first.map(|at| chunk * CHUNK + at))
            });
            found.reduce(|| (0, None), |(a, first), (b, second)| (a + b, first.or(second)))
        }
        match self {
            Self::F64 => look(bytes, |b| !(f64::from_le_bytes(b) as f32).is_finite()),
            Self::F32 => look(bytes, |b| !f32::from_le_bytes(b).is_finite()),
            Self::F16 => look(bytes, |b| !f16::from_le_bytes(b).is_finite()),
            Self::Bf16 => look(bytes, |b| !bf16::from_le_bytes(b).is_finite()),
        }
    }

    /// Little-endian bytes to numbers; those of [`Dtype::F64`] are rounded to the nearest, all
    /// others are represented exactly.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = stale(bytes.len() / self.size());
        values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * self.size())).for_each(
            |(values, bytes)| match self {
                Self::F64 => {
                    for (value, b) in values.iter_mut().zip(bytes.as_chunks::<8>().0) {
                        *value = f64::from_le_bytes(*b) as f32;
                    }
                }
                Self::F32 => {
                    for (value, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                        *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
                Self::F16 => convert(bytes, values, f16::from_bits),
                Self::Bf16 => convert(bytes, values, bf16::from_bits),
            },
        );
        values
    }

    /// Rounds numbers to the nearest of the format; those too large for it become infinite.
    pub(crate) fn round_to(self, values: &mut [f32]) {
        match self {
            Self::F64 | Self::F32 => {}
            Self::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
            Self::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        }
    }

    /// Numbers to little-endian bytes, rounded to the nearest.
    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.size()];
        bytes.par_chunks_mut(CHUNK * self.size()).zip(values.par_chunks(CHUNK)).for_each(
            |(bytes, values)| match self {
                Self::F64 => {
                    for (bytes, value) in bytes.chunks_exact_mut(8).zip(values) {
                        bytes.copy_from_slice(&f64::from(*value).to_le_bytes());
                    }
                }
                Self::F32 => {
                    for (bytes, value) in bytes.chunks_exact_mut(4).zip(values) {
                        bytes.copy_from_slice(&value.to_le_bytes());
                    }
                }
                Self::F16 => {
                    for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
                        bytes.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
                    }
                }
                Self::Bf16 => {
                    for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
                        bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
                    }
                }
            },
        );
        bytes
    }
}

/// Converts half-precision numbers in small copies, as the bytes may not be aligned.
fn convert<H: Copy>(bytes: &[u8], values: &mut [f32], half: impl Fn(u16) -> H)
where
    [H]: HalfFloatSliceExt,
{
    const TOGETHER: usize = 512;
    let mut halves = [half(0); TOGETHER];
    for (values, bytes) in values.chunks_mut(TOGETHER).zip(bytes.chunks(2 * TOGETHER)) {
        let halves = &mut halves[..values.len()];
        halves.iter_mut().zip(pairs(bytes)).for_each(|(to, bits)| *to = half(bits));
        halves.convert_to_f32_slice(values);
    }
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_that_are_not_finite_are_found() {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let mut values = vec![-1.5; 3 * CHUNK];
            assert_eq!(dtype.not_finite(&dtype.encode(&values)), (0, None));
            values[2 * CHUNK + 7] = f32::NEG_INFINITY;
            assert_eq!(dtype.not_finite(&dtype.encode(&values)), (1, Some(2 * CHUNK + 7)));
            values[5] = f32::NAN;
            assert_eq!(dtype.not_finite(&dtype.encode(&values)), (2, Some(5)));
        }
        assert_eq!(Dtype::F64.not_finite(&1e300_f64.to_le_bytes()), (1, Some(0)));
        assert_eq!(Dtype::F32.not_finite(&[]), (0, None));
    }

    proptest! {
        #[test]
        fn rounding_is_encoding_and_decoding(values: Vec<f32>) {
            for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let mut rounded = values.clone();
                dtype.round_to(&mut rounded);
                let bits = |of: &[f32]| of.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&rounded), bits(&dtype.decode(&dtype.encode(&values))));
                prop_assert_eq!(Dtype::named(dtype.torch()), Some(dtype));
            }
        }

        #[test]
        fn half_precision_survives_decoding(bits: Vec<u16>) {
            let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let values = dtype.decode(&bytes);
                if values.iter().all(|v| !v.is_nan()) {
                    prop_assert_eq!(&dtype.encode(&values), &bytes);
                }
            }
        }
    }
}
