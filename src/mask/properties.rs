//! Properties of all masks.

use barber_metric::{Dims, LayerStats};
use proptest::{collection::vec, prelude::*};

use super::{Comparison, Init, Mask, Pattern, Scope, Scored, Tile, rebuild};

/// A weight matrix of a group: its scores and its mask.
#[derive(Clone, Debug)]
struct Matrix {
    scores: Vec<f32>,
    mask: Mask,
}

fn dims(m: usize) -> impl Strategy<Value = Dims> {
    (1..6usize, 1..5usize).prop_map(move |(rows, tiles)| Dims { rows, columns: tiles * m })
}

/// Scores of which many are equal, or any at all but NaN.
fn scores(len: usize) -> impl Strategy<Value = Vec<f32>> {
    let few = (-4..5i8).prop_map(f32::from);
    let any = any::<f32>().prop_filter("not a number", |score| !score.is_nan());
    prop_oneof![vec(few, len), vec(any, len)]
}

fn any_pattern() -> impl Strategy<Value = Pattern> {
    let n_of_m = (2..7usize).prop_flat_map(|m| (1..m).prop_map(move |n| Pattern::n_of_m(n, m)));
    prop_oneof![Just(Pattern::UNSTRUCTURED), n_of_m]
}

fn tile(pattern: Pattern) -> Option<(usize, usize)> {
    // The tiles of patterns do not depend on the width.
    pattern.tile(1).map(|Tile { n, m }| (n, m))
}

/// A matrix whose mask follows the pattern.
fn matrix(pattern: Pattern) -> impl Strategy<Value = Matrix> {
    let m = tile(pattern).map_or(3, |(_, m)| m);
    dims(m).prop_flat_map(move |dims| {
        (scores(dims.len()), vec(any::<bool>(), dims.len())).prop_map(move |(scores, mut kept)| {
            if let Some((n, m)) = tile(pattern) {
                for tile in kept.chunks_mut(m) {
                    let mut left = n;
                    for kept in tile {
                        *kept &= left > 0;
                        left -= usize::from(*kept);
                    }
                }
            }
            Matrix { scores, mask: Mask::from_bools(dims, &kept) }
        })
    })
}

fn group() -> impl Strategy<Value = (Pattern, Vec<Matrix>)> {
    any_pattern().prop_flat_map(|pattern| (Just(pattern), vec(matrix(pattern), 1..4)))
}

/// A group without a pattern.
fn free_group() -> impl Strategy<Value = Vec<Matrix>> {
    vec(matrix(Pattern::UNSTRUCTURED), 1..4)
}

fn any_scope() -> impl Strategy<Value = Scope> {
    prop::sample::select(&Scope::ALL[..])
}

fn alpha() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), 0.0..=1.0]
}

/// The rebuilt masks, and the swaps of each matrix.
fn rebuilt(
    group: &[Matrix],
    scope: Scope,
    pattern: Pattern,
    alpha: f64,
) -> (Vec<Mask>, Vec<usize>) {
    rebuilt_by(group, scope, pattern, alpha, Comparison::Pools)
}

fn rebuilt_by(
    group: &[Matrix],
    scope: Scope,
    pattern: Pattern,
    alpha: f64,
    comparison: Comparison,
) -> (Vec<Mask>, Vec<usize>) {
    let mut masks: Vec<Mask> = group.iter().map(|matrix| matrix.mask.clone()).collect();
    let mut scored: Vec<_> = group
        .iter()
        .zip(&mut masks)
        .map(|(matrix, mask)| Scored { name: "w", scores: &matrix.scores, mask })
        .collect();
    let swaps = rebuild(&mut scored, scope, pattern, alpha, comparison).expect("valid input");
    (masks, swaps)
}

/// The places of each pool, by the definition of the scopes rather than by their code.
fn pools(group: &[Matrix], scope: Scope) -> Vec<Vec<(usize, usize)>> {
    let mut pools = std::collections::BTreeMap::<_, Vec<_>>::new();
    for (m, matrix) in group.iter().enumerate() {
        let Dims { rows, columns } = matrix.mask.dims();
        for row in 0..rows {
            for column in 0..columns {
                let pool = match scope {
                    Scope::Model | Scope::Group => (0, 0),
                    Scope::Layer => (m, 0),
                    Scope::Row => (m, row),
                    Scope::Column => (m, column),
                };
                pools.entry(pool).or_default().push((m, row * columns + column));
            }
        }
    }
    pools.into_values().collect()
}

/// The pairs that the pool may swap, by sorting it: what comes back and what goes.
fn pairs(
    group: &[Matrix],
    pool: &[(usize, usize)],
    alpha: f64,
) -> Vec<((usize, usize), (usize, usize))> {
    let score = |&(m, i): &(usize, usize)| group[m].scores[i];
    let (mut prune, mut grow): (Vec<_>, Vec<_>) =
        pool.iter().copied().partition(|&(m, i)| group[m].mask.get(i));
    // Both sorts are stable: among equals the first stay first.
    grow.sort_by(|a, b| score(b).partial_cmp(&score(a)).expect("numbers"));
    prune.sort_by(|a, b| score(a).partial_cmp(&score(b)).expect("numbers"));
    let all: Vec<_> = grow.into_iter().zip(prune).collect();
    let worth = all.iter().filter(|(comes, goes)| score(comes) > score(goes)).count();
    let swapped = (worth as f64 * alpha).floor() as usize;
    all[..swapped].to_vec()
}

fn kept_in(masks: &[Mask], pool: &[(usize, usize)]) -> usize {
    pool.iter().filter(|&&(m, i)| masks[m].get(i)).count()
}

/// Positive scores, no two alike, in an arbitrary order.
fn distinct(len: usize) -> impl Strategy<Value = Vec<f32>> {
    Just((1..=u16::try_from(len).expect("few")).map(f32::from).collect::<Vec<_>>()).prop_shuffle()
}

proptest! {
    /// The masks are those of the definition: sort, compare, swap.
    #[test]
    fn unstructured_rebuilds_are_the_definition(
        group in free_group(), scope in any_scope(), alpha in alpha(),
    ) {
        let mut expected: Vec<Mask> = group.iter().map(|matrix| matrix.mask.clone()).collect();
        for pool in pools(&group, scope) {
            for ((m, comes), (n, goes)) in pairs(&group, &pool, alpha) {
                expected[m].set(comes, true);
                expected[n].set(goes, false);
            }
        }
        prop_assert_eq!(rebuilt(&group, scope, Pattern::UNSTRUCTURED, alpha).0, expected);
    }

    /// The k-th best of what came back scores higher than the k-th worst of what went, and no
    /// weight that stayed pruned scores higher than one that came back.
    #[test]
    fn every_swap_is_for_the_better(group in free_group(), scope in any_scope(), alpha in alpha()) {
        let (masks, _) = rebuilt(&group, scope, Pattern::UNSTRUCTURED, alpha);
        for pool in pools(&group, scope) {
            let of = |before: bool, after: bool| {
                let mut scores: Vec<f32> = pool
                    .iter()
                    .filter(|&&(m, i)| {
                        (group[m].mask.get(i), masks[m].get(i)) == (before, after)
                    })
                    .map(|&(m, i)| group[m].scores[i])
                    .collect();
                scores.sort_by(f32::total_cmp);
                scores
            };
            let (back, gone) = (of(false, true), of(true, false));
            prop_assert_eq!(back.len(), gone.len());
            for (comes, goes) in back.iter().rev().zip(&gone) {
                prop_assert!(comes > goes, "{comes} came back for {goes}");
            }
            let highest_away = of(false, false).last().copied().unwrap_or(f32::NEG_INFINITY);
            prop_assert!(back.first().is_none_or(|&comes| comes >= highest_away));
            let lowest_there = of(true, true).first().copied().unwrap_or(f32::INFINITY);
            prop_assert!(gone.last().is_none_or(|&goes| goes <= lowest_there));
        }
    }

    /// Without a pattern every pool keeps as many weights as before.
    #[test]
    fn pools_keep_their_count(group in free_group(), scope in any_scope(), alpha in alpha()) {
        let before: Vec<Mask> = group.iter().map(|matrix| matrix.mask.clone()).collect();
        let (after, _) = rebuilt(&group, scope, Pattern::UNSTRUCTURED, alpha);
        for pool in pools(&group, scope) {
            prop_assert_eq!(kept_in(&before, &pool), kept_in(&after, &pool));
        }
    }

    /// Under N:M every tile keeps as many weights as before, and those that came back are among
    /// those that the pools chose.
    #[test]
    fn tiles_keep_their_count((pattern, group) in group(), scope in any_scope(), alpha in alpha()) {
        let (after, swaps) = rebuilt(&group, scope, pattern, alpha);
        let chosen: Vec<_> = pools(&group, scope)
            .iter()
            .flat_map(|pool| pairs(&group, pool, alpha))
            .map(|(comes, _)| comes)
            .collect();
        for (m, (matrix, after)) in group.iter().zip(&after).enumerate() {
            prop_assert_eq!(pattern.check("w", after), Ok(()));
            let (old, new) = (matrix.mask.to_bools(), after.to_bools());
            let Some((_, size)) = tile(pattern) else { continue };
            let mut back = 0;
            for (t, (old, new)) in old.chunks(size).zip(new.chunks(size)).enumerate() {
                let kept = |mask: &[bool]| mask.iter().filter(|&&kept| kept).count();
                prop_assert_eq!(kept(old), kept(new));
                let places = t * size..(t + 1) * size;
                let wanted = chosen.iter().filter(|&&(n, i)| n == m && places.contains(&i)).count();
                let came: Vec<_> = (0..size).filter(|&i| !old[i] && new[i]).collect();
                prop_assert!(came.iter().all(|i| chosen.contains(&(m, t * size + i))));
                prop_assert_eq!(came.len(), wanted.min(kept(old)));
                // Those that stay away score no higher than those that came.
                let score = |&i: &usize| matrix.scores[t * size + i];
                let lowest_came = came.iter().map(score).fold(f32::INFINITY, f32::min);
                let away = |i: &usize| !came.contains(i) && chosen.contains(&(m, t * size + i));
                prop_assert!((0..size).filter(away).all(|i| score(&i) <= lowest_came));
                // Of the tile's kept weights the lowest went.
                let scores = &matrix.scores[places];
                let worst_left = (0..size).filter(|&i| old[i] && new[i]).map(|i| scores[i]);
                let worst_left = worst_left.fold(f32::INFINITY, f32::min);
                prop_assert!((0..size).all(|i| !old[i] || new[i] || scores[i] <= worst_left));
                back += came.len();
            }
            prop_assert_eq!(back, swaps[m]);
        }
    }

    /// Compared inside tiles, no tile's score falls, and with all swaps made none is left.
    #[test]
    fn tiles_only_gain((pattern, group) in group(), scope in any_scope(), alpha in alpha()) {
        let Some((_, size)) = tile(pattern) else { return Ok(()) };
        let (masks, swaps) = rebuilt_by(&group, scope, pattern, alpha, Comparison::Tiles);
        for ((matrix, after), swaps) in group.iter().zip(&masks).zip(swaps) {
            prop_assert_eq!(pattern.check("w", after), Ok(()));
            prop_assert_eq!(after.without(&matrix.mask), swaps);
            for start in (0..matrix.scores.len()).step_by(size) {
                let kept = |mask: &Mask| {
                    let mut kept: Vec<f32> = (start..start + size)
                        .filter(|&i| mask.get(i))
                        .map(|i| matrix.scores[i])
                        .collect();
                    kept.sort_by(f32::total_cmp);
                    kept
                };
                let (old, new) = (kept(&matrix.mask), kept(after));
                prop_assert_eq!(old.len(), new.len());
                prop_assert!(old.iter().zip(&new).all(|(old, new)| old <= new));
            }
        }
        let all = rebuilt_by(&group, scope, pattern, 1.0, Comparison::Tiles).0;
        let again: Vec<Matrix> = group
            .iter()
            .zip(&all)
            .map(|(matrix, mask)| Matrix { mask: mask.clone(), scores: matrix.scores.clone() })
            .collect();
        prop_assert_eq!(rebuilt_by(&again, scope, pattern, 1.0, Comparison::Tiles).0, all);
    }

    #[test]
    fn alpha_zero_changes_nothing((pattern, group) in group(), scope in any_scope()) {
        let (masks, swaps) = rebuilt(&group, scope, pattern, 0.0);
        for ((matrix, mask), swaps) in group.iter().zip(&masks).zip(swaps) {
            prop_assert_eq!(&matrix.mask, mask);
            prop_assert_eq!(swaps, 0);
        }
    }

    #[test]
    fn equal_scores_change_nothing(
        (pattern, mut group) in group(), scope in any_scope(), score in any::<i8>(),
    ) {
        for matrix in &mut group {
            matrix.scores.fill(f32::from(score));
        }
        let (masks, _) = rebuilt(&group, scope, pattern, 1.0);
        prop_assert!(group.iter().map(|matrix| &matrix.mask).eq(&masks));
    }

    /// Swaps that are all done leave nothing to swap.
    #[test]
    fn rebuilding_again_changes_nothing(group in free_group(), scope in any_scope()) {
        let (masks, _) = rebuilt(&group, scope, Pattern::UNSTRUCTURED, 1.0);
        let again: Vec<_> = group
            .into_iter()
            .zip(&masks)
            .map(|(matrix, mask)| Matrix { mask: mask.clone(), ..matrix })
            .collect();
        prop_assert_eq!(rebuilt(&again, scope, Pattern::UNSTRUCTURED, 1.0).0, masks);
    }

    /// Only the order of the scores counts; times a power of two it is the same exactly.
    #[test]
    fn the_metrics_scale_does_not_matter(
        (pattern, mut group) in group(), scope in any_scope(), alpha in alpha(), exponent in -40..41,
    ) {
        for matrix in &mut group {
            // Far from where scaling would round.
            matrix.scores.iter_mut().for_each(|score| *score = score.clamp(-8.0, 8.0).trunc());
        }
        let masks = rebuilt(&group, scope, pattern, alpha);
        for matrix in &mut group {
            matrix.scores.iter_mut().for_each(|score| *score *= 2.0_f32.powi(exponent));
        }
        prop_assert_eq!(rebuilt(&group, scope, pattern, alpha), masks);
    }

    /// Rows have no order: permuting them permutes the mask's.
    #[test]
    fn the_order_of_rows_does_not_matter(
        (pattern, matrix, order) in any_pattern().prop_flat_map(|pattern| {
            matrix(pattern).prop_flat_map(move |Matrix { mask, .. }| {
                let dims = mask.dims();
                let order = Just((0..dims.rows).collect::<Vec<_>>()).prop_shuffle();
                let matrix = distinct(dims.len())
                    .prop_map(move |scores| Matrix { scores, mask: mask.clone() });
                (Just(pattern), matrix, order)
            })
        }),
        scope in any_scope(),
        alpha in alpha(),
    ) {
        let dims = matrix.mask.dims();
        let from = |i: usize| order[i / dims.columns] * dims.columns + i % dims.columns;
        let permuted = |mask: &Mask| Mask::from_fn(dims, |i| mask.get(from(i)));
        let moved = Matrix {
            scores: (0..dims.len()).map(|i| matrix.scores[from(i)]).collect(),
            mask: permuted(&matrix.mask),
        };
        let (masks, swaps) = rebuilt(&[matrix], scope, pattern, alpha);
        let (moved_masks, moved_swaps) = rebuilt(&[moved], scope, pattern, alpha);
        prop_assert_eq!(permuted(&masks[0]), moved_masks[0].clone());
        prop_assert_eq!(swaps, moved_swaps);
    }

    #[test]
    fn applying_a_mask_leaves_kept_weights_as_they_are(
        (mask, bits) in matrix(Pattern::UNSTRUCTURED).prop_flat_map(|Matrix { mask, .. }| {
            let len = mask.dims().len();
            (Just(mask), vec(any::<u32>(), len))
        }),
    ) {
        let mut weight: Vec<f32> = bits.iter().copied().map(f32::from_bits).collect();
        mask.apply(&mut weight);
        for (i, (after, before)) in weight.iter().zip(bits).enumerate() {
            prop_assert_eq!(after.to_bits(), if mask.get(i) { before } else { 0 });
        }
    }

    /// An initial mask prunes exactly the lowest scores of each pool or tile, as many as the ratio
    /// says.
    #[test]
    fn initial_masks_prune_the_lowest(
        (pattern, weight, mask, norms) in any_pattern().prop_flat_map(|pattern| {
            matrix(pattern).prop_flat_map(move |Matrix { scores, mask }| {
                // Finite scores: an infinite weight that never has an input has none.
                let weight = scores.iter().map(|w| w.clamp(-1e9, 1e9)).collect::<Vec<_>>();
                let norms = vec((0..5u8).prop_map(f32::from), mask.dims().columns);
                (Just(pattern), Just(weight), Just(mask), norms)
            })
        }),
        wanda in any::<bool>(),
        ratio in 0.0..=1.0_f64,
    ) {
        let dims = mask.dims();
        let squares: Vec<f32> = norms.iter().map(|norm| norm * norm).collect();
        let stats = LayerStats {
            name: "w",
            dims,
            weight: &weight,
            mask: &mask.to_bools(),
            input_square: Some(&squares),
            ..LayerStats::default()
        };
        let init = Init::named(if wanda { "wanda" } else { "magnitude" }).expect("an initial mask");
        let kept = init.choose(&stats, pattern, ratio, None).expect("valid input").mask.to_bools();
        let scores: Vec<f32> = weight
            .iter()
            .enumerate()
            .map(|(i, w)| w.abs() * if wanda { norms[i % dims.columns] } else { 1.0 })
            .collect();
        let whole = if wanda { dims.columns } else { dims.len() };
        let (pool, pruned) = tile(pattern)
            .map_or((whole, (ratio * whole as f64).floor() as usize), |(n, m)| (m, m - n));
        for (kept, scores) in kept.chunks(pool).zip(scores.chunks(pool)) {
            prop_assert_eq!(kept.iter().filter(|&&kept| !kept).count(), pruned);
            let score = |which: bool| {
                let kept_and_score = kept.iter().zip(scores);
                kept_and_score.filter(move |(kept, _)| **kept == which).map(|(_, score)| *score)
            };
            let highest_pruned = score(false).fold(f32::NEG_INFINITY, f32::max);
            prop_assert!(score(true).all(|score| score >= highest_pruned));
        }
    }
}
