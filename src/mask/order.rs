//! The order of scores: selects exactly the requested number of lowest scores, deterministically.

/// An integer with the same order as the scores; `!key` reverses the order. Both zeros have the
/// same key. NaN has no place in the order.
#[inline]
pub(super) fn key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The lowest keys of a list: all below a threshold, and the first few of those equal to it. This
/// needs no list of indices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lowest {
    threshold: u32,
    ties: usize,
}

impl Lowest {
    /// The lowest `count` of `keys`, which this reorders.
    pub(super) fn of(keys: &mut [u32], count: usize) -> Self {
        let Some(last) = count.checked_sub(1) else { return Self { threshold: 0, ties: 0 } };
        let (low, &mut threshold, _) = keys.select_nth_unstable(last);
        let below = low.iter().filter(|&&key| key < threshold).count();
        Self { threshold, ties: count - below }
    }

    /// Whether the next key of the list is one of the lowest.
    #[inline]
    pub(super) fn takes(&mut self, key: u32) -> bool {
        if key == self.threshold && self.ties > 0 {
            self.ties -= 1;
            return true;
        }
        key < self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_ordered_as_scores() {
        let scores = [
            f32::NEG_INFINITY,
            f32::MIN,
            -1.0,
            -f32::MIN_POSITIVE,
            -1e-45,
            0.0,
            1e-45,
            f32::MIN_POSITIVE,
            1.0,
            f32::MAX,
            f32::INFINITY,
        ];
        assert!(scores.map(key).is_sorted_by(|a, b| a < b));
        assert_eq!(key(-0.0), key(0.0));
    }

    #[test]
    fn among_equals_the_first_are_taken() {
        let keys = [3, 1, 2, 1, 1, 0];
        for (count, expected) in [
            (0, [false; 6]),
            (1, [false, false, false, false, false, true]),
            (3, [false, true, false, true, false, true]),
            (5, [false, true, true, true, true, true]),
            (6, [true; 6]),
        ] {
            let mut lowest = Lowest::of(&mut keys.clone(), count);
            assert_eq!(keys.map(|key| lowest.takes(key)), expected, "{count} lowest");
        }
    }
}
