//! A quantised matrix.

use barber_metric::Dims;
use rayon::prelude::*;

use super::{Codes, Dtype, Scale};
use crate::buffer::{recycle, stale};

/// The form of a quantised matrix.
#[derive(Clone, Copy, Debug)]
pub(in crate::checkpoint) struct Matrix {
    pub(in crate::checkpoint) dims: Dims,
    pub(in crate::checkpoint) codes: Codes,
    /// Bytes of a row of codes; with padding, more than the row has weights.
    pub(in crate::checkpoint) row: usize,
    pub(in crate::checkpoint) scale: Scale,
    /// Rows and columns of a block with one scale, both positive.
    pub(in crate::checkpoint) block: [usize; 2],
    /// The format that weights are rounded to.
    pub(in crate::checkpoint) dtype: Dtype,
}

/// The stored bytes of a quantised matrix.
#[derive(Clone, Copy, Debug)]
pub(in crate::checkpoint) struct Stored<'a> {
    pub(in crate::checkpoint) codes: &'a [u8],
    pub(in crate::checkpoint) scales: &'a [u8],
}

impl Matrix {
    /// The weights, row-major, rounded to the matrix's format: those too large for it are infinite.
    pub(in crate::checkpoint) fn values(&self, stored: Stored<'_>) -> Vec<f32> {
        let Self { dims: Dims { rows, columns }, row, block: [height, width], .. } = *self;
        let scales = self.scale.values(stored.scales);
        let of_codes = self.codes.values();
        let across = columns.div_ceil(width).max(1);
        let mut values = stale(rows * columns);
        values
            .par_chunks_mut(columns.max(1))
            .zip(stored.codes.par_chunks(row.max(1)))
            .enumerate()
            .for_each(|(i, (weights, codes))| {
                let scales = &scales[i / height * across..][..across];
                let blocks = weights.chunks_mut(width).zip(codes[..columns].chunks(width));
                for ((weights, codes), scale) in blocks.zip(scales) {
                    for (weight, code) in weights.iter_mut().zip(codes) {
                        *weight = of_codes[usize::from(*code)] * scale;
                    }
                }
                self.dtype.round_to(weights);
            });
        values
    }

    /// The bytes of the dense matrix, little-endian, row-major.
    pub(in crate::checkpoint) fn bytes(&self, stored: Stored<'_>) -> Vec<u8> {
        let values = self.values(stored);
        let bytes = self.dtype.encode(&values);
        recycle(values);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matrix(dims: Dims, codes: Codes, block: [usize; 2], dtype: Dtype) -> Matrix {
        let scale = Scale::Float(Dtype::F32);
        Matrix { dims, codes, row: dims.columns, scale, block, dtype }
    }

    #[test]
    fn each_block_has_its_scale() {
        let of = matrix(Dims { rows: 3, columns: 5 }, Codes::Int8, [2, 3], Dtype::F32);
        let codes: Vec<u8> = (1..=15).collect();
        let scales = Dtype::F32.encode(&[1.0, -1.0, 0.0, 0.5]);
        let found = of.values(Stored { codes: &codes, scales: &scales });
        let expected =
            [[1.0, 2.0, 3.0, -4.0, -5.0], [6.0, 7.0, 8.0, -9.0, -10.0], [0.0, 0.0, 0.0, 7.0, 7.5]];
        assert_eq!(found, expected.concat());
    }

    #[test]
    fn rows_may_be_padded_and_values_are_rounded() {
        let dims = Dims { rows: 2, columns: 3 };
        let mut of = matrix(dims, Codes::Offset, [1, 3], Dtype::Bf16);
        of.row = 4;
        let codes = [129, 127, 228, 255, 0, 128, 131, 255];
        let scales = Dtype::F32.encode(&[1.01, 1.0]);
        let stored = Stored { codes: &codes, scales: &scales };
        // 1.01 lies between 1.0078125 and 1.015625, and 101 is exact.
        let expected = [1.007_812_5, -1.007_812_5, 101.0, -128.0, 0.0, 3.0];
        assert_eq!(of.values(stored), expected);
        assert_eq!(of.bytes(stored), Dtype::Bf16.encode(&expected));
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let of = matrix(Dims { rows: 1, columns: 3 }, Codes::E4m3, [1, 1], Dtype::F16);
        let scales = Dtype::F32.encode(&[0.0, f32::INFINITY, 1e6]);
        let found = of.values(Stored { codes: &[0x7f, 0x38, 0x38], scales: &scales });
        assert!(found[0].is_nan() && found[1] == f32::INFINITY && found[2] == f32::INFINITY);
    }

    proptest! {
        /// A weight is its code's value times its block's scale, whatever the shapes.
        #[test]
        fn weights_are_products(
            rows in 1..7_usize,
            columns in 1..9_usize,
            block in [1..5_usize, 1..5_usize],
            seed: u8,
        ) {
            let of = matrix(Dims { rows, columns }, Codes::Int8, block, Dtype::F32);
            let codes: Vec<u8> = (0..rows * columns).map(|i| seed.wrapping_add(i as u8)).collect();
            let [down, across] = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
            let scales: Vec<f32> = (0..down * across).map(|i| i as f32 - 1.5).collect();
            let bytes = Dtype::F32.encode(&scales);
            let found = of.values(Stored { codes: &codes, scales: &bytes });
            for (i, found) in found.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let scale = scales[row / block[0] * across + column / block[1]];
                prop_assert_eq!(*found, f32::from(codes[i] as i8) * scale);
            }
        }
    }
}
