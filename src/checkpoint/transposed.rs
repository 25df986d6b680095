//! The transpose of a stored matrix: some checkpoints have the columns of a matrix one after the other.

use rayon::prelude::*;

/// Number of rows and columns of a tile: reading whole columns would miss the cache at every number.
const TILE: usize = 32;

/// The bytes of the transpose of a matrix of (rows, columns), row-major, whatever the size of its
/// elements.
pub(super) fn transposed(bytes: &[u8], (rows, columns): (usize, usize)) -> Vec<u8> {
    let size = bytes.len().checked_div(rows * columns).unwrap_or(0);
    let mut turned = vec![0; rows * columns * size];
    if turned.is_empty() {
        return turned;
    }
    turned.par_chunks_mut(TILE * rows * size).enumerate().for_each(|(tile, turned)| {
        let first = tile * TILE;
        let count = turned.len() / (rows * size);
        for top in (0..rows).step_by(TILE) {
            for column in 0..count {
                for row in top..rows.min(top + TILE) {
                    let from = (row * columns + first + column) * size;
                    let to = (column * rows + row) * size;
                    turned[to..to + size].copy_from_slice(&bytes[from..from + size]);
                }
            }
        }
    });
    turned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn columns_become_rows() {
        let bytes: Vec<u8> = (0..12).collect();
        assert_eq!(transposed(&bytes, (2, 3)), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert!(transposed(&[], (0, 3)).is_empty());
    }

    proptest! {
        #[test]
        fn twice_is_the_same(rows in 1..70_usize, columns in 1..70_usize, size in 1..5_usize) {
            let bytes: Vec<u8> = (0..rows * columns * size).map(|i| (i * 7 % 251) as u8).collect();
            let turned = transposed(&bytes, (rows, columns));
            prop_assert_eq!(transposed(&turned, (columns, rows)), bytes);
        }
    }
}
