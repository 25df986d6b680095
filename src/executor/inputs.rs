//! Statistics of the inputs of linear layers, summed over samples.

use std::{ops::Range, sync::Arc};

use barber_metric::Needs;

use super::{
    finite::Broken,
    forward::Watch,
    measure::Statistics,
    ops::{Matrix, Ops},
};
use crate::family::Part;

/// The sums so far of one part's layers; those that share an input share them.
#[derive(Debug)]
pub(super) struct InputSums<D: Ops> {
    part: Part,
    /// The layers that are of interest.
    members: Vec<usize>,
    needs: Needs,
    sums: Vec<Sum<D>>,
}

#[derive(Debug)]
struct Sum<D: Ops> {
    layers: Vec<usize>,
    width: usize,
    square: Vec<f32>,
    gram: Option<D::Sum>,
    departure: Option<D::Sum>,
}

/// Adds what it sees of some samples, which are rows, to the sums of their part.
pub(super) struct Adding<'a, D: Ops> {
    pub(super) sums: &'a mut [InputSums<D>],
    pub(super) samples: &'a [Range<usize>],
    /// The first input that is not finite.
    pub(super) broken: Option<Broken>,
}

impl<'a, D: Ops> Adding<'a, D> {
    pub(super) fn new(sums: &'a mut [InputSums<D>], samples: &'a [Range<usize>]) -> Self {
        Self { sums, samples, broken: None }
    }
}

impl<D: Ops> Watch<D> for Adding<'_, D> {
    fn input(&mut self, part: Part, layers: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        if self.broken.is_none() && !self.samples.is_empty() {
            self.broken = Broken::find(part, &layers, x)?;
        }
        let sums = self.sums.iter_mut().find(|sums| sums.part == part);
        sums.map_or(Ok(()), |sums| sums.add(layers, x, self.samples))
    }
}

impl<D: Ops> InputSums<D> {
    pub(super) fn new(part: Part, members: &[usize], needs: Needs) -> Self {
        Self { part, members: members.to_vec(), needs, sums: Vec::new() }
    }

    pub(super) fn part(&self) -> Part {
        self.part
    }

    /// Adds samples: `x`, [tokens, channels], is the input of `layers`.
    fn add(
        &mut self,
        layers: Range<usize>,
        x: &Matrix<D>,
        samples: &[Range<usize>],
    ) -> Result<(), D::Err> {
        let layers: Vec<usize> = layers.filter(|layer| self.members.contains(layer)).collect();
        if layers.is_empty() || samples.is_empty() || !self.needs.inputs() {
            return Ok(());
        }
        let width = x.shape().1;
        let known = self.sums.iter().position(|sum| sum.layers == layers);
        let place = known.unwrap_or_else(|| {
            let (square, gram, departure) = (Vec::new(), None, None);
            self.sums.push(Sum { layers, width, square, gram, departure });
            self.sums.len() - 1
        });
        let Sum { square, gram, .. } = &mut self.sums[place];
        if self.needs.input_square {
            square.resize(width, 0.0);
            for squares in D::column_squares(x, samples)? {
                square.iter_mut().zip(&squares).for_each(|(sum, x)| *sum += x);
            }
        }
        if self.needs.gram {
            let gram = match gram {
                Some(gram) => gram,
                None => gram.insert(x.device().nothing(width, width)?),
            };
            D::add_gram(gram, x)?;
        }
        Ok(())
    }

    /// Adds how the input of `layers` on another stream differs from `x`, which was added.
    pub(super) fn depart(
        &mut self,
        layers: &Range<usize>,
        x: &Matrix<D>,
        other: &Matrix<D>,
    ) -> Result<(), D::Err> {
        let found = self.sums.iter_mut().find(|sum| sum.layers.iter().any(|l| layers.contains(l)));
        let Some(Sum { departure, width, .. }) = found.filter(|_| self.needs.gram) else {
            return Ok(());
        };
        let departure = match departure {
            Some(departure) => departure,
            None => departure.insert(x.device().nothing(*width, *width)?),
        };
        D::add_product(departure, &D::difference(x, other)?, x)
    }

    /// Hands the means over `samples` to each layer's statistics.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn finish(
        self,
        samples: usize,
        statistics: &mut [Statistics],
    ) -> Result<(), D::Err> {
        for Sum { layers, width, mut square, gram, departure } in self.sums {
            let mut gram = gram.map_or_else(|| Ok(Vec::new()), D::sums)?;
            mirror(&mut gram, width);
            let mut departure = departure.map_or_else(|| Ok(Vec::new()), D::sums)?;
            for sum in [&mut square, &mut gram, &mut departure] {
                sum.iter_mut().for_each(|sum| *sum /= samples as f32);
            }
            let some = |sum: Vec<f32>| (!sum.is_empty()).then(|| Arc::new(sum));
            let (square, gram, departure) = (some(square), some(gram), some(departure));
            for layer in layers {
                statistics[layer].input_square.clone_from(&square);
                statistics[layer].gram.clone_from(&gram);
                statistics[layer].departure.clone_from(&departure);
            }
        }
        Ok(())
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
    use crate::executor::ops::testing::matrix;

    #[test]
    fn layers_that_share_an_input_share_its_statistics() {
        let needs = Needs::INPUT_SQUARE.or(Needs::GRAM);
        let mut sums = [InputSums::new(Part::Mlp, &[1, 2], needs)];
        let x = matrix([1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 0.0, 0.0].to_vec(), (4, 2));
        let mut watch = Adding::new(&mut sums, &[0..2, 2..4]);
        watch.input(Part::Mlp, 1..3, &x).unwrap();
        watch.input(Part::Mlp, 3..4, &x).unwrap();
        watch.input(Part::Attention, 1..3, &x).unwrap();
        let mut statistics = vec![Statistics::default(); 4];
        let [sums] = sums;
        sums.finish(2, &mut statistics).unwrap();
        for found in &statistics[1..3] {
            assert_eq!(found.input_square.as_ref().unwrap()[..], [5.0, 12.0]);
            assert_eq!(found.gram.as_ref().unwrap()[..], [5.0, 7.0, 7.0, 12.0]);
        }
        assert!(statistics[3].gram.is_none() && statistics[0].input_square.is_none());
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
