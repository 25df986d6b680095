//! The positions of tokens, and which tokens attention sees.

use std::{ops::Range, sync::Arc};

use super::ops::{AttentionMask, Rotation};
use crate::family::{Decoder, rope::Rope};

/// Rows of a matrix of tokens that form a root and several continuations. Each branch sees the root
/// and itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Rows of the common beginning.
    pub root: Range<usize>,
    /// Rows of each continuation; each starts at the position after the root.
    pub branches: Vec<Range<usize>>,
}

/// The rotations of queries and of keys by a rotary position code.
#[derive(Clone, Debug)]
pub(super) struct Rotations {
    pub(super) queries: Rotation,
    pub(super) keys: Rotation,
}

impl Rotations {
    /// The rotations of rows at these positions.
    fn new(rope: &Rope, positions: impl Iterator<Item = usize> + Clone) -> Self {
        let (half, interleaved) = (rope.planes(), rope.interleaved);
        let (cos, sin) = rope.tables(positions.clone().max().map_or(0, |last| last + 1));
        let rotation = |factor: &dyn Fn(usize) -> f32| {
            let rows = |table: &[f32]| {
                let rows = positions.clone().flat_map(|at| {
                    let factor = factor(at);
                    table[at * half..(at + 1) * half].iter().map(move |x| factor * x)
                });
                Arc::new(rows.collect())
            };
            Rotation { cos: rows(&cos), sin: rows(&sin), half, interleaved }
        };
        let keys = rotation(&|_| 1.0);
        let queries = match rope.query_scaling {
            Some(scaling) => rotation(&|position| scaling.factor(position)),
            None => keys.clone(),
        };
        Self { queries, keys }
    }
}

/// The positions of the rows of a matrix, and the rows that each of them sees.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Number of rows.
    pub(super) length: usize,
    /// The position of the first row of a sequence.
    pub(super) first: usize,
    /// The mask of each row; `None` if the rows are one sequence.
    pub(super) masks: Option<Arc<Vec<AttentionMask>>>,
    /// The rotations by each of the decoder's position codes.
    pub(super) rotations: Vec<Rotations>,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        Self::after(decoder, 0, length)
    }

    /// The positions of the `length` tokens of a sequence that follow its first `before`.
    pub fn after(decoder: &Decoder, before: usize, length: usize) -> Self {
        let positions = before..before + length;
        let rotations = decoder.ropes.iter().map(|rope| Rotations::new(rope, positions.clone()));
        Self { length, first: before, masks: None, rotations: rotations.collect() }
    }

    /// Whether both are a sequence of the same length from the same position.
    pub(super) fn are_alike(&self, other: &Self) -> bool {
        let sequence = |of: &Self| of.masks.is_none().then_some((of.first, of.length));
        sequence(self).is_some() && sequence(self) == sequence(other)
    }

    /// The positions of trees that fill a matrix of `length` tokens.
    pub fn of_trees(decoder: &Decoder, length: usize, trees: &[Tree]) -> Self {
        let mut masks = vec![AttentionMask::default(); length];
        for Tree { root, branches } in trees {
            for row in root.clone() {
                masks[row] = AttentionMask { root: root.start..root.start, branch: root.start };
            }
            for branch in branches {
                for row in branch.clone() {
                    masks[row] = AttentionMask { root: root.clone(), branch: branch.start };
                }
            }
        }
        let positions = || masks.iter().enumerate().map(|(row, mask)| mask.position(row));
        let rotations = decoder.ropes.iter().map(|rope| Rotations::new(rope, positions()));
        let rotations = rotations.collect();
        Self { length, first: 0, rotations, masks: Some(Arc::new(masks)) }
    }

    /// The position of each row in its sequence.
    pub fn of_rows(&self) -> Vec<usize> {
        match &self.masks {
            None => (self.first..self.first + self.length).collect(),
            Some(masks) => masks.iter().enumerate().map(|(row, mask)| mask.position(row)).collect(),
        }
    }
}
