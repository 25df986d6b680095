//! The structures that a run removes from a model: which weights they have, and what is left.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde_json::Value;

use super::{Error, Indices, Owners, Site, Slice, Structure, biases, config};
use crate::{
    checkpoint::{Axis, Cut, Cuts, Masks, Pruned},
    family::{self, Decoder, Part, Projection},
    mask::floored,
};

/// Which structures are kept: of each kind that is removed, of each site.
type Kept = Vec<Vec<Vec<bool>>>;

/// The structures of one kind that a run removes.
#[derive(Clone, Debug, PartialEq)]
pub struct Lost {
    /// What is removed.
    pub structure: Structure,
    /// Number of structures that compete: those of a layer, or all.
    pub of: usize,
    /// Number of them that are removed.
    pub removed: usize,
    /// Whether biases of output projections make up for them; a model that lacks the biases gets them.
    pub compensated: bool,
    pub(super) sites: Vec<Site>,
}

impl Lost {
    /// This fraction of the structures; `None` for single weights. Of channels a multiple of `multiple`
    /// is left.
    ///
    /// # Errors
    /// If a layer lacks the structure, or the ratio removes none or all.
    pub fn new(
        structure: Structure,
        decoder: &Decoder,
        ratio: f64,
        multiple: usize,
    ) -> Result<Option<Self>, Error> {
        let Some(lost) = Self::of_count(structure, decoder, 0)? else { return Ok(None) };
        let of = lost.of;
        let left = of.saturating_sub(floored(ratio, of));
        let multiple = if structure.has_multiples() { multiple.max(1) } else { 1 };
        let left = left.checked_next_multiple_of(multiple).unwrap_or(of);
        let removed = of.saturating_sub(left);
        let what = match removed {
            0 => "nothing would be removed",
            removed if removed >= of => "nothing would be left",
            removed if removed > lost.most(decoder) => {
                "a token would have more experts than are left"
            }
            removed => return Ok(Some(Self { removed, ..lost })),
        };
        let without = floored(ratio, of);
        if removed == 0 && without > 0 {
            return Err(Error::Multiple { multiple, removed: without, of, many: structure.many() });
        }
        let place = if lost.is_of_model() { "" } else { " of a layer" };
        let many = format!("{}{place}", structure.many());
        Err(Error::Ratio { ratio, of, many, removed, what })
    }

    /// The structures, with biases that make up for them if `compensated`.
    #[must_use]
    pub fn with_compensation(self, compensated: bool) -> Self {
        Self { compensated, ..self }
    }

    fn of_count(
        structure: Structure,
        decoder: &Decoder,
        removed: usize,
    ) -> Result<Option<Self>, Error> {
        let Some(whole) = &structure.0.whole else { return Ok(None) };
        let (sites, many) = ((whole.sites)(decoder)?, whole.many);
        let of = sites.first().ok_or(Error::None { many })?.count;
        if let Some(other) = sites.iter().find(|site| site.count != of) {
            return Err(Error::Differ { many, first: of, found: other.count });
        }
        Ok(Some(Self { structure, of, removed, compensated: false, sites }))
    }

    /// The output projections that lose inputs with the structures.
    pub(super) fn outputs<'a>(
        &'a self,
        decoder: &'a Decoder,
    ) -> impl Iterator<Item = (Part, &'a Projection)> {
        let slices = self.sites.iter().flat_map(|site| &site.slices);
        let slices = slices.filter(|slice| matches!(slice.owners, Owners::Each(Axis::Columns, _)));
        slices.map(|slice| (slice.part, slice.projection(decoder)))
    }

    /// The largest number that can be removed: a token keeps its number of experts.
    fn most(&self, decoder: &Decoder) -> usize {
        let routers = decoder.layers.iter().filter_map(|layer| layer.mlp.router.as_ref());
        let experts = routers.filter(|_| self.sites.iter().any(|site| !site.rows.is_empty()));
        self.of.saturating_sub(experts.map(|router| router.active).max().unwrap_or(0))
    }

    /// Whether the structures of all layers compete.
    pub fn is_of_model(&self) -> bool {
        self.structure.is_of_model()
    }

    /// As many structures of a site as are left, the last ones.
    fn fewest(&self) -> Vec<bool> {
        (0..self.of).map(|i| i >= self.removed).collect()
    }

    /// The structures of a site that are kept, those with the highest scores; of equal ones, the last.
    pub(super) fn highest(&self, scores: &[f64]) -> Vec<bool> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let mut kept = vec![true; scores.len()];
        order.iter().take(self.removed).for_each(|i| kept[*i] = false);
        kept
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} {}", self.removed, self.of, self.structure.many())?;
        if self.is_of_model() { Ok(()) } else { f.write_str(" of each layer") }
    }
}

/// The structures that a run removes from a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Removal {
    /// The structures, by kind.
    pub lost: Vec<Lost>,
    /// The dense model's `config.json`.
    config: Value,
}

impl Removal {
    /// The removal of structures from a model with this `config.json`; `None` without any.
    ///
    /// # Errors
    /// If the family's configuration cannot describe the smaller model.
    pub fn new(mut lost: Vec<Lost>, config: &Value) -> Result<Option<Self>, Error> {
        if lost.is_empty() {
            return Ok(None);
        }
        // Layers come first: of those that are gone, nothing else is.
        lost.sort_by_key(|lost| !lost.is_of_model());
        let many: Vec<_> = lost.iter().map(|lost| lost.structure.many()).collect();
        let wrong = |why: String| Error::Configuration { many: many.join(" and "), why };
        // With the names of the configuration alone; a checkpoint may have others.
        let mut biased = config.clone();
        let read =
            |config: &Value| family::decoder(config).map_err(|error| wrong(error.to_string()));
        let named = |decoder: &Decoder| {
            let of = |lost: &Lost| {
                let named = Lost::of_count(lost.structure, decoder, lost.removed);
                Some(named.transpose()?.map(|named| named.with_compensation(lost.compensated)))
            };
            lost.iter().filter_map(of).collect::<Result<Vec<_>, _>>()
        };
        let decoder = read(config)?;
        biases::add(&named(&decoder)?, &decoder, &mut biased)?;
        let decoder = read(&biased)?;
        let smaller = Self { lost: named(&decoder)?, config: biased };
        smaller.check_configuration(&decoder).map_err(wrong)?;
        Ok(Some(Self { lost, config: config.clone() }))
    }

    /// Checks that the family's configuration can describe what is left: of layers, whichever goes.
    fn check_configuration(&self, decoder: &Decoder) -> Result<(), String> {
        let layers = decoder.layers.len();
        let Some(of_model) = self.lost.iter().position(Lost::is_of_model) else {
            let all: Vec<usize> = (0..layers).collect();
            return config::check(&self.smallest(decoder), decoder, &all);
        };
        for gone in 0..layers {
            let mut kept = self.fewest();
            kept[of_model] = vec![(0..layers).map(|layer| layer != gone).collect()];
            let left: Vec<usize> = (0..layers).filter(|layer| *layer != gone).collect();
            config::check(&self.left(decoder, &kept), decoder, &left)?;
        }
        Ok(())
    }

    /// The removal that a report describes: the structures that are gone, by kind and site, and whether
    /// they are compensated.
    ///
    /// # Errors
    /// As [`Lost::new`] and [`Removal::new`], and if these are not structures of the model.
    pub fn reported(
        gone: &[(Structure, &[Indices], bool)],
        decoder: &Decoder,
        config: &Value,
    ) -> Result<Option<(Self, Masks)>, Error> {
        let (mut all, mut masks) = (Vec::new(), Masks::new());
        let mut gone_layers = Vec::new();
        for (structure, gone, compensated) in gone {
            let Some(mut lost) = Lost::of_count(*structure, decoder, 0)? else { continue };
            let mut removed = None;
            for (i, site) in lost.sites.iter().enumerate() {
                let is_gone = |slice: &Slice| gone_layers.contains(&slice.layer);
                if site.slices.first().is_some_and(is_gone) {
                    continue;
                }
                let mut kept = vec![true; site.count];
                let gone = gone.get(i).into_iter().flat_map(|indices| indices.below(site.count));
                gone.for_each(|i| kept[i] = false);
                let found = kept.iter().filter(|kept| !**kept).count();
                let first = *removed.get_or_insert(found);
                if found != first || found == 0 || found == site.count {
                    return Err(Error::Reported { many: structure.many() });
                }
                site.choose(decoder, &kept, &mut masks);
                if lost.is_of_model() {
                    gone_layers = (0..site.count).filter(|layer| !kept[*layer]).collect();
                }
            }
            (lost.removed, lost.compensated) = (removed.unwrap_or(0), *compensated);
            all.push(lost);
        }
        Ok(Self::new(all, config)?.map(|removal| (removal, masks)))
    }

    /// Whether structures have whole rows of this projection.
    pub fn has_rows(&self, layer: usize, part: Part, linear: usize) -> bool {
        let sites = self.lost.iter().flat_map(|lost| &lost.sites);
        let mut slices = sites.flat_map(|site| site.of(layer, part));
        slices.any(|of| of.linear == linear && matches!(of.owners, Owners::Each(Axis::Rows, _)))
    }

    /// The biases of output projections that may differ from the dense model's.
    pub fn biases(&self, decoder: &Decoder) -> BTreeSet<String> {
        let compensated = self.lost.iter().filter(|lost| lost.compensated);
        compensated.flat_map(|lost| lost.outputs(decoder)).map(|(_, of)| biases::name(of)).collect()
    }

    /// The removal as it turned out: compensated is what has a changed bias.
    #[must_use]
    pub fn settled(&self, decoder: &Decoder, pruned: &Pruned) -> Self {
        let mut settled = self.clone();
        for (settled, lost) in settled.lost.iter_mut().zip(&self.lost) {
            let mut outputs = lost.outputs(decoder);
            settled.compensated &= outputs.any(|(_, of)| pruned.has_changed(&biases::name(of)));
        }
        settled
    }

    /// Whether what is left has the inputs that it had.
    pub fn leaves_inputs(&self) -> bool {
        self.lost.iter().all(|lost| lost.structure.leaves_inputs())
    }

    /// What each matrix loses, by tensor name: the fraction of its weights, and the number if it is
    /// known before it is chosen.
    pub fn matrices(&self, decoder: &Decoder) -> BTreeMap<String, (f64, Option<usize>)> {
        let mut all = BTreeMap::new();
        for lost in &self.lost {
            let ratio = lost.removed as f64 / lost.of.max(1) as f64;
            for slice in lost.sites.iter().flat_map(|site| &site.slices) {
                let Projection { weight, dims, .. } = slice.projection(decoder);
                let count = match slice.owners {
                    Owners::Each(..) => Some(dims.len() / lost.of.max(1) * lost.removed),
                    Owners::Whole(_) => None,
                };
                all.entry(weight.clone())
                    .and_modify(|(before, count): &mut (f64, Option<usize>)| {
                        (*before, *count) = (1.0 - (1.0 - *before) * (1.0 - ratio), None);
                    })
                    .or_insert((ratio, count));
            }
        }
        all
    }

    /// What a matrix loses some of, in words: `layers, channels`.
    pub fn what(&self, layer: usize, part: Part, linear: usize) -> String {
        let has = |lost: &&Lost| {
            let mut slices = lost.sites.iter().flat_map(|site| site.of(layer, part));
            slices.any(|slice| slice.linear == linear)
        };
        let own: Vec<_> = self.lost.iter().filter(has).map(|of| of.structure.to_string()).collect();
        own.join(", ")
    }

    /// The structures that are kept by these masks: those that have a kept weight. Of a layer that is
    /// gone, as many as of any other.
    fn kept(&self, decoder: &Decoder, masks: &Masks) -> Kept {
        let of_lost = |lost: &Lost| {
            let of_site = |site: &Site| match site.kept(decoder, masks) {
                kept if kept.contains(&true) => kept,
                _ => lost.fewest(),
            };
            lost.sites.iter().map(of_site).collect()
        };
        self.lost.iter().map(of_lost).collect()
    }

    /// The structures that are gone by these masks, of each kind and site. Of a layer that is gone,
    /// none.
    pub fn gone(&self, decoder: &Decoder, masks: &Masks) -> Vec<Vec<Indices>> {
        let of_site = |site: &Site| {
            let kept = site.kept(decoder, masks);
            let any = kept.contains(&true);
            (0..site.count).filter(|i| any && !kept[*i]).collect()
        };
        self.lost.iter().map(|lost| lost.sites.iter().map(of_site).collect()).collect()
    }

    /// The smaller model that is left with these masks.
    pub fn cuts(&self, decoder: &Decoder, masks: &Masks) -> Cuts {
        self.left(decoder, &self.kept(decoder, masks))
    }

    /// A model of the result's size.
    pub fn smallest(&self, decoder: &Decoder) -> Cuts {
        self.left(decoder, &self.fewest())
    }

    /// As many structures as are left, the last ones.
    fn fewest(&self) -> Kept {
        self.lost.iter().map(|lost| vec![lost.fewest(); lost.sites.len()]).collect()
    }

    /// The model that is left with these structures.
    fn left(&self, decoder: &Decoder, kept: &Kept) -> Cuts {
        let mut cuts = Cuts { config: self.config.clone(), ..Cuts::default() };
        // That biases can be added was checked at the start.
        let added = biases::add(&self.lost, decoder, &mut cuts.config).unwrap_or_default();
        cuts.added = added.into_iter().map(|(name, rows)| (name, vec![rows])).collect();
        for (lost, kept) in self.lost.iter().zip(kept) {
            for (site, kept) in lost.sites.iter().zip(kept) {
                for slice in &site.slices {
                    let Some(cut) = slice.owners.cut(kept) else { continue };
                    let of = slice.projection(decoder);
                    let bias = biases::name(of);
                    if cut.axis == Axis::Rows {
                        if let Some(shape) = cuts.added.get_mut(&bias) {
                            *shape = cut.shape(shape);
                        }
                        if of.bias.is_some() {
                            cuts.tensors.insert(bias, cut.clone());
                        }
                    }
                    cuts.tensors.insert(of.weight.clone(), cut);
                }
                let numbers: Vec<usize> = (0..site.count).filter(|i| kept[*i]).collect();
                let cut = || Cut { axis: Axis::Rows, kept: numbers.clone() };
                cuts.tensors.extend(site.rows.iter().map(|name| (name.clone(), cut())));
                cuts.numbered.extend(site.numbered.iter().map(|of| (of.clone(), numbers.clone())));
            }
            if let (Some(whole), Some(config)) =
                (&lost.structure.0.whole, config::of_decoder(&mut cuts.config))
            {
                (whole.configure)(config, decoder, kept);
            }
        }
        cuts
    }
}
