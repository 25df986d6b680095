//! The order of a matrix's input channels in which a pattern N:M loses least.
//!
//! A tile of M channels keeps N weights of each row; which channels share a tile is free where the
//! channels can be permuted. Lost is the importance of the others, summed over rows and tiles.
//! Channels are first sorted by importance and dealt over the tiles (RIA's heuristic allocation, Zhang
//! et al., ICLR 2024, "Plug-and-Play"). Then, again and again, one channel is taken out of each tile of
//! a block, and all of them are put back where they lose least. With M − 1 channels left in a tile, of
//! importances r₁ ≤ r₂ ≤ … in a row, a channel of importance x raises what the row loses by
//! min(x, r_k), k = M − N, so that this is a linear assignment, whose exact solution never loses more
//! (the blocks of 64 are those of PermLLM, arXiv 2510.10136).

use rayon::prelude::*;

use super::{Pattern, Tile, assignment::assign};
use crate::{random::SplitMix64, simd::simd};

/// Number of tiles that exchange channels at a time.
const BLOCK: usize = 64;
/// The search ends when this many sweeps over all tiles together gain less than [`LEAST`] of the lost
/// importance, or after [`MOST`].
const PATIENCE: usize = 16;
const LEAST: f64 = 1e-3;
/// Usual number of sweeps.
const USUAL: f64 = 100.0;
/// Maximum number of sweeps.
const MOST: usize = 256;

/// Input channels of a matrix, each with the importances of its weights.
#[derive(Clone, Debug)]
pub struct Channels {
    /// Number of importances of a channel.
    length: usize,
    /// The importances, at least 0, channel by channel.
    importances: Vec<f32>,
}

impl Channels {
    /// Channels with so many importances each, at least 0, channel by channel.
    pub fn new(length: usize, importances: Vec<f32>) -> Self {
        Self { length: length.max(1), importances }
    }

    /// About the number of comparisons of the search for the order of so many channels, in each of which
    /// `weights` are pruned by the pattern.
    pub fn work(channels: usize, weights: usize, pattern: Pattern) -> f64 {
        let Some(Tile { m, .. }) = pattern.tile(channels) else { return 0.0 };
        USUAL * (channels / m * weights) as f64 * BLOCK.min(channels / m) as f64
    }

    fn count(&self) -> usize {
        self.importances.len() / self.length
    }

    fn of(&self, channel: usize) -> &[f32] {
        &self.importances[channel * self.length..(channel + 1) * self.length]
    }

    /// The importance that is lost if consecutive channels of `order` share the pattern's tiles.
    fn lost(&self, order: &[usize], Tile { n, m }: Tile) -> f64 {
        let of_tile = |tile: &[usize]| {
            let mut row = vec![0.0; tile.len()];
            let mut lost = 0.0;
            for i in 0..self.length {
                row.iter_mut().zip(tile).for_each(|(x, channel)| *x = self.of(*channel)[i]);
                row.sort_unstable_by(f32::total_cmp);
                lost += row.iter().take(m - n).map(|x| f64::from(*x)).sum::<f64>();
            }
            lost
        };
        let lost: Vec<f64> = order.par_chunks(m).map(of_tile).collect();
        lost.iter().sum()
    }

    /// The order in which the pattern loses least, as far as the search finds it: the channel of each
    /// place. `None` if it finds none better than the present one, or the pattern has no tiles or none
    /// that divide the channels.
    pub fn permute(&self, pattern: Pattern) -> Option<Vec<usize>> {
        let tile = pattern.tile(self.count()).filter(|_| pattern.divides(self.count()))?;
        let before = self.lost(&(0..self.count()).collect::<Vec<_>>(), tile);
        let mut tiles = self.dealt(tile);
        let mut random = SplitMix64::new(0);
        let start = self.lost(&tiles.concat(), tile);
        let mut gains = Vec::new();
        for _ in 0..MOST {
            gains.push(self.sweep(&mut tiles, tile, &mut random));
            let last = gains.iter().rev().take(PATIENCE);
            if gains.len() >= PATIENCE && last.sum::<f64>() <= LEAST * start {
                break;
            }
        }
        // Near the order that they had.
        tiles.iter_mut().for_each(|tile| tile.sort_unstable());
        tiles.sort_unstable();
        let order = tiles.concat();
        (self.lost(&order, tile) < before).then_some(order)
    }

    /// The channels of each tile, dealt by importance: the most important M·i to M·(i + 1) …, to and fro
    /// over the tiles.
    fn dealt(&self, Tile { m, .. }: Tile) -> Vec<Vec<usize>> {
        let all: Vec<usize> = (0..self.count()).collect();
        let sum = |channel: &usize| self.of(*channel).iter().map(|x| f64::from(*x)).sum::<f64>();
        let sums: Vec<f64> = all.par_iter().map(sum).collect();
        let mut sorted = all;
        sorted.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]).then(a.cmp(b)));
        let count = sorted.len() / m;
        let mut tiles = vec![Vec::with_capacity(m); count];
        for (round, dealt) in sorted.chunks(count.max(1)).enumerate() {
            for (i, channel) in dealt.iter().enumerate() {
                tiles[if round % 2 == 0 { i } else { count - 1 - i }].push(*channel);
            }
        }
        tiles
    }

    /// Exchanges one channel of each tile within blocks of tiles, both drawn at random; returns by how
    /// much less is lost.
    fn sweep(&self, tiles: &mut [Vec<usize>], tile: Tile, random: &mut SplitMix64) -> f64 {
        for i in (1..tiles.len()).rev() {
            tiles.swap(i, random.below(i + 1));
        }
        for channels in tiles.iter_mut() {
            // The first channel goes out.
            channels.swap(0, random.below(tile.m));
        }
        let gains: Vec<f64> =
            tiles.par_chunks_mut(BLOCK).map(|block| self.exchange(block, tile)).collect();
        gains.iter().sum()
    }

    /// Puts the first channels of some tiles where they lose least; returns by how much less that is.
    fn exchange(&self, tiles: &mut [Vec<usize>], Tile { n, m }: Tile) -> f64 {
        let (count, k) = (tiles.len(), m - n);
        let mut cost = vec![0.0; count * count];
        let (mut limits, mut rest) = (vec![0.0; self.length], vec![0.0; m - 1]);
        for (place, channels) in tiles.iter().enumerate() {
            for (i, limit) in limits.iter_mut().enumerate() {
                for (x, channel) in rest.iter_mut().zip(&channels[1..]) {
                    *x = self.of(*channel)[i];
                }
                rest.sort_unstable_by(f32::total_cmp);
                *limit = rest[k - 1];
            }
            for (thing, channels) in tiles.iter().enumerate() {
                cost[thing * count + place] = capped(self.of(channels[0]), &limits);
            }
        }
        let places = assign(count, &cost);
        let out: Vec<usize> = tiles.iter().map(|channels| channels[0]).collect();
        let mut gain = 0.0;
        for (thing, &place) in places.iter().enumerate() {
            tiles[place][0] = out[thing];
            gain += f64::from(cost[thing * (count + 1)]) - f64::from(cost[thing * count + place]);
        }
        gain
    }
}

/// Σ min(x, limit).
fn capped(values: &[f32], limits: &[f32]) -> f32 {
    const LANES: usize = 16;
    simd!({
        let mut sums = [0.0_f32; LANES];
        let (values, others) = values.as_chunks::<LANES>();
        let (limits, other_limits) = limits.as_chunks::<LANES>();
        for (values, limits) in values.iter().zip(limits) {
            for ((sum, x), limit) in sums.iter_mut().zip(values).zip(limits) {
                *sum += if x < limit { *x } else { *limit };
            }
        }
        let others = others.iter().zip(other_limits).map(|(x, limit)| x.min(*limit));
        sums.iter().sum::<f32>() + others.sum::<f32>()
    })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// The least that a pattern can lose in any order of these channels.
    fn least(channels: &Channels, tile: Tile, tiles: &mut Vec<usize>, left: &[usize]) -> f64 {
        let Some((&first, others)) = left.split_first() else { return channels.lost(tiles, tile) };
        let mut best = f64::INFINITY;
        // The first channel that is left shares its tile with any M − 1 others.
        for chosen in 0_u32..1 << others.len() {
            if chosen.count_ones() as usize == tile.m - 1 {
                let is_chosen = |i: usize| chosen >> i & 1 == 1;
                let of = |wanted: bool| {
                    let own =
                        others.iter().enumerate().filter(move |(i, _)| is_chosen(*i) == wanted);
                    own.map(|(_, channel)| *channel).collect::<Vec<_>>()
                };
                let length = tiles.len();
                tiles.push(first);
                tiles.extend(of(true));
                best = best.min(least(channels, tile, tiles, &of(false)));
                tiles.truncate(length);
            }
        }
        best
    }

    proptest! {
        /// An order has each channel once and loses less than the present one.
        #[test]
        fn orders_lose_less(
            (n, m) in prop::sample::select(vec![(1, 2), (2, 4), (1, 4), (3, 4)]),
            tiles in 1_usize..4,
            length in 1_usize..40,
            values in vec(0_u8..100, 12 * 40),
        ) {
            let count = m * tiles;
            let values = values[..count * length].iter().map(|x| f32::from(*x)).collect();
            let channels = Channels::new(length, values);
            let (tile, pattern) = (Tile { n, m }, Pattern::n_of_m(n, m));
            let present: Vec<usize> = (0..count).collect();
            let before = channels.lost(&present, tile);
            let best = least(&channels, tile, &mut Vec::new(), &present);
            let order = channels.permute(pattern);
            prop_assert_eq!(&order, &channels.permute(pattern));
            let after = order.as_ref().map_or(before, |order| channels.lost(order, tile));
            prop_assert!(after >= best && after <= before);
            if let Some(mut order) = order {
                prop_assert!(after < before);
                order.sort_unstable();
                prop_assert_eq!(order, present);
            }
        }

        /// What an exchange says that it gains is what the tiles lose less, and never below zero.
        #[test]
        fn exchanges_gain_what_they_say(
            (n, m) in prop::sample::select(vec![(1, 2), (2, 4), (4, 8)]),
            tiles in 1_usize..6,
            values in vec(0_u8..100, 48 * 9),
            seed: u64,
        ) {
            let values = values[..m * tiles * 9].iter().map(|x| f32::from(*x)).collect();
            let (channels, tile) = (Channels::new(9, values), Tile { n, m });
            let mut dealt = channels.dealt(tile);
            let before = channels.lost(&dealt.concat(), tile);
            let gain = channels.sweep(&mut dealt, tile, &mut SplitMix64::new(seed));
            prop_assert!(gain >= 0.0);
            prop_assert_eq!(before - gain, channels.lost(&dealt.concat(), tile));
        }
    }

    #[test]
    fn important_channels_are_spread_over_the_tiles() {
        let important = |i: usize| if i < 8 { 9.0 } else { 1.0 };
        let channels = Channels::new(2, (0..32).map(|i| important(i / 2)).collect());
        let order = channels.permute(Pattern::n_of_m(2, 4)).unwrap();
        assert_eq!(channels.lost(&order, Tile { n: 2, m: 4 }), 16.0);
    }

    #[test]
    fn what_has_no_tiles_has_no_order() {
        let channels = Channels::new(1, vec![1.0, 2.0, 3.0]);
        for pattern in [Pattern::UNSTRUCTURED, Pattern::n_of_m(2, 4), Pattern::n_of_m(1, 2)] {
            assert_eq!(channels.permute(pattern), None);
        }
    }
}
