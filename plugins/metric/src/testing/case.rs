//! Matrices for tests of metrics.

use std::fmt;

use proptest::{
    collection::vec,
    prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof},
    sample::select,
};

use crate::{Dims, LayerStats, Needs};

/// Maximum number of rows, and of columns.
const SIDE: usize = 6;
/// Number of tokens behind the statistics.
const TOKENS: usize = 3;

/// A weight matrix, all its statistics, and the scores of the previous step.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Shape of the matrix.
    pub dims: Dims,
    /// [`LayerStats::weight`].
    pub weight: Vec<f32>,
    /// [`LayerStats::mask`].
    pub mask: Vec<bool>,
    /// [`LayerStats::squared_gradient`].
    pub squared_gradient: Vec<f32>,
    /// [`LayerStats::input_square`].
    pub input_square: Vec<f32>,
    /// [`LayerStats::input_variance`].
    pub input_variance: Vec<f32>,
    /// [`LayerStats::gram`], whose diagonal is `input_square`.
    pub gram: Vec<f32>,
    /// Scores of the previous step.
    pub scores: Vec<f32>,
    /// Sort keys of rows or columns, for a permutation.
    pub(super) places: Vec<u8>,
    /// One choice per weight, such as whether to negate it.
    pub(super) choices: Vec<bool>,
}

impl Case {
    /// The statistics that a metric with these needs sees.
    pub fn stats(&self, needs: Needs) -> LayerStats<'_> {
        LayerStats {
            name: "model.layers.0.mlp.up_proj.weight",
            dims: self.dims,
            weight: &self.weight,
            mask: &self.mask,
            whole_rows: false,
            squared_gradient: needs.squared_gradient.then_some(&self.squared_gradient[..]),
            input_square: needs.input_square.then_some(&self.input_square[..]),
            input_variance: needs.input_variance.then_some(&self.input_variance[..]),
            gram: needs.gram.then_some(&self.gram[..]),
        }
    }

    /// The case with permuted rows: row i of the result is row `order[i]`.
    pub(super) fn rows(&self, order: &[usize]) -> Self {
        Self {
            dims: Dims { rows: order.len(), ..self.dims },
            weight: rows(&self.weight, self.dims, order),
            mask: rows(&self.mask, self.dims, order),
            squared_gradient: rows(&self.squared_gradient, self.dims, order),
            scores: rows(&self.scores, self.dims, order),
            ..self.clone()
        }
    }

    /// The case with permuted columns: column j of the result is column `order[j]`.
    pub(super) fn columns(&self, order: &[usize]) -> Self {
        let columns = self.dims.columns;
        let square = Dims { rows: columns, columns };
        let narrow = Dims { rows: columns, columns: order.len() };
        let pick = |values: &[f32]| self::columns(values, self.dims, order);
        Self {
            dims: Dims { columns: order.len(), ..self.dims },
            weight: pick(&self.weight),
            mask: self::columns(&self.mask, self.dims, order),
            squared_gradient: pick(&self.squared_gradient),
            input_square: order.iter().map(|j| self.input_square[*j]).collect(),
            input_variance: order.iter().map(|j| self.input_variance[*j]).collect(),
            gram: rows(&self::columns(&self.gram, square, order), narrow, order),
            scores: pick(&self.scores),
            ..self.clone()
        }
    }

    /// The cases with one row or one column removed, as long as one is left.
    pub(super) fn parts(&self) -> impl Iterator<Item = Self> {
        let Dims { rows, columns } = self.dims;
        let without = |count: usize, left: usize| -> Vec<usize> {
            (0..count).filter(|i| *i != left).collect()
        };
        let lost = |count: usize| 0..if count > 1 { count } else { 0 };
        let fewer_rows = lost(rows).map(move |i| self.rows(&without(rows, i)));
        fewer_rows.chain(lost(columns).map(move |j| self.columns(&without(columns, j))))
    }

    /// A permutation of `count` rows or columns.
    pub(super) fn order(&self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_key(|i| self.places[*i]);
        order
    }
}

/// Permutes the rows of a matrix.
pub(super) fn rows<T: Clone>(values: &[T], dims: Dims, order: &[usize]) -> Vec<T> {
    let row = |i: &usize| &values[i * dims.columns..(i + 1) * dims.columns];
    order.iter().flat_map(|i| row(i).iter().cloned()).collect()
}

/// Permutes the columns of a matrix.
pub(super) fn columns<T: Clone>(values: &[T], dims: Dims, order: &[usize]) -> Vec<T> {
    let rows = values.chunks(dims.columns.max(1));
    rows.flat_map(|row| order.iter().map(|j| row[*j].clone())).collect()
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dims { rows, columns } = self.dims;
        write!(f, "    dims              {}", self.dims)?;
        let kept: Vec<f32> = self.mask.iter().map(|kept| f32::from(u8::from(*kept))).collect();
        for (name, values, rows, columns) in [
            ("weight", &self.weight, rows, columns),
            ("mask", &kept, rows, columns),
            ("squared_gradient", &self.squared_gradient, rows, columns),
            ("input_square", &self.input_square, 1, columns),
            ("input_variance", &self.input_variance, 1, columns),
            ("gram", &self.gram, columns, columns),
            ("scores before", &self.scores, rows, columns),
        ] {
            for row in 0..rows {
                let name = if row == 0 { name } else { "" };
                let row = &values[row * columns..(row + 1) * columns];
                write!(f, "\n    {name:17} {row:?}")?;
            }
        }
        Ok(())
    }
}

/// Matrices with at least one weight and numbers of ordinary size.
pub(super) fn ordinary() -> BoxedStrategy<Case> {
    cases(1, || number().boxed())
}

/// Matrices of any shape, including no rows or no columns.
pub(super) fn any_shape() -> BoxedStrategy<Case> {
    cases(0, || number().boxed())
}

/// Matrices with the largest and smallest numbers of a model that f32 can run: products of weights
/// and inputs, and their squares, do not overflow.
pub(super) fn extreme() -> BoxedStrategy<Case> {
    let edges = [1e9, -1e9, 1e-9, -1e-9, 1e-22, f32::MIN_POSITIVE, 1e-45, -0.0];
    cases(1, move || prop_oneof![2 => number(), 1 => select(edges.to_vec())].boxed())
}

/// Zero, or a number of ordinary size.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![1 => Just(0.0), 7 => (-300_i16..=300).prop_map(|n| f32::from(n) / 100.0)]
}

fn cases(least: usize, number: impl Fn() -> BoxedStrategy<f32>) -> BoxedStrategy<Case> {
    let all = SIDE * SIDE;
    let numbers = (
        vec(number(), all),
        vec(any::<bool>(), all),
        vec(number(), all),
        vec(number(), TOKENS * SIDE),
        vec(0..=300_u16, all),
    );
    let changes = (vec(any::<u8>(), SIDE), vec(any::<bool>(), all));
    (least..=SIDE, least..=SIDE, numbers, changes)
        .prop_map(|(rows, columns, (weight, mask, gradient, inputs, scores), (places, choices))| {
            let dims = Dims { rows, columns };
            let gram: Vec<f32> =
                (0..columns * columns).map(|i| gram(&inputs, i / columns, i % columns)).collect();
            Case {
                dims,
                weight: weight[..dims.len()].to_vec(),
                mask: mask[..dims.len()].to_vec(),
                squared_gradient: gradient[..dims.len()].iter().map(|g| g * g).collect(),
                input_square: (0..columns).map(|j| gram[j * columns + j]).collect(),
                input_variance: (0..columns).map(|j| variance(&inputs, j)).collect(),
                gram,
                scores: scores[..dims.len()].iter().map(|n| f32::from(*n) / 100.0).collect(),
                places,
                choices,
            }
        })
        .boxed()
}

/// The variance of x_j over the tokens of one sample.
fn variance(inputs: &[f32], j: usize) -> f32 {
    let values = || inputs.chunks(SIDE).map(|token| f64::from(token[j]));
    let count = values().count().max(1) as f64;
    let mean = values().sum::<f64>() / count;
    (values().map(|x| (x - mean).powi(2)).sum::<f64>() / count) as f32
}

/// Σ x_j x_k over the tokens of one sample.
fn gram(inputs: &[f32], j: usize, k: usize) -> f32 {
    let tokens = inputs.chunks(SIDE);
    tokens.map(|token| f64::from(token[j]) * f64::from(token[k])).sum::<f64>() as f32
}
