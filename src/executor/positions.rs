//! The positions of tokens, and which tokens attention sees.

use std::{ops::Range, sync::Arc};

use super::ops::{Rotation, Sight};
use crate::family::Decoder;

/// Rows of a matrix of tokens that go on in several ways: each branch sees the root and itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// What the branches have in common.
    pub root: Range<usize>,
    /// How it goes on, each at the position after the root's last.
    pub branches: Vec<Range<usize>>,
}

/// What attention knows of the rows of a matrix: their positions, and which see which.
#[derive(Clone, Debug)]
pub struct Positions {
    pub(super) length: usize,
    /// Without one, the rows are one sequence.
    pub(super) sights: Option<Arc<Vec<Sight>>>,
    pub(super) rotation: Option<Rotation>,
}

impl Positions {
    /// The positions of a sequence of `length` tokens.
    pub fn new(decoder: &Decoder, length: usize) -> Self {
        let rotation = decoder.rope.as_ref().map(|rope| {
            let (cos, sin) = rope.tables(length);
            Rotation { cos: Arc::new(cos), sin: Arc::new(sin), half: rope.planes() }
        });
        Self { length, sights: None, rotation }
    }

    /// The positions of trees that fill a matrix of `length` tokens.
    pub fn of_trees(decoder: &Decoder, length: usize, trees: &[Tree]) -> Self {
        let mut sights = vec![Sight::default(); length];
        for Tree { root, branches } in trees {
            for row in root.clone() {
                sights[row] = Sight { root: root.start..root.start, branch: root.start };
            }
            for branch in branches {
                for row in branch.clone() {
                    sights[row] = Sight { root: root.clone(), branch: branch.start };
                }
            }
        }
        let positions = || sights.iter().enumerate().map(|(row, sight)| sight.position(row));
        let rotation = decoder.rope.as_ref().map(|rope| {
            let half = rope.planes();
            let (cos, sin) = rope.tables(positions().max().map_or(0, |last| last + 1));
            let rows = |table: &[f32]| {
                let rows = positions().flat_map(|at| &table[at * half..(at + 1) * half]);
                Arc::new(rows.copied().collect())
            };
            Rotation { cos: rows(&cos), sin: rows(&sin), half }
        });
        Self { length, rotation, sights: Some(Arc::new(sights)) }
    }

    /// The position of each row in its sequence.
    pub fn of_rows(&self) -> Vec<usize> {
        match &self.sights {
            None => (0..self.length).collect(),
            Some(sights) => {
                sights.iter().enumerate().map(|(row, sight)| sight.position(row)).collect()
            }
        }
    }
}
