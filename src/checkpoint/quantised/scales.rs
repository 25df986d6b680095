//! The scales of a quantised matrix: their formats, and the block of the matrix that each is of.

use std::borrow::Cow;

use super::Dtype;

/// The format of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::checkpoint) enum Scale {
    /// A floating-point format that weights have, too.
    Float(Dtype),
    /// OCP's E8M0: a power of two with its exponent plus 127, or NaN.
    E8m0,
}

impl Scale {
    /// The format of a tensor of scales; `None` if it is none.
    pub(in crate::checkpoint) fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F8_E8M0 => Some(Self::E8m0),
            other => Dtype::of(other).map(Self::Float),
        }
    }

    /// The scales as f32.
    pub(super) fn values(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::Float(dtype) => dtype.decode(bytes),
            Self::E8m0 => bytes.iter().map(|code| power_of_two(*code)).collect(),
        }
    }
}

fn power_of_two(code: u8) -> f32 {
    match code {
        0xff => f32::NAN,
        // 2⁻¹²⁷ is not a normal number.
        0 => f32::from_bits(1 << 22),
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// Rows and columns of the block of a `[rows, columns]` matrix that each of the scales in a tensor
/// of shape `scales` is of. `declared` is the block that `config.json` gives; blocks at the ends of
/// rows and columns may be smaller. Without it, a matrix has one scale, or one for each row, or one
/// for each of several groups of a row's weights. `None` if the shapes do not fit each other.
pub(in crate::checkpoint) fn block(
    [rows, columns]: [usize; 2],
    scales: &[usize],
    declared: Option<[usize; 2]>,
) -> Option<[usize; 2]> {
    let scales: Cow<'_, [usize]> = match *scales {
        [] => [1, 1].to_vec().into(),
        [count] => [count, 1].to_vec().into(),
        _ => scales.into(),
    };
    let [down, across] = scales[..] else { return None };
    if let Some([height, width]) = declared
        && [down, across] == [rows.div_ceil(height), columns.div_ceil(width)]
    {
        return Some([height, width]);
    }
    match [down, across] {
        [1, 1] => Some([rows.max(1), columns.max(1)]),
        _ if down == rows && across > 0 && columns.is_multiple_of(across) => {
            Some([1, (columns / across).max(1)])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_have_their_values() {
        let codes = [0, 1, 126, 127, 128, 254];
        let expected = [-127, -126, -1, 0, 1, 127].map(|exponent| 2_f32.powi(exponent));
        assert_eq!(Scale::E8m0.values(&codes), expected);
        assert!(Scale::E8m0.values(&[255])[0].is_nan());
    }

    #[test]
    fn scales_are_of_blocks_groups_rows_or_the_matrix() {
        let blocks = Some([128, 128]);
        for (scales, declared, expected) in [
            (&[5, 56][..], blocks, Some([128, 128])),
            (&[56, 5], blocks, None),
            (&[4, 56], blocks, None),
            (&[5, 56], None, None),
            (&[5, 56, 1], blocks, None),
            (&[], None, Some([576, 7168])),
            (&[1], blocks, Some([576, 7168])),
            (&[1, 1], None, Some([576, 7168])),
            (&[576], None, Some([1, 7168])),
            (&[576, 1], blocks, Some([1, 7168])),
            (&[576, 56], None, Some([1, 128])),
            (&[576, 5], None, None),
            (&[576, 0], None, None),
            (&[1, 7168], None, None),
            (&[7168], None, None),
            (&[0], None, None),
        ] {
            assert_eq!(block([576, 7168], scales, declared), expected, "{scales:?} {declared:?}");
        }
        // A matrix that is smaller than a block, and empty ones.
        assert_eq!(block([8, 64], &[1, 1], blocks), Some([128, 128]));
        assert_eq!(block([0, 64], &[0, 1], None), Some([1, 64]));
        assert_eq!(block([0, 0], &[1], None), Some([1, 1]));
    }
}
