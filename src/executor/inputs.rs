//! Statistics of the inputs of linear layers, summed over samples.

use std::sync::Arc;

use barber_metric::Needs;
use dfdx::shapes::HasShape;

use super::{
    measure::Statistics,
    ops::{Matrix, Ops},
};

/// The sums so far; linear layers that share an input share them.
#[derive(Debug)]
pub(super) struct InputSums {
    needs: Needs,
    sums: Vec<Sum>,
}

#[derive(Debug)]
struct Sum {
    layers: Vec<usize>,
    width: usize,
    square: Vec<f32>,
    gram: Vec<f32>,
}

impl InputSums {
    pub(super) fn new(needs: Needs) -> Self {
        Self { needs, sums: Vec::new() }
    }

    /// Adds a sample: `x`, [tokens, channels], is the input of `layers`, of which only those in
    /// `members` are of interest.
    pub(super) fn add<D: Ops, T>(
        &mut self,
        layers: &[usize],
        members: &[usize],
        x: &Matrix<D, T>,
    ) -> Result<(), D::Err> {
        if !self.needs.inputs() || !layers.iter().any(|layer| members.contains(layer)) {
            return Ok(());
        }
        let known = self.sums.iter().position(|sum| sum.layers == layers);
        let place = known.unwrap_or_else(|| {
            let layers = layers.to_vec();
            let width = x.shape().1;
            self.sums.push(Sum { layers, width, square: Vec::new(), gram: Vec::new() });
            self.sums.len() - 1
        });
        let Sum { width, square, gram, .. } = &mut self.sums[place];
        if self.needs.input_square {
            let squares = D::column_squares(x)?;
            square.resize(squares.len(), 0.0);
            square.iter_mut().zip(&squares).for_each(|(sum, x)| *sum += x);
        }
        if self.needs.gram {
            gram.resize(*width * *width, 0.0);
            D::add_gram(x, gram)?;
        }
        Ok(())
    }

    /// Hands the means over `samples` to each layer's statistics.
    pub(super) fn finish(self, samples: usize, statistics: &mut [Statistics]) {
        for Sum { layers, width, mut square, mut gram } in self.sums {
            mirror(&mut gram, width);
            for sum in [&mut square, &mut gram] {
                sum.iter_mut().for_each(|sum| *sum /= samples as f32);
            }
            let square = (!square.is_empty()).then(|| Arc::new(square));
            let gram = (!gram.is_empty()).then(|| Arc::new(gram));
            for layer in layers {
                statistics[layer].input_square.clone_from(&square);
                statistics[layer].gram.clone_from(&gram);
            }
        }
    }
}

/// Copies what is below the diagonal of a matrix to above it, a tile at a time: a column read from
/// top to bottom would miss the cache at every number.
fn mirror(matrix: &mut [f32], width: usize) {
    const TILE: usize = 64;
    if matrix.is_empty() {
        return;
    }
    for top in (0..width).step_by(TILE) {
        for left in (top..width).step_by(TILE) {
            for i in top..width.min(top + TILE) {
                for j in left.max(i + 1)..width.min(left + TILE) {
                    matrix[i * width + j] = matrix[j * width + i];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfdx::tensor::{Cpu, TensorFromVec};

    #[test]
    fn layers_that_share_an_input_share_its_statistics() {
        let needs = Needs::INPUT_SQUARE.or(Needs::GRAM);
        let mut sums = InputSums::new(needs);
        for sample in [[1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 0.0, 0.0]] {
            let x = Cpu::default().tensor_from_vec(sample.to_vec(), (2, 2));
            sums.add(&[0, 1], &[1, 2], &x).unwrap();
            sums.add(&[3], &[1, 2], &x).unwrap();
        }
        let mut statistics = vec![Statistics::default(); 4];
        sums.finish(2, &mut statistics);
        for found in &statistics[..2] {
            assert_eq!(found.input_square.as_ref().unwrap()[..], [5.0, 12.0]);
            assert_eq!(found.gram.as_ref().unwrap()[..], [5.0, 7.0, 7.0, 12.0]);
        }
        assert!(statistics[3].gram.is_none() && statistics[3].input_square.is_none());
    }

    #[test]
    fn a_mirrored_matrix_is_symmetric() {
        let width = 150;
        let mut matrix: Vec<f32> = (0..width * width).map(|i| i as f32).collect();
        mirror(&mut matrix, width);
        for i in 0..width {
            for j in 0..width {
                assert_eq!(matrix[i * width + j], (i.max(j) * width + i.min(j)) as f32);
            }
        }
    }
}
