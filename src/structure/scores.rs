//! The scores of structures, summed matrix by matrix.

use barber_metric::Dims;

use super::{Lost, Removal};
use crate::{
    checkpoint::Masks,
    family::{Decoder, Part},
    mask::floored,
};

/// The scores so far of the structures that compete to be removed.
#[derive(Debug)]
pub struct Scores<'a> {
    removal: &'a Removal,
    /// Of each kind, of each site.
    sites: Vec<Vec<Summed>>,
}

/// The scores of a site's structures.
#[derive(Clone, Debug)]
struct Summed {
    scores: Vec<f64>,
    /// Number of parts of layers whose scores are not added yet.
    left: usize,
}

impl<'a> Scores<'a> {
    /// No scores yet.
    pub fn new(removal: &'a Removal) -> Self {
        let of_lost = |lost: &Lost| {
            let sites = lost.sites.iter();
            sites.map(|site| Summed { scores: vec![0.0; site.count], left: site.parts() }).collect()
        };
        Self { removal, sites: removal.lost.iter().map(of_lost).collect() }
    }

    /// Whether structures have weights of this projection.
    pub fn wants(&self, layer: usize, part: Part, linear: usize) -> bool {
        let sites = self.removal.lost.iter().flat_map(|lost| &lost.sites);
        sites.flat_map(|site| site.of(layer, part)).any(|slice| slice.linear == linear)
    }

    /// Adds the scores of a projection's weights, row-major, to those of the structures that have
    /// them.
    pub fn add(&mut self, (layer, part, linear): (usize, Part, usize), dims: Dims, scores: &[f32]) {
        for (lost, sums) in self.removal.lost.iter().zip(&mut self.sites) {
            for (site, sum) in lost.sites.iter().zip(sums) {
                let own = site.of(layer, part).iter();
                for slice in own.filter(|slice| slice.linear == linear) {
                    slice.owners.add(dims, scores, &mut sum.scores);
                }
            }
        }
    }

    /// Exchanges removed structures of a part of a layer for kept ones: those with the highest scores come
    /// back, and those with the lowest go. Of the exchanges that raise the sum of kept scores, makes the
    /// fraction `alpha`.
    pub fn exchange(
        &self,
        (layer, part): (usize, Part),
        decoder: &Decoder,
        masks: &mut Masks,
        alpha: f64,
    ) {
        for (lost, sums) in self.removal.lost.iter().zip(&self.sites) {
            for (site, Summed { scores, .. }) in lost.sites.iter().zip(sums) {
                if site.of(layer, part).is_empty() {
                    continue;
                }
                let mut kept = site.kept(decoder, masks);
                let mut order: Vec<usize> = (0..site.count).collect();
                order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
                let goes = order.iter().filter(|i| kept[**i]);
                let comes = order.iter().rev().filter(|i| !kept[**i]);
                let pairs: Vec<_> = goes.zip(comes).collect();
                let worthwhile = pairs.iter().take_while(|(a, b)| scores[**a] < scores[**b]);
                let made = floored(alpha, worthwhile.count());
                for (goes, comes) in pairs.into_iter().take(made) {
                    (kept[*goes], kept[*comes]) = (false, true);
                }
                site.slices.iter().for_each(|of| _ = masks.remove(of.name(decoder)));
                site.choose(decoder, &kept, masks);
            }
        }
    }

    /// Ends a part of a layer, whose scores are all added. Where all structures that compete have
    /// their scores now, masks those with the lowest, after `finish`, which gets the kind, the index
    /// of the layer and the scores.
    ///
    /// # Errors
    /// That of `finish`.
    pub fn end_part<E>(
        &mut self,
        (layer, part): (usize, Part),
        decoder: &Decoder,
        masks: &mut Masks,
        mut finish: impl FnMut(&Lost, &mut [f64]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (lost, sums) in self.removal.lost.iter().zip(&mut self.sites) {
            for (site, sum) in lost.sites.iter().zip(sums) {
                if site.of(layer, part).is_empty() {
                    continue;
                }
                sum.left -= 1;
                if sum.left == 0 {
                    finish(lost, &mut sum.scores)?;
                    site.choose(decoder, &lost.highest(&sum.scores), masks);
                    sum.scores = Vec::new();
                }
            }
        }
        Ok(())
    }
}
