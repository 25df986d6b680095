//! Counts the zeros of a stored tensor, and finds their pattern.

use rayon::prelude::*;
use safetensors::Dtype as Stored;

use crate::mask::Pattern;

/// The zeros of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros {
    /// Number of zero elements.
    pub count: usize,
    /// The pattern of the zeros; `None` if there are hardly any, and for vectors.
    pub pattern: Option<Pattern>,
}

/// Maximum width of the tiles of a pattern.
const WIDEST: usize = 32;
/// The fraction of zeros below which a matrix is dense: trained weights have a few.
const FEW: f64 = 0.01;
/// Minimum fill of the tiles of a pattern N:M. With many zeros some N:M holds by chance, but then
/// most tiles keep fewer than N weights.
const FULL: f64 = 0.9;

/// Counts of some rows: zeros, and the most elements that a tile of each width keeps.
type Counts = (usize, [usize; WIDEST + 1]);

impl Zeros {
    /// The zeros of a tensor; `None` for formats whose elements are not whole bytes.
    ///
    /// ```
    /// use llm_barber::{checkpoint::Zeros, mask::Pattern};
    /// use safetensors::Dtype;
    ///
    /// // Two rows of four bytes.
    /// let found = Zeros::of(Dtype::I8, &[2, 4], &[1, 2, 0, 0, 0, 3, 0, 4]);
    /// let pattern = Some(Pattern::n_of_m(2, 4));
    /// assert_eq!(found, Some(Zeros { count: 4, pattern }));
    /// ```
    pub fn of(dtype: Stored, shape: &[usize], bytes: &[u8]) -> Option<Self> {
        let size = dtype.bitsize() / 8;
        if size == 0 || !dtype.bitsize().is_multiple_of(8) {
            return None;
        }
        let elements = bytes.len() / size;
        let columns = shape.last().copied().unwrap_or(1).max(1);
        let sign = has_sign(dtype);
        let row = |bytes: &[u8]| -> Counts {
            let mut kept_before = Vec::with_capacity(columns + 1);
            kept_before.push(0_usize);
            let mut kept = 0;
            for element in bytes.chunks_exact(size) {
                kept += usize::from(!is_zero(element, sign));
                kept_before.push(kept);
            }
            let mut most = [0; WIDEST + 1];
            for (width, most) in most.iter_mut().enumerate().skip(2) {
                if columns % width == 0 {
                    let tiles = (0..columns).step_by(width);
                    let kept = tiles.map(|at| kept_before[at + width] - kept_before[at]);
                    *most = kept.max().unwrap_or(0);
                }
            }
            (columns - kept, most)
        };
        let both = |(a, mut most): Counts, (b, others): Counts| {
            most.iter_mut().zip(others).for_each(|(most, other)| *most = (*most).max(other));
            (a + b, most)
        };
        let rows = bytes.par_chunks_exact(columns * size);
        let (count, most) = rows.map(row).reduce(|| (0, [0; WIDEST + 1]), both);
        let matrix = shape.len() > 1 && elements > 0;
        let pattern = matrix.then(|| pattern(elements, count, columns, &most)).flatten();
        Some(Self { count, pattern })
    }
}

/// The N:M with the lowest ratio that the zeros follow, if its tiles are full.
fn pattern(
    elements: usize,
    zeros: usize,
    columns: usize,
    most: &[usize; WIDEST + 1],
) -> Option<Pattern> {
    let all = elements as f64;
    if (zeros as f64) < FEW * all {
        return None;
    }
    let ratio = |n: usize, m: usize| n as f64 / m as f64;
    let found = most
        .iter()
        .enumerate()
        .filter(|&(m, &n)| m > 1 && columns.is_multiple_of(m) && 0 < n && n < m);
    let tightest = found.min_by(|(m, n), (other_m, other_n)| {
        ratio(**n, *m).total_cmp(&ratio(**other_n, *other_m)).then(m.cmp(other_m))
    });
    match tightest {
        Some((m, &n)) if (elements - zeros) as f64 >= FULL * ratio(n, m) * all => {
            Some(Pattern::n_of_m(n, m))
        }
        _ => Some(Pattern::UNSTRUCTURED),
    }
}

/// Whether a format has a negative zero, with the sign in the highest bit of the last byte.
pub(super) const fn has_sign(dtype: Stored) -> bool {
    use Stored::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
    matches!(dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2)
}

/// Whether an element, little-endian, is zero.
pub(super) fn is_zero(element: &[u8], sign: bool) -> bool {
    match element.split_last() {
        Some((last, rest)) => {
            let last = if sign { last & 0x7f } else { *last };
            last == 0 && rest.iter().all(|byte| *byte == 0)
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mask::Tile;

    fn zeros(columns: usize, values: &[f32]) -> Zeros {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Zeros::of(Stored::F32, &[values.len() / columns, columns], &bytes).unwrap()
    }

    #[test]
    fn patterns_are_told_apart() {
        let nofm = |n, m| Some(Pattern::n_of_m(n, m));
        let found = |columns, row: &[f32]| {
            let rows: Vec<f32> = (0..8)
                .flat_map(|i| {
                    // Each row has the tile turned by some places.
                    let mut row = row.to_vec();
                    row.chunks_mut(columns).for_each(|tile| tile.rotate_left(i % columns));
                    row
                })
                .collect();
            zeros(16, &rows).pattern
        };
        assert_eq!(found(4, &[1., 0., 0., 2.].repeat(4)), nofm(2, 4));
        assert_eq!(found(8, &[1., 2., 3., 4., 0., -0.0, 0., 0.].repeat(2)), nofm(4, 8));
        assert_eq!(found(4, &[1., 0., 0., 0.].repeat(4)), nofm(1, 4));
        assert_eq!(found(2, &[1., 0.].repeat(8)), nofm(1, 2));
        assert_eq!(found(16, &[1.; 16]), None);
        // Three in a row of sixteen, anywhere.
        let mut row = [1.0; 16];
        row[..3].fill(0.0);
        assert_eq!(found(1, &row), nofm(13, 16));
        row[15] = 0.0;
        let rows = [row, [1.0; 16]].concat();
        assert_eq!(zeros(16, &rows), Zeros { count: 4, pattern: Some(Pattern::UNSTRUCTURED) });
        assert_eq!(zeros(4, &[0.0; 8]), Zeros { count: 8, pattern: Some(Pattern::UNSTRUCTURED) });
    }

    #[test]
    fn vectors_have_no_pattern_and_packed_formats_no_count() {
        const HALF: [u8; 8] = [0, 0, 0, 0x80, 1, 0, 0, 0x3c];
        let vector = |count| Some(Zeros { count, pattern: None });
        assert_eq!(Zeros::of(Stored::F16, &[4], &HALF), vector(2));
        assert_eq!(Zeros::of(Stored::I16, &[4], &HALF), vector(1));
        assert_eq!(Zeros::of(Stored::F4, &[2, 2], &[0, 0]), None);
        assert_eq!(Zeros::of(Stored::F32, &[0, 4], &[]), vector(0));
        assert_eq!(Zeros::of(Stored::F32, &[], &[0; 4]), vector(1));
    }

    proptest! {
        /// Whatever is said to hold does.
        #[test]
        fn a_pattern_holds(
            columns in prop::sample::select(vec![6, 8, 12, 16]),
            values in prop::collection::vec(prop::sample::select(vec![0.0_f32, 1.0]), 96),
        ) {
            let found = zeros(columns, &values);
            prop_assert_eq!(found.count, values.iter().filter(|value| **value == 0.0).count());
            if let Some(Tile { n, m }) = found.pattern.and_then(|found| found.tile(columns)) {
                let kept = |tile: &[f32]| tile.iter().filter(|value| **value != 0.0).count();
                prop_assert!(values.chunks(m).all(|tile| kept(tile) <= n));
                prop_assert!(columns % m == 0);
            }
        }
    }
}
