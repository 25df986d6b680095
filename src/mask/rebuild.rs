//! LLM-Barber's rebuild: pruned weights with high scores and kept weights with low scores change
//! places (arXiv 2408.10631).

use rayon::prelude::*;

use super::{
    Error, Mask, Pattern, Scope, Tile,
    order::{Lowest, key},
    scope::Pool,
};

/// A weight matrix whose mask is rebuilt.
#[derive(Debug)]
pub struct Scored<'a> {
    /// The matrix's tensor name.
    pub name: &'a str,
    /// The score of each weight, row-major: the loss that its removal would cause.
    pub scores: &'a [f32],
    /// The mask.
    pub mask: &'a mut Mask,
}

/// The kept weights that a pruned weight is compared with under an N:M pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// The kept weights of its pool, as in the paper; the score of a tile may fall.
    Pools,
    /// The kept weights of its tile: the score of no tile falls.
    Tiles,
}

/// Rebuilds the masks of a group of matrices; returns the number of swaps in each matrix.
///
/// In each pool of the scope, the pruned weights in descending order of their scores are paired
/// with the kept weights in ascending order. Of the *c* pairs whose pruned weight scores higher,
/// the first ⌊*c*·`alpha`⌋ change places, so that the pool keeps as many weights as before. Among
/// equal scores the first weights move.
///
/// Under an N:M pattern the pools decide only which weights come back. Each tile then drops as many
/// of its lowest kept weights as came back in it; if more would come back than the tile keeps, only
/// the highest do. As in the authors' code, the score of a tile may fall. With
/// [`Comparison::Tiles`] the pairs are made within each tile, and of a pool's *c* pairs whose
/// pruned weight scores higher, the ⌊*c*·`alpha`⌋ with the largest differences change places.
///
/// ```
/// use barber_metric::Dims;
/// use llm_barber::mask::{Comparison, Mask, Pattern, Scope, Scored, rebuild};
///
/// let mut mask = Mask::from_bools(Dims { rows: 1, columns: 4 }, &[true, true, false, false]);
/// let mut group = [Scored { name: "q_proj", scores: &[5.0, 1.0, 4.0, 3.0], mask: &mut mask }];
/// let (scope, pattern) = (Scope::Row, Pattern::UNSTRUCTURED);
/// assert_eq!(rebuild(&mut group, scope, pattern, 1.0, Comparison::Pools), Ok(vec![1]));
/// assert_eq!(mask.to_bools(), [true, false, true, false]);
/// ```
///
/// # Errors
/// If `alpha` is not within 0 and 1, a matrix does not have one score per weight, a score is NaN,
/// or a mask does not follow the pattern. On an error no mask is changed.
pub fn rebuild(
    group: &mut [Scored<'_>],
    scope: Scope,
    pattern: Pattern,
    alpha: f64,
    comparison: Comparison,
) -> Result<Vec<usize>, Error> {
    if !(0.0..=1.0).contains(&alpha) {
        return Err(Error::Alpha { alpha });
    }
    let mut tiles = vec![];
    for Scored { name, scores, mask } in &*group {
        let dims = mask.dims();
        Error::check_length(name, "scores", scores.len(), dims.len())?;
        Error::check_numbers(name, dims.columns, scores)?;
        pattern.check(name, mask)?;
        tiles.push(pattern.tile_of(name, dims.columns)?);
    }
    let dims: Vec<_> = group.iter().map(|matrix| matrix.mask.dims()).collect();
    if comparison == Comparison::Tiles
        && let Some(tiles) = tiles.iter().copied().collect::<Option<Vec<Tile>>>()
    {
        return Ok(swap_pairs(group, scope, &tiles, alpha));
    }
    let pools = scope.pools(&dims);
    let moving: Vec<Moving> = {
        let group = &*group;
        pools.par_iter().map(|pool| Moving::of(pool, group, alpha)).collect()
    };
    let mut back: Vec<Mask> = dims.into_iter().map(Mask::kept_nowhere).collect();
    let mut gone = back.clone();
    for moving in moving {
        moving.back.into_iter().for_each(|(matrix, i)| back[matrix].set(i, true));
        moving.gone.into_iter().for_each(|(matrix, i)| gone[matrix].set(i, true));
    }
    let moves = group.par_iter_mut().zip(tiles).zip(back.into_par_iter().zip(gone));
    Ok(moves
        .map(|((matrix, tile), (back, gone))| match tile {
            None => matrix.swap(&back, &gone),
            Some(tile) => matrix.swap_in_tiles(&back, tile),
        })
        .collect())
}

/// A pair of weights of a tile whose pruned weight scores higher.
struct Pair {
    /// The pool of the pair.
    pool: [usize; 2],
    comes: usize,
    goes: usize,
    gain: f32,
}

/// Swaps the fraction `alpha` of the pairs within each matrix's tiles; returns the swaps of each
/// matrix.
fn swap_pairs(group: &mut [Scored<'_>], scope: Scope, tiles: &[Tile], alpha: f64) -> Vec<usize> {
    let mut pairs = Vec::new();
    for (matrix, (Scored { scores, mask, .. }, Tile { m, .. })) in
        group.iter().zip(tiles).enumerate()
    {
        let columns = mask.dims().columns;
        for start in (0..scores.len()).step_by(*m) {
            let of = |kept: bool| (start..start + m).filter(move |&i| mask.get(i) == kept);
            let (mut grow, mut prune): (Vec<_>, Vec<_>) = (of(false).collect(), of(true).collect());
            grow.sort_unstable_by_key(|&i| (!key(scores[i]), i));
            prune.sort_unstable_by_key(|&i| (key(scores[i]), i));
            let pool = match scope {
                Scope::Model | Scope::Group => [0, 0],
                Scope::Layer => [matrix, 0],
                Scope::Row => [matrix, start / columns],
                Scope::Column => [matrix, start % columns],
            };
            let worth = grow.into_iter().zip(prune);
            let worth = worth.take_while(|(comes, goes)| scores[*comes] > scores[*goes]);
            pairs.extend(worth.map(|(comes, goes)| {
                (matrix, Pair { pool, comes, goes, gain: scores[comes] - scores[goes] })
            }));
        }
    }
    // The sort is stable: among equal gains the first pairs come first.
    pairs.sort_by(|(_, a), (_, b)| a.pool.cmp(&b.pool).then(b.gain.total_cmp(&a.gain)));
    let mut swaps = vec![0; group.len()];
    for pool in pairs.chunk_by(|(_, a), (_, b)| a.pool == b.pool) {
        for (matrix, pair) in &pool[..(pool.len() as f64 * alpha) as usize] {
            group[*matrix].mask.set(pair.comes, true);
            group[*matrix].mask.set(pair.goes, false);
            swaps[*matrix] += 1;
        }
    }
    swaps
}

/// A weight of a pool: index of its matrix, and row-major index of the weight.
type Place = (usize, usize);

/// The weights of a pool that change places.
#[derive(Default)]
struct Moving {
    back: Vec<Place>,
    gone: Vec<Place>,
}

impl Moving {
    /// The worthwhile swaps of a pool. Let the pool keep *k* weights, and let τ be the *k*-th
    /// highest score. A pair is worth swapping if its pruned weight is above τ or its kept weight
    /// below τ. The number of worthwhile pairs is the larger of the numbers of such weights:
    /// weights equal to τ fill up the shorter list.
    fn of(pool: &Pool, group: &[Scored<'_>], alpha: f64) -> Self {
        let mut keys = Vec::with_capacity(pool.runs.iter().map(|run| run.len).sum());
        for run in &pool.runs {
            let scores = group[run.matrix].scores;
            match run.range() {
                Some(range) => keys.extend(scores[range].iter().map(|score| key(*score))),
                None => keys.extend(run.indices().map(|i| key(scores[i]))),
            }
        }
        let mut pruned = keys.len();
        each_weight(pool, group, |_, _, kept| pruned -= usize::from(kept));
        if pruned == 0 || pruned == keys.len() {
            return Self::default();
        }
        let (_, &mut middle, _) = keys.select_nth_unstable(pruned);
        // Branches on the side are predictable, as few weights are on the wrong one; branches on
        // `kept` are not. The keys of pruned weights are reversed: the lowest keys score highest.
        let mut wrong = [Vec::new(), Vec::new()];
        each_weight(pool, group, |place, key, kept| {
            let reverse = u32::from(kept).wrapping_sub(1);
            if key ^ reverse <= middle ^ reverse {
                wrong[usize::from(kept)].push((key ^ reverse, place));
            }
        });
        let [back, gone] = wrong;
        let beyond = |weights: &[(u32, Place)], middle: u32| {
            weights.iter().filter(|(key, _)| *key < middle).count()
        };
        let worth = beyond(&back, !middle).max(beyond(&gone, middle));
        let count = (worth as f64 * alpha) as usize;
        if count == 0 {
            return Self::default();
        }
        // Copied into lists of their own size, as the lists of all pools are held together.
        let lowest = |weights: &[(u32, Place)]| {
            let mut keys: Vec<u32> = weights.iter().map(|(key, _)| *key).collect();
            let mut lowest = Lowest::of(&mut keys, count);
            let weights = weights.iter().filter(|(key, _)| lowest.takes(*key));
            weights.map(|(_, place)| *place).collect()
        };
        Self { back: lowest(&back), gone: lowest(&gone) }
    }
}

/// Calls `see` with each weight of a pool: its place, its key, and whether it is kept.
#[inline(always)]
fn each_weight(pool: &Pool, group: &[Scored<'_>], mut see: impl FnMut(Place, u32, bool)) {
    for run in &pool.runs {
        let Scored { scores, mask, .. } = &group[run.matrix];
        let mut see = |i: usize, kept| see((run.matrix, i), key(scores[i]), kept);
        match run.range() {
            Some(range) => mask.each(range, see),
            None => run.indices().for_each(|i| see(i, mask.get(i))),
        }
    }
}

impl Scored<'_> {
    /// Keeps the weights of `back` and prunes those of `gone`; returns the number of swaps.
    fn swap(&mut self, back: &Mask, gone: &Mask) -> usize {
        self.mask.exchange(back, gone);
        back.kept()
    }

    /// Keeps the weights of `back`, and prunes as many of the lowest kept weights in each tile.
    fn swap_in_tiles(&mut self, back: &Mask, Tile { m, .. }: Tile) -> usize {
        let key = |i: usize| key(self.scores[i]);
        let (mut returning, mut kept) = (vec![], vec![]);
        let mut swaps = 0;
        for start in (0..self.scores.len()).step_by(m) {
            let tile = start..start + m;
            returning.clear();
            returning.extend(tile.clone().filter(|&i| back.get(i)));
            if returning.is_empty() {
                continue;
            }
            kept.clear();
            kept.extend(tile.filter(|&i| self.mask.get(i)));
            returning.sort_unstable_by_key(|&i| (!key(i), i));
            kept.sort_unstable_by_key(|&i| (key(i), i));
            // At most as many come back as the tile keeps, the highest first.
            for (&comes, &goes) in returning.iter().zip(&kept) {
                self.mask.set(comes, true);
                self.mask.set(goes, false);
                swaps += 1;
            }
        }
        swaps
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const ALL: Pattern = Pattern::UNSTRUCTURED;
    const ONE_OF_FOUR: Pattern = Pattern::n_of_m(1, 4);
    const TWO_OF_FOUR: Pattern = Pattern::n_of_m(2, 4);

    fn mask(rows: usize, kept: &[u8]) -> Mask {
        let dims = Dims { rows, columns: kept.len() / rows };
        Mask::from_fn(dims, |i| kept[i] == 1)
    }

    /// The mask that one matrix's rebuild makes of `kept`.
    fn rebuilt(
        rows: usize,
        scores: &[f32],
        kept: &[u8],
        scope: Scope,
        pattern: Pattern,
        alpha: f64,
    ) -> Vec<u8> {
        let mut mask = mask(rows, kept);
        let mut group = [Scored { name: "w", scores, mask: &mut mask }];
        let swaps = rebuild(&mut group, scope, pattern, alpha, Comparison::Pools).expect("a mask");
        let after: Vec<u8> = mask.to_bools().into_iter().map(u8::from).collect();
        let back = kept.iter().zip(&after).filter(|pair| pair == &(&0, &1)).count();
        assert_eq!(swaps, [back]);
        after
    }

    #[test]
    fn pairs_worth_swapping_change_places() {
        // Pruned 9 8 2, kept 1 3 7: 9 > 1 and 8 > 3, but not 2 > 7.
        let scores = [1.0, 9.0, 7.0, 2.0, 3.0, 8.0];
        let kept = [1, 0, 1, 0, 1, 0];
        let rebuilt = |alpha| rebuilt(1, &scores, &kept, Scope::Row, ALL, alpha);
        assert_eq!(rebuilt(1.0), [0, 1, 1, 0, 0, 1]);
        assert_eq!(rebuilt(0.5), [0, 1, 1, 0, 1, 0]);
        assert_eq!(rebuilt(0.49), kept);
    }

    proptest! {
        #[test]
        fn what_moves_is_what_sorting_finds(
            weights in vec((0..12_u8, any::<bool>()), 0..60), alpha in 0.0..=1.0,
        ) {
            let scores: Vec<f32> = weights.iter().map(|(score, _)| f32::from(*score)).collect();
            let before = Mask::from_fn(Dims { rows: 1, columns: weights.len() }, |i| weights[i].1);
            let (mut prune, mut grow): (Vec<_>, Vec<_>) =
                (0..weights.len()).partition(|i| before.get(*i));
            grow.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            prune.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            let pairs: Vec<(usize, usize)> = grow.into_iter().zip(prune)
                .take_while(|(comes, goes)| scores[*comes] > scores[*goes])
                .collect();
            let mut expected = before.clone();
            for (comes, goes) in &pairs[..(pairs.len() as f64 * alpha) as usize] {
                expected.set(*comes, true);
                expected.set(*goes, false);
            }
            let mut mask = before;
            let mut group = [Scored { name: "w", scores: &scores, mask: &mut mask }];
            rebuild(&mut group, Scope::Row, ALL, alpha, Comparison::Pools).expect("a mask");
            prop_assert_eq!(mask, expected);
        }
    }

    #[test]
    fn each_scope_swaps_within_its_pools() {
        let scores = [1.0, 9.0, 5.0, 2.0];
        let kept = [1, 0, 0, 1];
        let rebuilt = |scope| rebuilt(2, &scores, &kept, scope, ALL, 1.0);
        // Rows: 9 for 1, 5 for 2; columns: 5 for 1, 9 for 2.
        assert_eq!(rebuilt(Scope::Row), [0, 1, 1, 0]);
        assert_eq!(rebuilt(Scope::Column), [0, 1, 1, 0]);
        assert_eq!(rebuilt(Scope::Layer), [0, 1, 1, 0]);
        let scores = [1.0, 0.5, 5.0, 2.0];
        let rebuilt = |scope| self::rebuilt(2, &scores, &kept, scope, ALL, 1.0);
        assert_eq!(rebuilt(Scope::Row), [1, 0, 1, 0]);
        assert_eq!(rebuilt(Scope::Column), [0, 0, 1, 1]);
        assert_eq!(rebuilt(Scope::Layer), [0, 0, 1, 1]);
    }

    #[test]
    fn a_group_pools_its_matrices() {
        let mut masks = [mask(1, &[1, 1]), mask(2, &[0, 0, 0, 0])];
        let [first, second] = &mut masks;
        let mut group = [
            Scored { name: "q", scores: &[1.0, 2.0], mask: first },
            Scored { name: "k", scores: &[0.0, 3.0, 1.5, 4.0], mask: second },
        ];
        assert_eq!(rebuild(&mut group, Scope::Group, ALL, 1.0, Comparison::Pools), Ok(vec![0, 2]));
        assert_eq!(masks, [mask(1, &[0, 0]), mask(2, &[0, 1, 0, 1])]);
    }

    #[test]
    fn among_equals_the_first_move() {
        let scores = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0];
        let kept = [1, 1, 1, 0, 0, 0];
        assert_eq!(rebuilt(1, &scores, &kept, Scope::Row, ALL, 0.67), [0, 0, 1, 1, 1, 0]);
    }

    #[test]
    fn infinities_are_scores() {
        let scores = [f32::NEG_INFINITY, 0.0, f32::INFINITY, f32::INFINITY];
        assert_eq!(rebuilt(1, &scores, &[1, 1, 0, 0], Scope::Row, ALL, 1.0), [0, 0, 1, 1]);
        let scores = [f32::INFINITY, f32::INFINITY];
        assert_eq!(rebuilt(1, &scores, &[1, 0], Scope::Row, ALL, 1.0), [1, 0]);
        assert_eq!(rebuilt(1, &[-0.0, 0.0], &[1, 0], Scope::Row, ALL, 1.0), [1, 0]);
    }

    #[test]
    fn a_tile_drops_as_many_as_came_back_in_it() {
        // In the row, 9 > 1 and 4 > 2 only: both 9 and 4 come back. The first tile has to drop 5,
        // which scores higher than 4, and the second keeps 1.
        let scores = [8.0, 9.0, 5.0, 4.0, 1.0, 2.0, 0.5, 0.25];
        let kept = [1, 0, 1, 0, 1, 1, 0, 0];
        let rebuilt = |alpha| rebuilt(1, &scores, &kept, Scope::Row, TWO_OF_FOUR, alpha);
        assert_eq!(rebuilt(1.0), [0, 1, 0, 1, 1, 1, 0, 0]);
        assert_eq!(rebuilt(0.5), [1, 1, 0, 0, 1, 1, 0, 0]);
    }

    #[test]
    fn no_more_come_back_than_a_tile_keeps() {
        let scores = [1.0, 8.0, 9.0, 9.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        let kept = [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        let after = rebuilt(1, &scores, &kept, Scope::Row, ONE_OF_FOUR, 1.0);
        assert_eq!(after, [0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        // Nothing is kept here that could go.
        let kept = [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(rebuilt(1, &scores, &kept, Scope::Row, ONE_OF_FOUR, 1.0), kept);
    }

    #[test]
    fn a_tiles_own_score_may_fall_by_the_swap() {
        // 3 comes back for the 1 of the other tile, and 4 has to go for it.
        let scores = [3.0, 4.0, 1.0, 0.0];
        let pattern = Pattern::n_of_m(1, 2);
        assert_eq!(rebuilt(1, &scores, &[0, 1, 1, 0], Scope::Row, pattern, 1.0), [1, 0, 1, 0]);
    }

    #[test]
    fn in_tiles_only_better_weights_come() {
        // As above, but 4 is compared with 5 and 8, and stays; 9 is with 5.
        let scores = [8.0, 9.0, 5.0, 4.0, 1.0, 2.0, 0.5, 3.0];
        let mut mask = mask(1, &[1, 0, 1, 0, 1, 1, 0, 0]);
        let mut group = [Scored { name: "w", scores: &scores, mask: &mut mask }];
        let mut rebuilt =
            |alpha| rebuild(&mut group, Scope::Row, TWO_OF_FOUR, alpha, Comparison::Tiles).unwrap();
        // Of the two pairs, 9 for 5 gains more than 3 for 1.
        assert_eq!(rebuilt(0.5), [1]);
        assert_eq!(rebuilt(1.0), [1]);
        assert_eq!(rebuilt(1.0), [0]);
        assert_eq!(mask, self::mask(1, &[1, 1, 0, 0, 0, 1, 0, 1]));
    }

    #[test]
    fn what_is_wrong_is_said_and_changes_nothing() {
        let fine = [0.0, 1.0, 2.0, 3.0];
        let before = mask(2, &[1, 1, 0, 0]);
        for (scores, pattern, alpha, message) in [
            (&fine[..], ALL, f64::NAN, "alpha must be from 0 to 1, got NaN"),
            (&fine, ALL, f64::INFINITY, "alpha must be from 0 to 1, got inf"),
            (&fine, ALL, -0.1, "alpha must be from 0 to 1, got -0.1"),
            (&fine, ALL, 1.1, "alpha must be from 0 to 1, got 1.1"),
            (&fine[1..], ALL, 1.0, "`k`: 3 scores, but the matrix needs 4"),
            (
                &[0.0, 1.0, 2.0, f32::NAN],
                ALL,
                1.0,
                "`k`: the score at row 1, column 1 is not a number",
            ),
            (&fine, TWO_OF_FOUR, 1.0, "`k`: the pattern 2:4 does not divide its 2 columns"),
            (
                &fine,
                Pattern::n_of_m(1, 2),
                1.0,
                "`k`: the tile at row 0, column 0 keeps 2 weights, 1:2 allows 1",
            ),
        ] {
            let (mut first, mut second) = (mask(1, &[0, 0, 0, 1]), before.clone());
            let mut group = [
                Scored { name: "q", scores: &fine, mask: &mut first },
                Scored { name: "k", scores, mask: &mut second },
            ];
            let error = rebuild(&mut group, Scope::Group, pattern, alpha, Comparison::Pools)
                .expect_err(message);
            assert_eq!(error.to_string(), message);
            assert_eq!((first, second), (mask(1, &[0, 0, 0, 1]), before.clone()));
        }
    }

    #[test]
    fn empty_groups_and_matrices_are_rebuilt_to_nothing() {
        for scope in Scope::ALL {
            assert_eq!(rebuild(&mut [], scope, ALL, 1.0, Comparison::Pools), Ok(vec![]));
            let mut mask = Mask::kept_everywhere(Dims { rows: 0, columns: 4 });
            let mut group = [Scored { name: "w", scores: &[], mask: &mut mask }];
            assert_eq!(
                rebuild(&mut group, scope, TWO_OF_FOUR, 1.0, Comparison::Pools),
                Ok(vec![0])
            );
        }
    }
}
