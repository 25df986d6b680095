//! Draws the places of random samples of a text, so that held-out samples have no token in common
//! with the others.

use std::ops::Range;

use super::Samples;
use crate::random::SplitMix64;

/// The indices of the first tokens of all samples in a text of `tokens` tokens, the held-out ones
/// last; `None` if the text is too short.
pub(super) fn places(tokens: usize, wanted: &Samples) -> Option<Vec<usize>> {
    let mut random = SplitMix64::new(wanted.seed);
    let [calibration, held_out] = stretches(tokens, wanted, &mut random)?;
    let mut places = Vec::with_capacity(wanted.count + wanted.held_out);
    for (stretches, count) in [(calibration, wanted.count), (held_out, wanted.held_out)] {
        let ways = |stretch: &Range<usize>| stretch.len() + 1 - wanted.sequence_length;
        let all: usize = stretches.iter().map(ways).sum();
        for _ in 0..count {
            let mut place = random.below(all);
            let stretch = stretches.iter().find(|stretch| {
                let within = place < ways(stretch);
                place -= if within { 0 } else { ways(stretch) };
                within
            });
            places.push(stretch?.start + place);
        }
    }
    Some(places)
}

/// Minimum number of tokens of a text.
pub(super) fn least(wanted: &Samples) -> usize {
    wanted.sequence_length.saturating_mul(if wanted.held_out > 0 { 2 } else { 1 })
}

/// The stretches of the text for statistics, and those for held-out samples; each is long enough
/// for a sample. The text is cut into blocks, and a stretch of each block, at its start, its end or
/// a random place, is held out: the same fraction as that of held-out samples. There is a block for
/// each held-out sample, or fewer if a stretch would then have only one place.
fn stretches(
    tokens: usize,
    wanted: &Samples,
    random: &mut SplitMix64,
) -> Option<[Vec<Range<usize>>; 2]> {
    let &Samples { count, held_out, sequence_length: length, .. } = wanted;
    if tokens < least(wanted) {
        return None;
    }
    if held_out == 0 {
        return Some([std::iter::once(0..tokens).collect(), Vec::new()]);
    }
    let of_fewer = tokens * count.min(held_out) / (count + held_out);
    let blocks = (of_fewer / (2 * length)).clamp(1, held_out);
    let [mut calibration, mut held]: [Vec<Range<usize>>; 2] = [Vec::new(), Vec::new()];
    for block in 0..blocks {
        let [start, end] = [block, block + 1].map(|block| block * tokens / blocks);
        let taken = (end - start) * held_out / (count + held_out);
        let taken = taken.clamp(length, end - start - length);
        // The rest of the block is empty, or long enough for a sample.
        let rest = end - start - taken;
        let inside = (rest + 1).saturating_sub(2 * length);
        let offset = match random.below(if inside > 0 { 3 } else { 2 }) {
            0 => 0,
            1 => rest,
            _ => length + random.below(inside),
        };
        let own = start + offset..start + offset + taken;
        for other in [start..own.start, own.end..end] {
            match calibration.last_mut() {
                _ if other.is_empty() => {}
                Some(last) if last.end == other.start => last.end = other.end,
                _ => calibration.push(other),
            }
        }
        held.push(own);
    }
    Some([calibration, held])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::calibration::Selection;

    fn wanted(count: usize, held_out: usize, sequence_length: usize, seed: u64) -> Samples {
        Samples { count, held_out, sequence_length, seed, selection: Selection::Random }
    }

    proptest! {
        #[test]
        fn held_out_samples_share_no_token_with_the_others(
            tokens in 0..20_000_usize,
            count in 1..40_usize,
            held_out in 0..40_usize,
            length in 1..400_usize,
            seed: u64,
        ) {
            let wanted = wanted(count, held_out, length, seed);
            let found = places(tokens, &wanted);
            prop_assert_eq!(found.is_some(), tokens >= least(&wanted));
            let found = found.unwrap_or_default();
            prop_assert!(found.iter().all(|place| place + length <= tokens));
            if let Some((calibration, held)) = found.split_at_checked(count) {
                prop_assert_eq!(held.len(), held_out);
                for (one, other) in calibration.iter().flat_map(|c| held.iter().map(move |h| (c, h))) {
                    prop_assert!(one.abs_diff(*other) >= length, "{} {}", one, other);
                }
            }
        }

        #[test]
        fn without_held_out_samples_every_place_of_the_text_is_as_likely(
            (length, tokens) in (1..400_usize).prop_flat_map(|length| (Just(length), length..20_000)),
            seed: u64,
        ) {
            let mut random = SplitMix64::new(seed);
            let expected: Vec<_> = (0..9).map(|_| random.below(tokens + 1 - length)).collect();
            prop_assert_eq!(places(tokens, &wanted(9, 0, length, seed)), Some(expected));
        }
    }

    #[test]
    fn any_token_may_calibrate_and_any_may_be_held_out() {
        let (tokens, length) = (700, 10);
        let mut covered = [vec![false; tokens], vec![false; tokens]];
        for seed in 0..4000 {
            let found = places(tokens, &wanted(16, 4, length, seed)).unwrap();
            for (i, place) in found.into_iter().enumerate() {
                covered[usize::from(i >= 16)][place..place + length].fill(true);
            }
        }
        assert!(covered.iter().flatten().all(|covered| *covered));
    }

    #[test]
    fn held_out_samples_are_from_all_over_the_text() {
        let found = places(1 << 20, &wanted(128, 16, 2048, 7)).unwrap();
        let quarters: std::collections::BTreeSet<_> =
            found[128..].iter().map(|place| place >> 18).collect();
        assert_eq!(quarters.len(), 4);
    }
}
