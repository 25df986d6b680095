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
    /// The structure of the weight at this row-major index.
    pub(super) fn of(&self, dims: Dims, i: usize) -> usize {
        match self {
            Self::Whole(owner) => *owner,
            Self::Each(Axis::Rows, owners) => owners[i / dims.columns],
            Self::Each(Axis::Columns, owners) => owners[i % dims.columns],
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
            let mask = Mask::from_fn(*dims, |i| kept[slice.owners.of(*dims, i)]);
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
