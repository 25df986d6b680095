//! The mask of a weight matrix, one bit per weight.

use std::ops::Range;

use barber_metric::Dims;
use rayon::prelude::*;

use crate::simd::simd;

const BITS: usize = u64::BITS as usize;
const HALF: usize = BITS / 2;
/// Number of words that one task works on.
const WORDS: usize = 256;

/// Which weights of a matrix are kept. Weights are numbered row-major.
///
/// ```
/// use barber_metric::Dims;
/// use llm_barber::mask::Mask;
///
/// let mask = Mask::from_fn(Dims { rows: 2, columns: 2 }, |i| i != 1);
/// let mut weight = [1.0, 2.0, 3.0, 4.0];
/// mask.apply(&mut weight);
/// assert_eq!(weight, [1.0, 0.0, 3.0, 4.0]);
/// assert_eq!(mask.kept(), 3);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    dims: Dims,
    /// Set bits are kept weights; bits past the last weight are never set.
    words: Vec<u64>,
}

impl Mask {
    /// The mask that keeps the weights for which `kept` is true; it is called in order.
    pub fn from_fn(dims: Dims, mut kept: impl FnMut(usize) -> bool) -> Self {
        let words = (0..dims.len())
            .step_by(BITS)
            .map(|start| {
                (start..dims.len().min(start + BITS))
                    .fold(0, |word, i| word | u64::from(kept(i)) << (i - start))
            })
            .collect();
        Self { dims, words }
    }

    /// The mask that keeps every weight.
    pub fn kept_everywhere(dims: Dims) -> Self {
        let mut words = vec![u64::MAX; dims.len().div_ceil(BITS)];
        if let (Some(last), rest @ 1..) = (words.last_mut(), dims.len() % BITS) {
            *last = (1 << rest) - 1;
        }
        Self { dims, words }
    }

    /// The mask that keeps no weight.
    pub(crate) fn kept_nowhere(dims: Dims) -> Self {
        Self { dims, words: vec![0; dims.len().div_ceil(BITS)] }
    }

    /// The mask that keeps the weights for which `kept` is true.
    ///
    /// # Panics
    /// If there is not exactly one entry per weight.
    pub fn from_bools(dims: Dims, kept: &[bool]) -> Self {
        assert_eq!(kept.len(), dims.len(), "one entry per weight of a {dims} matrix");
        // Eight weights at a time: the product moves their lowest bits into one byte.
        let byte = |kept: &[bool; 8]| {
            let ones = u64::from_le_bytes(kept.map(u8::from));
            ones.wrapping_mul(0x0102_0408_1020_4080) >> (u64::BITS - 8)
        };
        let word = |kept: &[bool]| {
            let (eights, rest) = kept.as_chunks();
            let rest = rest.iter().rev().fold(0, |word, kept| word << 1 | u64::from(*kept));
            eights.iter().rev().fold(rest, |word, kept| word << 8 | byte(kept))
        };
        let words = kept.par_chunks(BITS).with_min_len(WORDS).map(word).collect();
        Self { dims, words }
    }

    /// The bits in words of 64 weights, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Number of bytes of a mask of this shape.
    pub(crate) const fn bytes(dims: Dims) -> usize {
        dims.len().div_ceil(BITS) * size_of::<u64>()
    }

    /// The mask with these bits; `None` if they do not fit the shape.
    pub fn from_bytes(dims: Dims, bytes: &[u8]) -> Option<Self> {
        let weights = dims.rows.checked_mul(dims.columns)?;
        let (words, rest) = bytes.as_chunks();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let past = |last: &u64| !weights.is_multiple_of(BITS) && last >> (weights % BITS) != 0;
        let fits = rest.is_empty() && words.len() == weights.div_ceil(BITS);
        (fits && !words.last().is_some_and(past)).then_some(Self { dims, words })
    }

    /// The mask of some rows.
    pub(crate) fn of_rows(&self, rows: Range<usize>) -> Self {
        let Dims { columns, .. } = self.dims;
        let (dims, first) = (Dims { rows: rows.len(), columns }, rows.start * columns);
        if dims == self.dims { self.clone() } else { Self::from_fn(dims, |i| self.get(first + i)) }
    }

    /// The shape of the weight matrix.
    pub const fn dims(&self) -> Dims {
        self.dims
    }

    /// Whether weight `i` is kept.
    ///
    /// # Panics
    /// If there is no weight `i`.
    #[inline]
    pub fn get(&self, i: usize) -> bool {
        self.check(i);
        self.words[i / BITS] >> (i % BITS) & 1 == 1
    }

    /// Keeps weight `i`, or prunes it.
    ///
    /// # Panics
    /// If there is no weight `i`.
    #[inline]
    pub fn set(&mut self, i: usize, kept: bool) {
        self.check(i);
        let bit = 1 << (i % BITS);
        let word = &mut self.words[i / BITS];
        *word = if kept { *word | bit } else { *word & !bit };
    }

    /// Panics if there is no weight `i`; the last word may have further bits.
    #[inline]
    fn check(&self, i: usize) {
        assert!(i < self.dims.len(), "no weight {i} in a {} matrix", self.dims);
    }

    /// Keeps the weights of `back` too, and prunes those of `gone`.
    pub(super) fn exchange(&mut self, back: &Self, gone: &Self) {
        for (word, (back, gone)) in self.words.iter_mut().zip(back.words.iter().zip(&gone.words)) {
            *word = (*word | back) & !gone;
        }
    }

    /// Number of kept weights that `other` prunes.
    pub fn without(&self, other: &Self) -> usize {
        let words = self.words.iter().zip(&other.words);
        words.map(|(own, other)| (own & !other).count_ones() as usize).sum()
    }

    /// The weights that one of two masks keeps and the other prunes, in order.
    pub fn differences<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        let words = self.words.iter().zip(&other.words).enumerate();
        words.flat_map(|(i, (own, other))| {
            let mut differ = own ^ other;
            std::iter::from_fn(move || {
                let bit = (differ != 0).then(|| differ.trailing_zeros() as usize)?;
                differ &= differ - 1;
                Some(i * BITS + bit)
            })
        })
    }

    /// Calls `see` with each of some consecutive weights, and whether it is kept.
    #[inline(always)]
    pub(super) fn each(&self, weights: Range<usize>, mut see: impl FnMut(usize, bool)) {
        let mut start = weights.start;
        while start < weights.end {
            let end = weights.end.min((start / BITS + 1) * BITS);
            let mut word = self.words[start / BITS] >> (start % BITS);
            for i in start..end {
                see(i, word & 1 == 1);
                word >>= 1;
            }
            start = end;
        }
    }

    /// Keeps only the weights that `other`, of the same shape, keeps too.
    pub fn and(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= other);
    }

    /// Number of kept weights.
    pub fn kept(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// One entry per weight; `true` is kept.
    pub fn to_bools(&self) -> Vec<bool> {
        let mut kept = vec![false; self.dims.len()];
        kept.par_chunks_mut(BITS).with_min_len(WORDS).zip(&self.words).for_each(|(kept, word)| {
            kept.iter_mut().enumerate().for_each(|(i, kept)| *kept = word >> i & 1 == 1);
        });
        kept
    }

    /// Sets the pruned weights to zero; the others keep their bits.
    ///
    /// # Panics
    /// If `weight` does not have the mask's shape.
    pub fn apply(&self, weight: &mut [f32]) {
        assert_eq!(weight.len(), self.dims.len(), "the weights of a {} matrix", self.dims);
        self.clear(weight, |x, bits| f32::from_bits(x.to_bits() & bits));
    }

    /// [`Mask::apply`] for weights of `SIZE` bytes each.
    ///
    /// # Panics
    /// If `bytes` does not have the mask's shape.
    pub(crate) fn apply_to_bytes<const SIZE: usize>(&self, bytes: &mut [u8]) {
        let (weights, rest) = bytes.as_chunks_mut::<SIZE>();
        assert!(
            weights.len() == self.dims.len() && rest.is_empty(),
            "the weights of a {} matrix",
            self.dims
        );
        self.clear(weights, |x, bits| x.map(|byte| byte & bits as u8));
    }

    /// Sets the pruned weights to zero; `leave` keeps the bits of a weight that are set in its
    /// mask.
    fn clear<T: Copy + Send>(&self, weights: &mut [T], leave: impl Fn(T, u32) -> T + Sync) {
        let chunks = weights.par_chunks_mut(BITS * WORDS).zip(self.words.par_chunks(WORDS));
        chunks.for_each(|(weights, words)| {
            // No branch, as it would be unpredictable. Half words, as they make wider vectors.
            simd!(for (weights, word) in weights.chunks_mut(BITS).zip(words) {
                let halves = [*word as u32, (word >> HALF) as u32];
                for (weights, half) in weights.chunks_mut(HALF).zip(halves) {
                    for (i, weight) in weights.iter_mut().enumerate() {
                        *weight = leave(*weight, 0u32.wrapping_sub(half >> i & 1));
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_end_inside_and_at_the_end_of_a_row() {
        for columns in [1, 63, 64, 65, 128, 130] {
            let dims = Dims { rows: 3, columns };
            let kept: Vec<bool> = (0..dims.len()).map(|i| i % 3 == 1 || i % 7 == 0).collect();
            let mut mask = Mask::from_bools(dims, &kept);
            assert_eq!(mask.to_bools(), kept);
            assert_eq!(mask.kept(), kept.iter().filter(|&&kept| kept).count());
            for first in [0, 1, columns, 2 * columns] {
                let mut seen = Vec::new();
                mask.each(first..dims.len(), |i, kept| seen.push((i, kept)));
                assert!(seen.into_iter().eq((first..).zip(kept[first..].iter().copied())));
            }
            let before = mask.clone();
            (0..dims.len()).step_by(3).for_each(|i| mask.set(i, !kept[i]));
            assert!(mask.differences(&before).eq((0..dims.len()).step_by(3)));
            (0..dims.len()).for_each(|i| mask.set(i, !kept[i]));
            assert_eq!(mask, Mask::from_fn(dims, |i| !kept[i]));
            let mut bytes = mask.to_bytes();
            assert_eq!(Mask::from_bytes(dims, &bytes), Some(mask.clone()));
            assert_eq!(Mask::from_bytes(dims, &bytes[1..]), None);
            assert_eq!(Mask::from_bytes(Dims { rows: 100, ..dims }, &bytes), None);
            if let Some(last) = bytes.last_mut() {
                *last |= 0x80;
            }
            let padded = !dims.len().is_multiple_of(BITS);
            assert_eq!(Mask::from_bytes(dims, &bytes).is_none(), padded);
            (0..dims.len()).for_each(|i| mask.set(i, true));
            assert_eq!(mask, Mask::kept_everywhere(dims));
            (0..dims.len()).for_each(|i| mask.set(i, false));
            assert_eq!(mask, Mask::kept_nowhere(dims));
        }
    }

    #[test]
    fn an_empty_matrix_has_an_empty_mask() {
        let mask = Mask::kept_everywhere(Dims { rows: 0, columns: 4 });
        assert_eq!((mask.kept(), mask.to_bools()), (0, vec![]));
        mask.apply(&mut []);
    }

    #[test]
    fn pruned_weights_become_positive_zero_and_kept_ones_keep_their_bits() {
        let nan = f32::from_bits(0x7fc0_1234);
        let mut weight = [-0.0, nan, -1.0, nan];
        Mask::from_bools(Dims { rows: 1, columns: 4 }, &[true, true, false, false])
            .apply(&mut weight);
        let bits = weight.map(f32::to_bits);
        assert_eq!(bits, [0x8000_0000, 0x7fc0_1234, 0, 0]);
        let mut bytes = [1, 2, 3, 4, 5, 6];
        Mask::from_bools(Dims { rows: 3, columns: 1 }, &[false, true, false])
            .apply_to_bytes::<2>(&mut bytes);
        assert_eq!(bytes, [0, 0, 3, 4, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "no weight 6 in a [2, 3] matrix")]
    fn the_padding_cannot_be_set() {
        Mask::kept_nowhere(Dims { rows: 2, columns: 3 }).set(6, true);
    }
}
