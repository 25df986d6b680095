//! What a pass gathers of linear layers: statistics of their inputs, and gradients of their weights.

use std::{iter::zip, ops::Range, sync::Arc};

use barber_metric::{Dims, LayerStats, Needs};
use rayon::prelude::*;

use super::{
    PartWeights, Side,
    finite::Broken,
    forward::Hook,
    ops::{Matrix, Ops},
};
use crate::family::Part;

/// What is gathered of linear layers, over the calibration samples.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The indices of the layers, a list for each part.
    pub members: &'a [Vec<usize>],
    /// The statistics. The gradients are those of a sample's mean squared error with respect to the
    /// parts' weights; they are squared sample by sample, then averaged (LLM-Barber, arXiv
    /// 2408.10631, where the parts are the dense ones and the targets the sparse ones' outputs).
    pub needs: Needs,
    /// Whether the sum of these gradients is wanted too.
    pub gradient: bool,
}

impl<'a> Probe<'a> {
    /// Gathers statistics.
    pub fn new(members: &'a [Vec<usize>], needs: Needs) -> Self {
        Self { members, needs, gradient: false }
    }

    /// Whether it takes a backward pass.
    pub(super) fn is_backward(&self) -> bool {
        self.gradient || self.needs.squared_gradient
    }
}

/// The statistics of one weight matrix; those that were not asked for are `None`.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Mean over samples of the squared gradient, [rows, columns].
    pub squared_gradient: Option<Vec<f32>>,
    /// Sum over samples of the gradient, [rows, columns].
    pub gradient: Option<Vec<f32>>,
    /// Mean over samples of Σ x² over a sample's tokens, `[columns]`.
    pub input_square: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ x xᵀ over a sample's tokens, [columns, columns], symmetric.
    pub gram: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ (x̃ − x) xᵀ over a sample's tokens, [columns, columns], where x̃ is
    /// the input on another stream.
    pub departure: Option<Arc<Vec<f32>>>,
}

impl Statistics {
    /// With the matrix that they are of: its name, its shape and its weights, row-major.
    pub fn of<'a>(&'a self, name: &'a str, dims: Dims, weight: &'a [f32]) -> LayerStats<'a> {
        LayerStats {
            name,
            dims,
            weight,
            mask: &[],
            squared_gradient: self.squared_gradient.as_deref(),
            input_square: self.input_square.as_ref().map(|values| &values[..]),
            gram: self.gram.as_ref().map(|values| &values[..]),
        }
    }
}

/// The sums so far that a [`Probe`] asks for.
pub(super) struct Gathered<'a, D: Ops> {
    probe: Probe<'a>,
    inputs: Vec<InputSums<D>>,
    /// Of each part's linear layers.
    gradients: Vec<Vec<GradientSums<D>>>,
}

struct GradientSums<D: Ops> {
    squares: Option<D::Sum>,
    gradient: Option<D::Sum>,
}

impl<D: Ops> Default for GradientSums<D> {
    fn default() -> Self {
        Self { squares: None, gradient: None }
    }
}

impl<'a, D: Ops> Gathered<'a, D> {
    pub(super) fn new(parts: &[PartWeights<D>], probe: Probe<'a>) -> Self {
        let inputs = zip(parts, probe.members);
        let inputs = inputs.map(|(part, of)| InputSums::new(part.part, of, probe.needs)).collect();
        let none =
            |part: &PartWeights<D>| part.linears.iter().map(|_| Default::default()).collect();
        Self { probe, inputs, gradients: parts.iter().map(none).collect() }
    }

    /// The parts, whose linear layers of interest trace what their gradients consist of.
    pub(super) fn traced(&self, parts: &[PartWeights<D>]) -> Vec<PartWeights<D>> {
        zip(parts, self.probe.members).map(|(part, members)| part.traced(members)).collect()
    }

    /// The hook that adds the inputs of some samples, which are rows. Beside them may be the inputs
    /// on another stream, and the side that the statistics are of.
    pub(super) fn inputs<'b>(
        &'b mut self,
        samples: &'b [Range<usize>],
        beside: Option<(Side, Inputs<D>)>,
    ) -> GatherInputs<'b, D> {
        let beside = beside.map(|(side, Inputs(inputs))| (side, inputs.into_iter()));
        GatherInputs { sums: &mut self.inputs, samples, beside, broken: None }
    }

    /// Adds the gradients that traced parts found in the backward pass of some samples.
    pub(super) fn add_gradients(
        &mut self,
        traced: &[PartWeights<D>],
        samples: &[Range<usize>],
    ) -> Result<(), D::Err> {
        for (part, sums) in zip(traced, &mut self.gradients) {
            let mut squared = Vec::new();
            for (linear, GradientSums { squares, gradient }) in zip(&part.linears, sums) {
                let Some(trace) = linear.take_trace() else { continue };
                let empty = || trace.input.device().nothing(linear.outputs(), linear.inputs());
                if self.probe.gradient {
                    let sum = get_or_insert(gradient, empty)?;
                    D::add_product(sum, &trace.gradient, &trace.input)?;
                }
                if self.probe.needs.squared_gradient {
                    squared.push((get_or_insert(squares, empty)?, trace));
                }
            }
            D::add_squared_gradients(&mut squared, samples)?;
        }
        Ok(())
    }

    /// The statistics of each part's linear layers: means over so many `samples`.
    pub(super) fn finish(self, samples: usize) -> Result<Vec<Vec<Statistics>>, D::Err> {
        let mean = |mut sums: Vec<f32>| {
            sums.par_iter_mut().for_each(|sum| *sum /= samples as f32);
            sums
        };
        let mut found = Vec::new();
        for (inputs, gradients) in zip(self.inputs, self.gradients) {
            let mut statistics = vec![Statistics::default(); gradients.len()];
            inputs.finish(samples, &mut statistics)?;
            for (statistics, GradientSums { squares, gradient }) in zip(&mut statistics, gradients)
            {
                statistics.squared_gradient = squares.map(D::sums).transpose()?.map(mean);
                statistics.gradient = gradient.map(D::sums).transpose()?;
            }
            found.push(statistics);
        }
        Ok(found)
    }
}

/// What an option holds, which is made if it is empty.
fn get_or_insert<T, E>(
    option: &mut Option<T>,
    make: impl FnOnce() -> Result<T, E>,
) -> Result<&mut T, E> {
    match option {
        Some(value) => Ok(value),
        None => Ok(option.insert(make()?)),
    }
}

/// Keeps the inputs of linear layers, in the order of a forward pass.
pub(super) struct Inputs<D: Ops>(Vec<Matrix<D>>);

impl<D: Ops> Default for Inputs<D> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<D: Ops> Hook<D> for Inputs<D> {
    fn input(&mut self, _: Part, _: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        self.0.push(x.clone());
        Ok(())
    }
}

/// Adds the inputs of some samples to the sums of their part.
pub(super) struct GatherInputs<'a, D: Ops> {
    sums: &'a mut [InputSums<D>],
    samples: &'a [Range<usize>],
    beside: Option<(Side, std::vec::IntoIter<Matrix<D>>)>,
    /// The first input that is not finite.
    pub(super) broken: Option<Broken>,
}

impl<D: Ops> Hook<D> for GatherInputs<'_, D> {
    fn input(&mut self, part: Part, layers: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        let beside = self.beside.as_mut();
        let beside = beside.and_then(|(side, inputs)| Some((*side, inputs.next()?)));
        let x = match &beside {
            Some((Side::Dense, dense)) => dense,
            _ => x,
        };
        if self.broken.is_none() {
            self.broken = Broken::find(part, &layers, x)?;
        }
        let Some(sums) = self.sums.iter_mut().find(|sums| sums.part == part) else { return Ok(()) };
        sums.add(layers.clone(), x, self.samples)?;
        match &beside {
            Some((Side::Sparse, dense)) => sums.depart(&layers, x, dense),
            _ => Ok(()),
        }
    }
}

/// The sums so far of one part's layers; those that share an input share them.
#[derive(Debug)]
struct InputSums<D: Ops> {
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

impl<D: Ops> InputSums<D> {
    fn new(part: Part, members: &[usize], needs: Needs) -> Self {
        Self { part, members: members.to_vec(), needs, sums: Vec::new() }
    }

    /// Adds samples: `x`, [tokens, channels], is the input of `layers`.
    fn add(
        &mut self,
        layers: Range<usize>,
        x: &Matrix<D>,
        samples: &[Range<usize>],
    ) -> Result<(), D::Err> {
        let layers: Vec<usize> = layers.filter(|layer| self.members.contains(layer)).collect();
        if layers.is_empty() || !self.needs.inputs() {
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
            D::add_gram(get_or_insert(gram, || x.device().nothing(width, width))?, x)?;
        }
        Ok(())
    }

    /// Adds how the input of `layers` on another stream differs from `x`, which was added.
    fn depart(
        &mut self,
        layers: &Range<usize>,
        x: &Matrix<D>,
        other: &Matrix<D>,
    ) -> Result<(), D::Err> {
        let found = self.sums.iter_mut().find(|sum| sum.layers.iter().any(|l| layers.contains(l)));
        let Some(Sum { departure, width, .. }) = found.filter(|_| self.needs.gram) else {
            return Ok(());
        };
        let sum = get_or_insert(departure, || x.device().nothing(*width, *width))?;
        D::add_product(sum, &D::difference(x, other)?, x)
    }

    /// Hands the means over `samples` to each layer's statistics.
    ///
    /// # Errors
    /// If the device is lost.
    fn finish(self, samples: usize, statistics: &mut [Statistics]) -> Result<(), D::Err> {
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
        let samples = [0..2, 2..4];
        let mut hook =
            GatherInputs { sums: &mut sums, samples: &samples, beside: None, broken: None };
        hook.input(Part::Mlp, 1..3, &x).unwrap();
        hook.input(Part::Mlp, 3..4, &x).unwrap();
        hook.input(Part::Attention, 1..3, &x).unwrap();
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
