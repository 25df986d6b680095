//! The positions of tokens, and which tokens attention sees.

use std::{ops::Range, sync::Arc};

use super::ops::{AttentionMask, Rotation};
use crate::family::Decoder;

/// Rows of a matrix of tokens that form a root and several continuations. Each branch sees the root
/// and itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Rows of the common beginning.
    pub root: Range<usize>,
    /// Rows of each continuation; each starts at the position after the root.
    pub branches: Vec<Range<usize>>,
}

/// The positions of the rows of a matrix, and the rows that each of them sees.
#[derive(Clone, Debug)]
pub struct Positions {
    pub(super) length: usize,
    /// The mask of each row; `None` if the rows are one sequence.
    pub(super) masks: Option<Arc<Vec<AttentionMask>>>,
    pub(super) rotation: Option<Rotation>,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let rotation = decoder.rope.as_ref().map(|rope| {
            let (cos, sin) = rope.tables(length);
            Rotation { cos: Arc::new(cos), sin: Arc::new(sin), half: rope.planes() }
        });
        Self { length, masks: None, rotation }
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
        let rotation = decoder.rope.as_ref().map(|rope| {
            let half = rope.planes();
            let (cos, sin) = rope.tables(positions().max().map_or(0, |last| last + 1));
            let rows = |table: &[f32]| {
                let rows = positions().flat_map(|at| &table[at * half..(at + 1) * half]);
                Arc::new(rows.copied().collect())
            };
            Rotation { cos: rows(&cos), sin: rows(&sin), half }
        });
        Self { length, rotation, masks: Some(Arc::new(masks)) }
    }

    /// The position of each row in its sequence.
    pub fn of_rows(&self) -> Vec<usize> {
        match &self.masks {
            None => (0..self.length).collect(),
            Some(masks) => masks.iter().enumerate().map(|(row, mask)| mask.position(row)).collect(),
        }
    }
}
