//! Work on matrices that ranks share, once all have the same sums: each rank finds something of some rows
//! of a matrix, or of some whole matrices, and all get what the others found.

use std::ops::Range;

use super::{Ranks, sums::share};

/// The rank of each item, by the work that it takes: the items that take most go first, each to the rank
/// that has least to do so far.
pub(crate) fn owners(work: &[f64], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..work.len()).collect();
    order.sort_by(|a, b| work[*b].total_cmp(&work[*a]));
    let (mut loads, mut owners) = (vec![0.0; ranks], vec![0; work.len()]);
    for item in order {
        let least = (0..ranks).min_by(|a, b| f64::total_cmp(&loads[*a], &loads[*b])).unwrap_or(0);
        loads[least] += work[item];
        owners[item] = least;
    }
    owners
}

impl Ranks {
    /// The rows of a matrix that this rank works on. They begin at a multiple of `block`.
    pub(crate) fn own_rows(&self, rows: usize, block: usize) -> Range<usize> {
        share_of_rows(rows, block, self.rank(), self.size())
    }

    /// What `of` finds of the weights of some rows of a matrix, for all rows: each rank asks it for its
    /// own, which begin at a multiple of `block`.
    pub(crate) fn of_rows<E>(
        &self,
        rows: usize,
        block: usize,
        of: impl FnOnce(Range<usize>) -> Result<Vec<bool>, E>,
    ) -> Result<Vec<bool>, E> {
        let own = self.found(of, rows, block)?;
        if self.size() == 1 {
            return Ok(own);
        }
        Ok(self.gather(&pack_truths(&own)).iter().flat_map(|bytes| unpack_truths(bytes)).collect())
    }

    /// The numbers that `of` finds of some rows of a matrix, for all rows, as [`Ranks::of_rows`].
    pub(crate) fn numbers_of_rows<E>(
        &self,
        (rows, columns): (usize, usize),
        block: usize,
        of: impl FnOnce(Range<usize>) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f32>, E> {
        let own = self.found(of, rows, block)?;
        if self.size() == 1 {
            return Ok(own);
        }
        let of_rank = |rank| share_of_rows(rows, block, rank, self.size()).len() * columns;
        let counts: Vec<usize> = (0..self.size()).map(of_rank).collect();
        Ok(self.share_all(&own, &counts))
    }

    /// What `of` finds of this rank's rows; nothing, if it has none.
    fn found<T, E>(
        &self,
        of: impl FnOnce(Range<usize>) -> Result<Vec<T>, E>,
        rows: usize,
        block: usize,
    ) -> Result<Vec<T>, E> {
        let own = self.own_rows(rows, block);
        if own.is_empty() { Ok(Vec::new()) } else { of(own) }
    }

    /// The bytes of all rows, of which `own` are of this rank's.
    pub(crate) fn bytes_of_rows(&self, own: Vec<u8>) -> Vec<u8> {
        if self.size() == 1 { own } else { self.gather(&own).concat() }
    }

    /// Shows `see` what `of` finds of each item, in the items' order: each rank asks it for its own, by
    /// the work that items take, and sends the others `pack`ed bytes.
    pub(crate) fn of_items<T, E>(
        &self,
        work: &[f64],
        mut of: impl FnMut(usize) -> Result<T, E>,
        (pack, unpack): (impl Fn(&T) -> Vec<u8>, impl Fn(usize, &[u8]) -> T),
        mut see: impl FnMut(usize, T) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.size() == 1 {
            return (0..work.len()).try_for_each(|item| see(item, of(item)?));
        }
        let owners = owners(work, self.size());
        let own = |item: usize| (owners[item] == self.rank()).then(|| of(item)).transpose();
        let found: Vec<Option<T>> = (0..work.len()).map(own).collect::<Result<_, E>>()?;
        for (item, own) in found.into_iter().enumerate() {
            let all = self.gather(&own.as_ref().map(&pack).unwrap_or_default());
            see(item, own.unwrap_or_else(|| unpack(item, &all[owners[item]])))?;
        }
        Ok(())
    }
}

/// The rows of a rank of `size`.
fn share_of_rows(rows: usize, block: usize, rank: usize, size: usize) -> Range<usize> {
    let blocks = share(rows.div_ceil(block), rank, size);
    let [start, end] = [blocks.start, blocks.end].map(|of| rows.min(of * block));
    start..end
}

/// Truths as bits, after their number.
fn pack_truths(truths: &[bool]) -> Vec<u8> {
    let mut bytes = (truths.len() as u64).to_le_bytes().to_vec();
    let byte = |of: &[bool]| of.iter().rev().fold(0, |byte, truth| byte << 1 | u8::from(*truth));
    bytes.extend(truths.chunks(8).map(byte));
    bytes
}

/// The truths that were packed.
fn unpack_truths(bytes: &[u8]) -> Vec<bool> {
    let Some((count, bytes)) = bytes.split_first_chunk() else { return Vec::new() };
    let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
    bits.take(u64::from_le_bytes(*count) as usize).collect()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::ranks::threads;

    #[test]
    fn packed_truths_come_back() {
        for count in [0, 1, 7, 8, 9, 70] {
            let truths: Vec<bool> = (0..count).map(|i| i % 3 == 0).collect();
            let bytes = pack_truths(&truths);
            assert_eq!(
                (bytes.len(), unpack_truths(&bytes)),
                (8 + usize::div_ceil(count, 8), truths)
            );
        }
    }

    #[test]
    fn the_largest_items_go_to_different_ranks() {
        assert_eq!(owners(&[1.0, 9.0, 1.0, 8.0, 1.0], 2), [1, 0, 0, 1, 1]);
        assert_eq!(owners(&[3.0, 1.0], 1), [0, 0]);
        assert_eq!(owners(&[3.0, 1.0], 5), [0, 1]);
        assert!(owners(&[], 3).is_empty());
    }

    #[test]
    fn each_rank_works_on_its_own_rows_and_items_and_gets_all() {
        for size in 1..5 {
            for (rows, block) in [(0, 4), (1, 4), (9, 4), (40, 1)] {
                for (found, numbers, worked) in threads::run(size, |ranks| {
                    let own = ranks.own_rows(rows, block);
                    assert!(own.is_empty() || own.start.is_multiple_of(block));
                    let mut worked = own.len();
                    let odd =
                        |of: Range<usize>| Ok::<_, Infallible>(of.map(|i| i % 2 == 1).collect());
                    let numbers = |of: Range<usize>| {
                        worked += of.len();
                        Ok::<_, Infallible>(of.flat_map(|i| [i as f32; 3]).collect())
                    };
                    let numbers = ranks.numbers_of_rows((rows, 3), block, numbers).unwrap();
                    (ranks.of_rows(rows, block, odd).unwrap(), numbers, worked)
                }) {
                    assert_eq!(found, (0..rows).map(|i| i % 2 == 1).collect::<Vec<_>>());
                    assert_eq!(numbers, (0..rows).flat_map(|i| [i as f32; 3]).collect::<Vec<_>>());
                    assert!(worked <= 2 * rows.div_ceil(block).div_ceil(size) * block);
                }
            }
            let names = ["a", "bc", "", "def"].map(String::from);
            let found = threads::run(size, |ranks| {
                let (mut worked, mut seen) = (0, Vec::new());
                let of = |item: usize| {
                    worked += 1;
                    Ok::<_, Infallible>(names[item].clone())
                };
                let see = |item, name| {
                    seen.push((item, name));
                    Ok(())
                };
                let pack = |name: &String| name.clone().into_bytes();
                let unpack = |_, bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                ranks.of_items(&[1.0; 4], of, (pack, unpack), see).unwrap();
                (worked, seen)
            });
            assert_eq!(found.iter().map(|of| of.0).sum::<usize>(), 4);
            let expected: Vec<_> = names.iter().cloned().enumerate().collect();
            assert!(found.iter().all(|of| of.1 == expected && of.0 <= 4_usize.div_ceil(size)));
        }
    }
}
