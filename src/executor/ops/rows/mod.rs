//! Some rows of a matrix, and the sum of matrices that have only some rows each: what the experts of
//! a mixture read, and what they give.
//!
//! For y = Σ over experts e of w_e · y_e at the rows of e: ∂L/∂y_e = w_e · ∂L/∂y at these rows, and
//! ∂L/∂w_e is the product of y_e and ∂L/∂y of each row.

use std::sync::Arc;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Buffer, Computed, Hold, Matrix,
    route::Route,
    tape::{record, record_in_place},
};
use crate::{buffer::stale, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// Rows of matrices.
pub trait Rows: Hold {
    /// Row i of the result is row `rows[i]` of `x`, whose rows have `width` numbers, times
    /// `scale[i]` if there is a scale.
    fn gather(
        x: &Self::Numbers,
        width: usize,
        rows: &[usize],
        scale: Option<&[f32]>,
    ) -> Computed<Self>;

    /// Adds row i of `x` to row `rows[i]` of `y`, times `scale[i]` if there is a scale. No two of
    /// the `rows` are the same.
    fn scatter(
        y: &mut Self::Numbers,
        width: usize,
        rows: &[usize],
        scale: Option<&[f32]>,
        x: &Self::Numbers,
    ) -> Result<(), Self::Err>;

    /// For each i, the product of row i of `a` and row `rows[i]` of `b`.
    fn row_products(
        a: &Self::Numbers,
        b: &Self::Numbers,
        width: usize,
        rows: &[usize],
    ) -> Result<Vec<f32>, Self::Err>;

    /// Some rows of `x`, no two of them the same.
    fn rows<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        rows: &Arc<[usize]>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let width = x.shape().1;
        let y = Self::gather(&x.values, width, rows, None)?;
        let (y, rows) = (x.beside(y, (rows.len(), width))?, rows.clone());
        Ok(record_in_place(tape, x.name(), y, move |gx, g| {
            Self::scatter(gx, width, &rows, None, &g)
        }))
    }

    /// The sum of the experts' `outputs`, each at the rows of its route and times the weights of
    /// these rows; `weights` are those of all tokens, [tokens, experts of a token].
    fn combine<T: Tape<f32, Self>>(
        outputs: Vec<Matrix<Self, T>>,
        weights: Matrix<Self, T>,
        routes: &Arc<[Route]>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (weights, mut tape) = weights.split_tape();
        let (tokens, active) = weights.shape();
        let mut given = Vec::with_capacity(outputs.len());
        for output in outputs {
            let (output, other) = output.split_tape();
            tape = tape.merge(other);
            given.push(output);
        }
        let width = given.first().map_or(0, |output| output.shape().1);
        let mut sum = weights.device().upload(vec![0.0; tokens * width], (tokens, width))?;
        for (output, route) in given.iter().zip(&**routes) {
            Self::scatter(&mut sum, width, &route.rows, Some(&route.weights), &output.values)?;
        }
        let y = weights.beside(sum, (tokens, width))?;
        let inputs: Vec<_> = given.iter().chain([&weights]).map(Matrix::name).collect();
        let routes = routes.clone();
        Ok(record(tape, inputs, y, move |g| {
            let (mut gradients, mut of_weights) = (Vec::new(), vec![0.0; tokens * active]);
            for (output, route) in given.iter().zip(&*routes) {
                let Route { rows, weights, .. } = route;
                let products = Self::row_products(&output.values, &g, width, rows)?;
                for (place, product) in route.places(active).zip(products) {
                    of_weights[place] = product;
                }
                gradients.push(Self::gather(&g, width, rows, Some(weights))?);
            }
            gradients.push(weights.device().upload(of_weights, (tokens, active))?);
            Ok(gradients)
        }))
    }
}

/// The scale of a row.
fn scaled(scale: Option<&[f32]>, row: usize) -> f32 {
    scale.map_or(1.0, |scale| scale[row])
}

impl Rows for Cpu {
    fn gather(
        x: &Buffer,
        width: usize,
        rows: &[usize],
        scale: Option<&[f32]>,
    ) -> Result<Buffer, CpuError> {
        let mut y = stale(rows.len() * width);
        y.par_chunks_mut(width.max(1)).zip(rows).enumerate().for_each(|(i, (y, row))| {
            let (x, scale) = (&x[row * width..(row + 1) * width], scaled(scale, i));
            simd!(y.iter_mut().zip(x).for_each(|(y, x)| *y = scale * x));
        });
        Ok(y.into())
    }

    fn scatter(
        y: &mut Buffer,
        width: usize,
        rows: &[usize],
        scale: Option<&[f32]>,
        x: &Buffer,
    ) -> Result<(), CpuError> {
        // Which row of x each row of y gets.
        let mut added = vec![None; y.len() / width.max(1)];
        rows.iter().enumerate().for_each(|(i, row)| added[*row] = Some(i));
        y.par_chunks_mut(width.max(1)).zip(added).for_each(|(y, added)| {
            let Some(i) = added else { return };
            let (x, scale) = (&x[i * width..(i + 1) * width], scaled(scale, i));
            simd!(y.iter_mut().zip(x).for_each(|(y, x)| *y += scale * x));
        });
        Ok(())
    }

    fn row_products(
        a: &Buffer,
        b: &Buffer,
        width: usize,
        rows: &[usize],
    ) -> Result<Vec<f32>, CpuError> {
        let product = |(a, row): (&[f32], &usize)| {
            let b = &b[row * width..(row + 1) * width];
            a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>() as f32
        };
        Ok(a.par_chunks(width.max(1)).zip(rows).map(product).collect())
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::{Merge, OwnedTape};

    use super::*;
    use crate::executor::ops::{
        Add,
        testing::{check, matrix},
    };

    fn routes() -> Arc<[Route]> {
        let route = |rows: &[usize], slots: &[usize], weights: &[f32]| Route {
            expert: 0,
            rows: rows.into(),
            slots: slots.to_vec(),
            weights: weights.to_vec(),
        };
        [route(&[0, 2], &[1, 0], &[0.5, 2.0]), route(&[0, 1, 2], &[0, 0, 1], &[1.0, -1.0, 0.25])]
            .into()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let rows: Arc<[usize]> = [3, 0].into();
        check!(|device: D| [(4, 7)], |[x]| D::rows(x, &rows));
        // Two readers of the same rows.
        check!(|device: D| [(4, 3)], |[x]| {
            let (x, tape) = x.split_tape();
            let first = D::rows(x.clone().put_tape(tape), &rows)?;
            let own = OwnedTape::<f32, D>::default();
            let (second, other) = D::rows(x.put_tape(own), &rows)?.split_tape();
            let (first, tape) = first.split_tape();
            D::add(first.put_tape(tape.merge(other)), second)
        });
        // The outputs' gradients; the weights' are those of the routes, which a router makes.
        check!(|device: D| [(2, 5), (3, 5)], |[a, b]| {
            let weights = device.hold(vec![1.0, 0.5, -1.0, 0.0, 2.0, 0.25], (3, 2))?;
            D::combine(vec![a, b], weights.put_tape(Default::default()), &routes())
        });
    }

    #[test]
    fn outputs_are_added_at_their_rows() {
        let [a, b] = [vec![1.0, 2.0], vec![10.0, 20.0, 40.0]].map(|x| {
            let rows = x.len();
            matrix(x, (rows, 1))
        });
        let y = Cpu::combine(vec![a, b], matrix(vec![0.0; 6], (3, 2)), &routes()).unwrap();
        assert_eq!(y.to_vec(), [10.5, -20.0, 14.0]);
        let x = Cpu::rows(y, &[2, 0].into()).unwrap();
        assert_eq!(x.to_vec(), [14.0, 10.5]);
    }
}
