//! Where weights compete with each other.

use std::{fmt, ops::Range};

use barber_metric::Dims;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The weights that compete with each other when a mask is rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// All matrices of the model, pooled.
    Model,
    /// All matrices of the group, pooled.
    Group,
    /// Each matrix of its own.
    Layer,
    /// Each row: the weights of one output.
    Row,
    /// Each column: the weights of one input.
    Column,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Group, Self::Layer, Self::Row, Self::Column, Self::Model];

    /// What a recipe calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Group => "group",
            Self::Layer => "layer",
            Self::Row => "row",
            Self::Column => "column",
        }
    }

    /// One line of help.
    pub const fn help(self) -> &'static str {
        match self {
            Self::Model => "all matrices of the model, pooled",
            Self::Group => "all matrices of the group, pooled",
            Self::Layer => "each matrix of its own",
            Self::Row => "each row: the weights of one output",
            Self::Column => "each column: the weights of one input",
        }
    }

    /// Divides the weights of matrices of these shapes: each weight is in exactly one pool.
    pub(super) fn pools(self, dims: &[Dims]) -> Vec<Pool> {
        let whole =
            |(matrix, dims): (usize, &Dims)| Run { matrix, first: 0, step: 1, len: dims.len() };
        let matrices = dims.iter().enumerate();
        match self {
            Self::Model | Self::Group => vec![Pool { runs: matrices.map(whole).collect() }],
            Self::Layer => matrices.map(|of| Pool::one(whole(of))).collect(),
            Self::Row => matrices
                .flat_map(|(matrix, &Dims { rows, columns })| {
                    (0..rows).map(move |row| {
                        Pool::one(Run { matrix, first: row * columns, step: 1, len: columns })
                    })
                })
                .collect(),
            Self::Column => matrices
                .flat_map(|(matrix, &Dims { rows, columns })| {
                    (0..columns).map(move |column| {
                        Pool::one(Run { matrix, first: column, step: columns, len: rows })
                    })
                })
                .collect(),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Weights that compete with each other.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) runs: Vec<Run>,
}

impl Pool {
    fn one(run: Run) -> Self {
        Self { runs: vec![run] }
    }
}

/// Weights of one matrix, evenly spaced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) matrix: usize,
    first: usize,
    step: usize,
    pub(super) len: usize,
}

impl Run {
    /// The indices of the weights in their matrix.
    pub(super) fn indices(self) -> impl Iterator<Item = usize> {
        (0..self.len).map(move |i| self.first + i * self.step)
    }

    /// Their range, where they follow one another.
    pub(super) fn range(self) -> Option<Range<usize>> {
        (self.step == 1).then(|| self.first..self.first + self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(scope: Scope) -> Vec<Vec<(usize, usize)>> {
        let dims = [Dims { rows: 2, columns: 3 }, Dims { rows: 1, columns: 2 }];
        let places = |run: Run| run.indices().map(move |i| (run.matrix, i));
        scope
            .pools(&dims)
            .iter()
            .map(|pool| pool.runs.iter().copied().flat_map(places).collect())
            .collect()
    }

    #[test]
    fn the_pools_of_each_scope() {
        let first: Vec<_> = (0..6).map(|i| (0, i)).collect();
        let second = vec![(1, 0), (1, 1)];
        assert_eq!(pools(Scope::Group), [[first.clone(), second.clone()].concat()]);
        assert_eq!(pools(Scope::Layer), [first.clone(), second.clone()]);
        assert_eq!(pools(Scope::Row), [first[..3].to_vec(), first[3..].to_vec(), second]);
        let columns = [vec![(0, 0), (0, 3)], vec![(0, 1), (0, 4)], vec![(0, 2), (0, 5)]];
        assert_eq!(pools(Scope::Column), [&columns[..], &[vec![(1, 0)], vec![(1, 1)]]].concat());
    }

    #[test]
    fn scopes_are_named_as_they_are_read() {
        for scope in Scope::ALL {
            let json = serde_json::to_string(&scope).expect("a string");
            assert_eq!(json, format!("\"{scope}\""));
            assert_eq!(serde_json::from_str::<Scope>(&json).expect("a scope"), scope);
        }
    }
}
