//! Sites: structures that compete with one another, and the weights that they have.

use barber_metric::Dims;

use crate::{
    checkpoint::{Axis, Cut, Masks},
    family::{Decoder, Part, Projection},
    mask::Mask,
};

/// The structures that compete with one another: those of a layer, or of the model. Those with the
/// lowest scores are removed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Site {
    /// Number of structures.
    pub(super) count: usize,
    /// The matrices, rows and columns that they have.
    pub(super) slices: Vec<Slice>,
    /// The names of other tensors that have a row for each structure.
    pub(super) rows: Vec<String>,
    /// Start of the names of tensors that have the structure's number, such as `model.layers.`.
    pub(super) numbered: Option<String>,
}

/// A projection, or its rows or columns, each of which belongs to a structure.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slice {
    pub(super) layer: usize,
    pub(super) part: Part,
    /// Index into the part's projections.
    pub(super) linear: usize,
    pub(super) owners: Owners,
}

/// The structures that have a matrix.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Owners {
    /// One structure has all of it.
    Whole(usize),
    /// The structure of each row or column.
    Each(Axis, Vec<usize>),
}

impl Owners {
    /// Adds the scores of the matrix's weights, row-major, to those of their structures.
    pub(super) fn add(&self, dims: Dims, scores: &[f32], sums: &mut [f64]) {
        for (i, row) in scores.chunks(dims.columns.max(1)).enumerate() {
            match self {
                Self::Whole(owner) => {
                    row.iter().for_each(|score| sums[*owner] += f64::from(*score))
                }
                Self::Each(Axis::Rows, owners) => {
                    row.iter().for_each(|score| sums[owners[i]] += f64::from(*score));
                }
                Self::Each(Axis::Columns, owners) => {
                    row.iter().zip(owners).for_each(|(score, of)| sums[*of] += f64::from(*score));
                }
            }
        }
    }

    /// The mask of the matrix with the structures that are `kept`.
    fn mask(&self, dims: Dims, kept: &[bool]) -> Mask {
        let columns = dims.columns.max(1);
        match self {
            Self::Whole(owner) if kept[*owner] => Mask::kept_everywhere(dims),
            Self::Whole(_) => Mask::kept_nowhere(dims),
            Self::Each(Axis::Rows, owners) => Mask::from_fn(dims, |i| kept[owners[i / columns]]),
            Self::Each(Axis::Columns, owners) => Mask::from_fn(dims, |i| kept[owners[i % columns]]),
        }
    }

    /// The rows or columns that are left with the structures that are `kept`; `None` if the matrix is
    /// left as it is, or not at all.
    pub(super) fn cut(&self, kept: &[bool]) -> Option<Cut> {
        let Self::Each(axis, owners) = self else { return None };
        let own = owners.iter().enumerate().filter(|(_, owner)| kept[**owner]);
        Some(Cut { axis: *axis, kept: own.map(|(i, _)| i).collect() })
    }
}

impl Site {
    /// Number of parts of layers that have some of the structures.
    pub(super) fn parts(&self) -> usize {
        self.slices.chunk_by(|a, b| (a.layer, a.part) == (b.layer, b.part)).count()
    }

    /// The slices of a part of a layer.
    pub(super) fn of(&self, layer: usize, part: Part) -> &[Slice] {
        let before = self.slices.partition_point(|of| (of.layer, of.part) < (layer, part));
        let end = self.slices.partition_point(|of| (of.layer, of.part) <= (layer, part));
        &self.slices[before..end]
    }
}

impl Slice {
    /// The tensor name of the projection's weight.
    pub(super) fn name<'a>(&self, decoder: &'a Decoder) -> &'a str {
        &self.projection(decoder).weight
    }

    pub(super) fn projection<'a>(&self, decoder: &'a Decoder) -> &'a Projection {
        &decoder.layers[self.layer].projections(self.part)[self.linear]
    }
}

impl Site {
    /// Masks all structures but those that are kept.
    pub(super) fn choose(&self, decoder: &Decoder, kept: &[bool], masks: &mut Masks) {
        for slice in &self.slices {
            let Projection { weight, dims, .. } = slice.projection(decoder);
            let mask = slice.owners.mask(*dims, kept);
            match masks.get_mut(weight) {
                Some(other) => other.and(&mask),
                None => _ = masks.insert(weight.clone(), mask),
            }
        }
    }

    /// The structures that have a kept weight.
    pub(super) fn kept(&self, decoder: &Decoder, masks: &Masks) -> Vec<bool> {
        let mut kept = vec![false; self.count];
        for slice in &self.slices {
            let Projection { weight, dims, .. } = slice.projection(decoder);
            let Some(mask) = masks.get(weight) else { return vec![true; self.count] };
            match slice.owners {
                Owners::Whole(owner) => kept[owner] |= mask.kept() > 0,
                Owners::Each(axis, ref owners) => {
                    let step = if axis == Axis::Rows { dims.columns } else { 1 };
                    for (i, owner) in owners.iter().enumerate() {
                        kept[*owner] |= mask.get(i * step);
                    }
                }
            }
        }
        kept
    }
}
