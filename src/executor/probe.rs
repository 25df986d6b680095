//! The statistics of linear layers that a pass computes: sums over inputs, and gradients of
//! weights.

use std::{borrow::Cow, iter::zip, ops::Range, sync::Arc};

use barber_metric::{Dims, LayerStats, Needs};
use rayon::prelude::*;

use super::{
    PartWeights, Side,
    finite::Broken,
    forward::{Hook, Input},
    ops::{Matrix, Ops},
};
use crate::family::Part;

/// The statistics of linear layers to compute over the calibration samples.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The indices of the layers, one list for each part.
    pub members: &'a [Vec<usize>],
    /// The statistics. The gradients are those of a sample's mean squared error with respect to the
    /// parts' weights; they are squared sample by sample, then averaged (LLM-Barber, arXiv
    /// 2408.10631, where the parts are the dense ones and the targets the sparse ones' outputs).
    pub needs: Needs,
    /// Whether the sum of these gradients is computed, too.
    pub gradient: bool,
}

impl<'a> Probe<'a> {
    /// A probe for statistics, without the sum of gradients.
    pub fn new(members: &'a [Vec<usize>], needs: Needs) -> Self {
        Self { members, needs, gradient: false }
    }

    /// Whether the probe needs a backward pass.
    pub(super) fn is_backward(&self) -> bool {
        self.gradient || self.needs.squared_gradient
    }
}

/// The statistics of one projection, over the rows (tokens) of its input; `None` if not requested.
/// Means are over the samples that have such rows.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Number of rows of the projection's input.
    pub rows: usize,
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
    /// The statistics with the matrix's name, shape and weights, row-major.
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

/// The sums so far for a [`Probe`].
pub(super) struct Gathered<'a, D: Ops> {
    probe: Probe<'a>,
    inputs: Vec<InputSums<D>>,
    /// Sums of gradients for each part's linear layers.
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

    /// The parts, with the probe's linear layers traced for their gradients.
    pub(super) fn traced(&self, parts: &[PartWeights<D>]) -> Vec<PartWeights<D>> {
        zip(parts, self.probe.members).map(|(part, members)| part.traced(members)).collect()
    }

    /// The hook that adds the inputs of some samples, given by their rows. `beside` has the inputs
    /// on another stream, and the side of the statistics.
    pub(super) fn inputs<'b>(
        &'b mut self,
        samples: &'b [Range<usize>],
        beside: Option<(Side, Inputs<D>)>,
    ) -> GatherInputs<'b, D> {
        let beside = beside.map(|(side, Inputs(inputs))| (side, inputs.into_iter()));
        GatherInputs { sums: &mut self.inputs, samples, beside, broken: None }
    }

    /// Adds the gradients of traced parts after the backward pass of some samples.
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

    /// The statistics of each part's linear layers: means over this number of `samples`.
    pub(super) fn finish(self, samples: usize) -> Result<Vec<Vec<Statistics>>, D::Err> {
        let mean = |mut sums: Vec<f32>| {
            sums.par_iter_mut().for_each(|sum| *sum /= samples as f32);
            sums
        };
        let mut found = Vec::new();
        for (inputs, gradients) in zip(self.inputs, self.gradients) {
            let mut statistics = vec![Statistics::default(); gradients.len()];
            inputs.finish(&mut statistics)?;
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

/// The value of an option, which is computed if it is `None`.
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
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        self.0.push(input.x.clone());
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
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        let beside = self.beside.as_mut();
        let beside = beside.and_then(|(side, inputs)| Some((*side, inputs.next()?)));
        let x = match &beside {
            Some((Side::Dense, dense)) => dense,
            _ => input.x,
        };
        let input = Input { x, ..*input };
        if self.broken.is_none() {
            self.broken = Broken::find(&input)?;
        }
        let sums = self.sums.iter_mut().find(|sums| sums.part == input.part);
        let Some(sums) = sums else { return Ok(()) };
        sums.add(&input, &among(input.rows, self.samples))?;
        match &beside {
            Some((Side::Sparse, dense)) => sums.depart(&input, dense),
            _ => Ok(()),
        }
    }
}

/// The row ranges of samples, converted from rows of the batch to rows of an input with only some
/// of them.
fn among<'a>(rows: Option<&[usize]>, samples: &'a [Range<usize>]) -> Cow<'a, [Range<usize>]> {
    let Some(rows) = rows else { return samples.into() };
    let before = |end: usize| rows.partition_point(|row| *row < end);
    let of = samples.iter().map(|sample| before(sample.start)..before(sample.end));
    of.filter(|sample| !sample.is_empty()).collect()
}

/// The sums so far for one input, which several projections of a part may share.
#[derive(Debug)]
struct InputSums<D: Ops> {
    part: Part,
    /// The indices of the projections.
    members: Vec<usize>,
    needs: Needs,
    sums: Vec<Sum<D>>,
}

#[derive(Debug)]
struct Sum<D: Ops> {
    projections: Vec<usize>,
    width: usize,
    /// Numbers of rows and of samples.
    rows: usize,
    samples: usize,
    square: Vec<f32>,
    gram: Option<D::Sum>,
    departure: Option<D::Sum>,
}

impl<D: Ops> Sum<D> {
    fn new(projections: Vec<usize>, width: usize) -> Self {
        let (square, gram, departure) = (Vec::new(), None, None);
        Self { projections, width, rows: 0, samples: 0, square, gram, departure }
    }
}

impl<D: Ops> InputSums<D> {
    fn new(part: Part, members: &[usize], needs: Needs) -> Self {
        Self { part, members: members.to_vec(), needs, sums: Vec::new() }
    }

    /// Adds an input; `samples` has the rows of each sample.
    fn add(&mut self, input: &Input<'_, D>, samples: &[Range<usize>]) -> Result<(), D::Err> {
        let (x, projections) = (input.x, input.projections.iter().copied());
        let projections: Vec<usize> = projections.filter(|of| self.members.contains(of)).collect();
        if projections.is_empty() || samples.is_empty() {
            return Ok(());
        }
        let (height, width) = x.shape();
        let known = self.sums.iter().position(|sum| sum.projections == projections);
        let place = known.unwrap_or_else(|| {
            self.sums.push(Sum::new(projections, width));
            self.sums.len() - 1
        });
        let sum = &mut self.sums[place];
        sum.rows += height;
        sum.samples += samples.len();
        let Sum { square, gram, .. } = sum;
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

    /// Adds the product of the difference between an input on another stream and the input that was
    /// added.
    fn depart(&mut self, input: &Input<'_, D>, other: &Matrix<D>) -> Result<(), D::Err> {
        let x = input.x;
        let is_of =
            |sum: &&mut Sum<D>| sum.projections.iter().any(|i| input.projections.contains(i));
        let found = self.sums.iter_mut().find(is_of);
        let Some(Sum { departure, width, .. }) = found.filter(|_| self.needs.gram) else {
            return Ok(());
        };
        let sum = get_or_insert(departure, || x.device().nothing(*width, *width))?;
        D::add_product(sum, &D::difference(x, other)?, x)
    }

    /// Writes the means over samples to each projection's statistics.
    ///
    /// # Errors
    /// If the device is lost.
    fn finish(self, statistics: &mut [Statistics]) -> Result<(), D::Err> {
        for sum in self.sums {
            let Sum { projections, width, rows, samples, mut square, gram, departure } = sum;
            let mut gram = gram.map_or_else(|| Ok(Vec::new()), D::sums)?;
            mirror(&mut gram, width);
            let mut departure = departure.map_or_else(|| Ok(Vec::new()), D::sums)?;
            for sum in [&mut square, &mut gram, &mut departure] {
                sum.iter_mut().for_each(|sum| *sum /= samples as f32);
            }
            let some = |sum: Vec<f32>| (!sum.is_empty()).then(|| Arc::new(sum));
            let (square, gram, departure) = (some(square), some(gram), some(departure));
            for projection in projections {
                let statistics = &mut statistics[projection];
                statistics.rows = rows;
                statistics.input_square.clone_from(&square);
                statistics.gram.clone_from(&gram);
                statistics.departure.clone_from(&departure);
            }
        }
        Ok(())
    }
}

/// Copies the lower triangle of a matrix to the upper one, tile by tile: reading whole columns
/// would miss the cache at every number.
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
    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{executor::ops::testing::matrix, family::Feed};

    /// Projections, the rows that they see, and their input.
    type Seen<'a> = (&'a [usize], Option<&'a [usize]>, &'a Matrix<Cpu>);

    /// What is gathered of four projections of an MLP by inputs of some of their rows.
    fn gathered(
        members: &[usize],
        samples: &[Range<usize>],
        inputs: &[Seen<'_>],
    ) -> Vec<Statistics> {
        let needs = Needs::INPUT_SQUARE.or(Needs::GRAM);
        let mut sums = [InputSums::new(Part::Mlp, members, needs)];
        let mut hook = GatherInputs { sums: &mut sums, samples, beside: None, broken: None };
        for part in [Part::Mlp, Part::Attention] {
            for &(projections, rows, x) in inputs {
                let of = if part == Part::Mlp { projections } else { &[1, 2] };
                hook.input(&Input { part, feed: Feed::Hidden, projections: of, rows, x }).unwrap();
            }
        }
        let mut statistics = vec![Statistics::default(); 4];
        let [sums] = sums;
        sums.finish(&mut statistics).unwrap();
        statistics
    }

    #[test]
    fn projections_that_share_an_input_share_its_statistics() {
        let x = matrix([1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 0.0, 0.0].to_vec(), (4, 2));
        let inputs: [(&[usize], _, _); 2] = [(&[1, 2], None, &x), (&[3], None, &x)];
        let statistics = gathered(&[1, 2], &[0..2, 2..4], &inputs);
        for found in &statistics[1..3] {
            assert_eq!(found.rows, 4);
            assert_eq!(found.input_square.as_ref().unwrap()[..], [5.0, 12.0]);
            assert_eq!(found.gram.as_ref().unwrap()[..], [5.0, 7.0, 7.0, 12.0]);
        }
        assert!(statistics[3].gram.is_none() && statistics[0].input_square.is_none());
        assert_eq!((statistics[0].rows, statistics[3].rows), (0, 0));
    }

    #[test]
    fn the_statistics_of_an_expert_are_of_its_own_rows() {
        // Three samples of two tokens. The first expert sees three tokens of two samples, the
        // second one the others, of which two are of one sample.
        let samples = [0..2, 2..4, 4..6];
        let [first, second] = [[0, 1, 4], [2, 3, 5]];
        let x = matrix([1.0, 2.0, 3.0, 4.0, 5.0, 6.0].to_vec(), (3, 2));
        let y = matrix([1.0, 0.0, 0.0, 1.0, 0.0, 2.0].to_vec(), (3, 2));
        let inputs: [(&[usize], _, _); 2] =
            [(&[0, 1], Some(&first[..]), &x), (&[2, 3], Some(&second[..]), &y)];
        let statistics = gathered(&[0, 1, 2, 3], &samples, &inputs);
        for (found, square, gram) in [
            (&statistics[0], [17.5, 28.0], [17.5, 22.0, 22.0, 28.0]),
            (&statistics[1], [17.5, 28.0], [17.5, 22.0, 22.0, 28.0]),
            (&statistics[2], [0.5, 2.5], [0.5, 0.0, 0.0, 2.5]),
            (&statistics[3], [0.5, 2.5], [0.5, 0.0, 0.0, 2.5]),
        ] {
            assert_eq!(found.rows, 3);
            assert_eq!(found.input_square.as_ref().unwrap()[..], square);
            assert_eq!(found.gram.as_ref().unwrap()[..], gram);
        }
        // One expert alone sees no sample but those of its rows.
        let alone: [(&[usize], _, _); 2] = [(&[0], Some(&first[..]), &x), (&[2], Some(&[]), &x)];
        let statistics = gathered(&[0, 2], &samples, &alone);
        assert_eq!(statistics[0].input_square.as_ref().unwrap()[..], [17.5, 28.0]);
        assert!(statistics[2].rows == 0 && statistics[2].gram.is_none());
    }

    #[test]
    fn what_is_not_finite_is_named_by_its_row_of_the_batch() {
        let x = matrix([1.0, 2.0, f32::NAN, 4.0].to_vec(), (2, 2));
        let input = Input {
            part: Part::Mlp,
            feed: Feed::Hidden,
            projections: &[2, 3],
            rows: Some(&[1, 5]),
            x: &x,
        };
        let found = format!("{:?}", Broken::find(&input).unwrap().unwrap());
        assert!(found.contains("linear: 2") && found.contains("row: 5"), "{found}");
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
