//! Transposes row-major matrices tile by tile: reading whole columns would miss the cache at every
//! number.

/// Rows and columns of a tile that is turned in vector registers.
const TILE: usize = 8;
/// Number of rows that are processed together: their cache lines stay in the cache until the next
/// tiles need the rest of them.
const TOGETHER: usize = 8 * TILE;

/// Writes the transpose of a matrix [rows, columns] with this number of columns.
pub fn transpose(values: &[f32], columns: usize, to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        use crate::simd::Kernel;
        return pulp::Simd::vectorize(
            simd,
            Kernel(
                #[inline(always)]
                || each_tile(values, columns, to, |tile| vectors::turn(simd, tile)),
            ),
        );
    }
    each_tile(values, columns, to, |tile| {
        std::array::from_fn(|i| std::array::from_fn(|j| tile[j][i]))
    });
}

type Tile = [[f32; TILE]; TILE];

/// The transpose; `turn` transposes a whole tile.
#[inline(always)]
fn each_tile(values: &[f32], columns: usize, to: &mut [f32], turn: impl Fn(Tile) -> Tile) {
    let rows = values.len().checked_div(columns).unwrap_or(0);
    for first in (0..rows).step_by(TOGETHER) {
        let last = rows.min(first + TOGETHER);
        for left in (0..columns).step_by(TILE) {
            for top in (first..last).step_by(TILE) {
                if top + TILE <= last && left + TILE <= columns {
                    let mut tile = Tile::default();
                    for (i, row) in tile.iter_mut().enumerate() {
                        let at = (top + i) * columns + left;
                        row.copy_from_slice(&values[at..at + TILE]);
                    }
                    for (j, row) in turn(tile).iter().enumerate() {
                        let at = (left + j) * rows + top;
                        to[at..at + TILE].copy_from_slice(row);
                    }
                    continue;
                }
                for j in left..columns.min(left + TILE) {
                    for i in top..last.min(top + TILE) {
                        to[j * rows + i] = values[i * columns + j];
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::__m256;

    use pulp::{cast, x86::V3};

    use super::Tile;

    /// The transpose of a tile: of pairs of rows, then of pairs of pairs, then of its halves.
    #[inline(always)]
    pub(super) fn turn(simd: V3, tile: Tile) -> Tile {
        let avx = simd.avx;
        let [a, b, c, d, e, f, g, h] = tile.map(cast::<_, __m256>);
        let pairs = |a, b| [avx._mm256_unpacklo_ps(a, b), avx._mm256_unpackhi_ps(a, b)];
        let fours = |[a, b]: [__m256; 2], [c, d]: [__m256; 2]| {
            [
                avx._mm256_shuffle_ps::<0b01_00_01_00>(a, c),
                avx._mm256_shuffle_ps::<0b11_10_11_10>(a, c),
                avx._mm256_shuffle_ps::<0b01_00_01_00>(b, d),
                avx._mm256_shuffle_ps::<0b11_10_11_10>(b, d),
            ]
        };
        let upper = fours(pairs(a, b), pairs(c, d));
        let lower = fours(pairs(e, f), pairs(g, h));
        let left = |i: usize| avx._mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
        let right = |i: usize| avx._mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
        let rows = [left(0), left(1), left(2), left(3), right(0), right(1), right(2), right(3)];
        rows.map(cast)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        for (rows, columns) in
            [(0, 3), (3, 0), (1, 1), (8, 8), (7, 9), (64, 64), (70, 33), (200, 8)]
        {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let scalar = |tile: Tile| std::array::from_fn(|i| std::array::from_fn(|j| tile[j][i]));
            let (mut found, mut other) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            transpose(&values, columns, &mut found);
            each_tile(&values, columns, &mut other, scalar);
            for (i, value) in values.iter().enumerate() {
                let at = i % columns * rows + i / columns;
                assert_eq!((found[at], other[at]), (*value, *value), "{rows} × {columns}: {i}");
            }
        }
    }
}
