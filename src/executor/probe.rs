//! The statistics of linear layers that a pass computes: sums over inputs, and gradients of
//! weights.

use std::{borrow::Cow, collections::BTreeMap, iter::zip, ops::Range, sync::Arc};

use barber_metric::{LayerStats, Needs};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    PartWeights,
    finite::Broken,
    forward::{Hook, Input},
    ops::{Matrix, Ops},
};
use crate::{
    family::{Feed, Part, Projection},
    ranks::{Ranks, Sums},
};

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
/// Means of inputs are over the samples that have such rows, those of gradients over all samples.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Number of rows of the projection's input: of an expert's, the tokens that it saw.
    pub rows: usize,
    /// Whether these are the means over all experts of the layer, as this one saw fewer than
    /// [`FEWEST_ROWS`] tokens.
    pub pooled: bool,
    /// Mean over samples of the squared gradient, [rows, columns].
    pub squared_gradient: Option<Vec<f32>>,
    /// Sum over samples of the gradient, [rows, columns].
    pub gradient: Option<Vec<f32>>,
    /// Mean over samples of Σ x² over a sample's tokens, `[columns]`.
    pub input_square: Option<Arc<Vec<f32>>>,
    /// Mean of x over all tokens, `[columns]`.
    pub input_mean: Option<Arc<Vec<f32>>>,
    /// Variance of x over all tokens, `[columns]`.
    pub input_variance: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ x xᵀ over a sample's tokens, [columns, columns], symmetric.
    pub gram: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ (x̃ − x) xᵀ over a sample's tokens, [columns, columns], where x̃ is
    /// the input on another stream.
    pub departure: Option<Arc<Vec<f32>>>,
}

/// The smallest number of tokens with which an expert has statistics of its own.
pub const FEWEST_ROWS: usize = 32;

impl Statistics {
    /// The statistics with a projection and its weights, row-major.
    pub fn of<'a>(&'a self, of: &'a Projection, weight: &'a [f32]) -> LayerStats<'a> {
        LayerStats {
            name: &of.weight,
            dims: of.dims,
            weight,
            mask: &[],
            whole_rows: false,
            squared_gradient: self.squared_gradient.as_deref(),
            input_square: self.input_square.as_ref().map(|values| &values[..]),
            input_variance: self.input_variance.as_ref().map(|values| &values[..]),
            gram: self.gram.as_ref().map(|values| &values[..]),
        }
    }
}

/// The sums so far for a [`Probe`]: over the chunk of samples that the pass is in, and over those
/// before.
pub(super) struct Gathered<'a, D: Ops> {
    probe: Probe<'a>,
    chunk: Chunk<D>,
    before: Before<D>,
}

/// The sums over the chunks before.
enum Before<D: Ops> {
    /// Those of a process alone, on its device.
    Here(Option<Chunk<D>>),
    /// Those of several ranks, with the counts of this one.
    Shared(Sums<Name>, Counts),
}

/// The sums over a chunk of samples.
struct Chunk<D: Ops> {
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

/// The name of a sum on the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Name {
    /// Index of the part.
    part: usize,
    kind: Kind,
    /// The projections that share the sum.
    projections: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Kind {
    /// Number of rows of an input.
    Rows,
    /// Number of samples that have such rows.
    Samples,
    /// One of [`HostSum::all`].
    Input(usize),
    SquaredGradient,
    Gradient,
}

type Counts = BTreeMap<Name, usize>;

/// Sums on the host.
#[derive(Default)]
struct HostSums {
    vectors: BTreeMap<Name, Vec<f32>>,
    counts: Counts,
}

/// Adds the sum of another chunk.
fn add_sum<D: Ops>(sum: &mut Option<D::Sum>, other: Option<D::Sum>) -> Result<(), D::Err> {
    match (sum, other) {
        (_, None) => Ok(()),
        (Some(sum), Some(other)) => D::add_sum(sum, other),
        (sum @ None, other) => {
            *sum = other;
            Ok(())
        }
    }
}

impl<D: Ops> Chunk<D> {
    /// Takes the sums out.
    fn take(&mut self) -> Self {
        let inputs = self.inputs.iter_mut().map(InputSums::take).collect();
        let take = |of: &mut Vec<_>| of.iter_mut().map(std::mem::take).collect();
        Self { inputs, gradients: self.gradients.iter_mut().map(take).collect() }
    }

    fn add(&mut self, other: Self) -> Result<(), D::Err> {
        zip(&mut self.inputs, other.inputs).try_for_each(|(own, other)| own.merge(other))?;
        let gradients = self.gradients.iter_mut().flatten();
        for (own, other) in zip(gradients, other.gradients.into_iter().flatten()) {
            add_sum::<D>(&mut own.squares, other.squares)?;
            add_sum::<D>(&mut own.gradient, other.gradient)?;
        }
        Ok(())
    }

    fn on_host(self) -> Result<HostSums, D::Err> {
        let mut found = HostSums::default();
        for (part, (inputs, gradients)) in zip(self.inputs, self.gradients).enumerate() {
            inputs.on_host(part, &mut found)?;
            for (i, GradientSums { squares, gradient }) in gradients.into_iter().enumerate() {
                for (kind, sum) in [(Kind::SquaredGradient, squares), (Kind::Gradient, gradient)] {
                    if let Some(sum) = sum {
                        let name = Name { part, kind, projections: vec![i] };
                        found.vectors.insert(name, D::sums(sum)?);
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Adds counts.
fn count(sums: &mut Counts, others: Counts) {
    others.into_iter().for_each(|(name, count)| *sums.entry(name).or_default() += count);
}

impl<'a, D: Ops> Gathered<'a, D> {
    pub(super) fn new(parts: &[PartWeights<D>], probe: Probe<'a>, ranks: &Ranks) -> Self {
        let inputs = zip(parts, probe.members);
        let inputs = inputs
            .map(|(part, of)| InputSums::new(part.part, &part.projections, of, probe.needs))
            .collect();
        let none =
            |part: &PartWeights<D>| part.linears.iter().map(|_| Default::default()).collect();
        let before = match ranks.size() {
            1 => Before::Here(None),
            _ => Before::Shared(Sums::new(ranks), Counts::new()),
        };
        let chunk = Chunk { inputs, gradients: parts.iter().map(none).collect() };
        Self { probe, chunk, before }
    }

    /// Ends a chunk of samples. All ranks call it together.
    pub(super) fn end_chunk(&mut self) -> Result<(), D::Err> {
        let chunk = self.chunk.take();
        match &mut self.before {
            Before::Here(Some(sums)) => sums.add(chunk)?,
            Before::Here(none) => *none = Some(chunk),
            Before::Shared(sums, counts) => {
                let found = chunk.on_host()?;
                sums.add(found.vectors);
                count(counts, found.counts);
            }
        }
        Ok(())
    }

    /// The parts, with the probe's linear layers traced for their gradients.
    pub(super) fn traced(&self, parts: &[PartWeights<D>]) -> Vec<PartWeights<D>> {
        zip(parts, self.probe.members).map(|(part, members)| part.traced(members)).collect()
    }

    /// The hook that adds the inputs of some samples, given by their rows. `beside` has the inputs
    /// on a dense stream, from which those on this one depart.
    pub(super) fn inputs<'b>(
        &'b mut self,
        samples: &'b [Range<usize>],
        beside: Option<Inputs<D>>,
    ) -> GatherInputs<'b, D> {
        GatherInputs { sums: &mut self.chunk.inputs, samples, beside, broken: None }
    }

    /// Adds the gradients of traced parts after the backward pass of some samples.
    pub(super) fn add_gradients(
        &mut self,
        traced: &[PartWeights<D>],
        samples: &[Range<usize>],
    ) -> Result<(), D::Err> {
        for (part, sums) in zip(traced, &mut self.chunk.gradients) {
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
            // The layers of an expert have the same rows.
            for layers in squared.chunk_by_mut(|(_, a), (_, b)| a.rows == b.rows) {
                let rows = layers.first().and_then(|(_, trace)| trace.rows.clone());
                D::add_squared_gradients(layers, &among(rows.as_deref(), samples))?;
            }
        }
        Ok(())
    }

    /// The statistics of each part's linear layers: means over this number of `samples`. All ranks
    /// call it together.
    pub(super) fn finish(self, samples: usize) -> Result<Vec<Vec<Statistics>>, D::Err> {
        let Self { probe, chunk, before } = self;
        let mut sums = match before {
            Before::Here(sums) => sums.map_or_else(|| Ok(HostSums::default()), Chunk::on_host)?,
            Before::Shared(sums, own) => {
                let mut counts = Counts::new();
                let all = sums.ranks().gather_values(Vec::from_iter(own));
                all.into_iter().for_each(|own| count(&mut counts, own.into_iter().collect()));
                HostSums { vectors: sums.finish(), counts }
            }
        };
        let mean = |mut sums: Vec<f32>| {
            sums.par_iter_mut().for_each(|sum| *sum /= samples as f32);
            sums
        };
        let mut found = Vec::new();
        for (part, (inputs, gradients)) in zip(chunk.inputs, chunk.gradients).enumerate() {
            let mut statistics = vec![Statistics::default(); gradients.len()];
            let InputSums { projections, needs, .. } = inputs;
            sums.inputs(part, &projections, needs, &mut statistics);
            for (i, statistics) in statistics.iter_mut().enumerate() {
                let mut take =
                    |kind| sums.vectors.remove(&Name { part, kind, projections: vec![i] });
                statistics.squared_gradient = take(Kind::SquaredGradient).map(mean);
                statistics.gradient = take(Kind::Gradient);
            }
            if probe.needs.squared_gradient {
                pool_gradients(&projections, &mut statistics);
            }
            found.push(statistics);
        }
        Ok(found)
    }
}

/// Gives experts with too few rows the mean of the squared gradients over the experts that were
/// probed. An expert without rows has gradients of zero.
fn pool_gradients(projections: &[Probed], statistics: &mut [Statistics]) {
    for role in 0..projections.iter().map(|of| of.place + 1).max().unwrap_or(0) {
        let all = projections.iter().enumerate().filter(|(_, of)| of.place == role);
        let all: Vec<usize> =
            all.filter(|(_, of)| of.is_member && of.expert.is_some()).map(|(i, _)| i).collect();
        let is_few = |i: &&usize| statistics[**i].rows < FEWEST_ROWS;
        let few: Vec<usize> = all.iter().filter(is_few).copied().collect();
        let Some(&first) = few.first() else { continue };
        let mut sum = vec![0.0; projections[first].weights];
        for squares in all.iter().filter_map(|i| statistics[*i].squared_gradient.as_ref()) {
            sum.par_iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
        }
        sum.par_iter_mut().for_each(|sum| *sum /= all.len() as f32);
        for i in few {
            (statistics[i].squared_gradient, statistics[i].pooled) = (Some(sum.clone()), true);
        }
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

/// Keeps the inputs of linear layers.
pub(super) struct Inputs<D: Ops>(Vec<Kept<D>>);

/// An input that was kept.
struct Kept<D: Ops> {
    part: Part,
    /// Index of the first of the input's projections.
    first: Option<usize>,
    rows: Option<Arc<[usize]>>,
    x: Matrix<D>,
}

impl<D: Ops> Default for Inputs<D> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<D: Ops> Inputs<D> {
    /// Takes the input of the same projections.
    fn take(&mut self, like: &Input<'_, D>) -> Option<Kept<D>> {
        let first = like.projections.first().copied();
        let same = |kept: &Kept<D>| (kept.part, kept.first) == (like.part, first);
        let found = self.0.iter().position(same)?;
        Some(self.0.swap_remove(found))
    }
}

impl<D: Ops> Hook<D> for Inputs<D> {
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        self.0.push(Kept {
            part: input.part,
            first: input.projections.first().copied(),
            rows: input.rows.map(Into::into),
            x: input.x.clone(),
        });
        Ok(())
    }
}

/// Adds the inputs of some samples to the sums of their part.
pub(super) struct GatherInputs<'a, D: Ops> {
    sums: &'a mut [InputSums<D>],
    samples: &'a [Range<usize>],
    beside: Option<Inputs<D>>,
    /// The first input that is not finite.
    pub(super) broken: Option<Broken>,
}

impl<D: Ops> Hook<D> for GatherInputs<'_, D> {
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        if self.broken.is_none() {
            self.broken = Broken::find(input)?;
        }
        let beside = self.beside.as_mut().and_then(|beside| beside.take(input));
        let sums = self.sums.iter_mut().find(|sums| sums.part == input.part);
        let Some(sums) = sums else { return Ok(()) };
        sums.add(input, &among(input.rows, self.samples))?;
        beside.map_or(Ok(()), |dense| sums.depart(input, &dense))
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

/// A projection of a part with a probe.
#[derive(Clone, Copy, Debug)]
struct Probed {
    feed: Feed,
    /// Index of the expert, if it has one.
    expert: Option<usize>,
    /// Index among the projections of the expert.
    place: usize,
    /// Number of inputs.
    width: usize,
    /// Number of weights.
    weights: usize,
    /// Whether its statistics are wanted.
    is_member: bool,
}

impl Probed {
    fn all(projections: &[Projection], members: &[usize]) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::with_capacity(projections.len());
        for (i, of) in projections.iter().enumerate() {
            let same = all.last().filter(|last| last.expert == of.expert);
            all.push(Self {
                feed: of.feed(),
                expert: of.expert,
                place: same.map_or(0, |last| last.place + 1),
                width: of.dims.columns,
                weights: of.dims.len(),
                is_member: members.contains(&i),
            });
        }
        all
    }
}

/// The sums so far for the inputs of a part.
#[derive(Debug)]
struct InputSums<D: Ops> {
    part: Part,
    projections: Vec<Probed>,
    needs: Needs,
    /// Number of rows that each projection saw.
    rows: Vec<usize>,
    sums: Vec<Sum<D>>,
}

/// The sums of an input, which several projections may share.
#[derive(Debug)]
struct Sum<D: Ops> {
    projections: Vec<usize>,
    width: usize,
    /// Number of samples.
    samples: usize,
    square: Vec<f32>,
    /// Sums of the inputs, [1, width].
    first: Option<D::Sum>,
    gram: Option<D::Sum>,
    departure: Option<D::Sum>,
}

impl<D: Ops> Sum<D> {
    fn new(projections: Vec<usize>, width: usize) -> Self {
        let (square, first, gram, departure) = (Vec::new(), None, None, None);
        Self { projections, width, samples: 0, square, first, gram, departure }
    }

    /// Adds the sums of another chunk.
    fn merge(&mut self, other: Self) -> Result<(), D::Err> {
        self.samples += other.samples;
        self.square.resize(self.square.len().max(other.square.len()), 0.0);
        zip(&mut self.square, &other.square).for_each(|(sum, x)| *sum += x);
        add_sum::<D>(&mut self.first, other.first)?;
        add_sum::<D>(&mut self.gram, other.gram)?;
        add_sum::<D>(&mut self.departure, other.departure)
    }
}

/// The place of the Gram matrix in [`HostSum::all`].
const GRAM: usize = 2;

/// Sums over samples of an input's squares, of the input itself, of its Gram matrix and departure; empty
/// if not requested.
#[derive(Clone, Debug, Default)]
struct HostSum {
    samples: usize,
    all: [Vec<f32>; 4],
}

impl HostSum {
    /// Adds the sums of another input of the same width.
    fn add(&mut self, other: &Self) {
        self.samples += other.samples;
        for (sum, other) in zip(&mut self.all, &other.all) {
            sum.resize(sum.len().max(other.len()), 0.0);
            sum.par_iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
        }
    }

    /// Sums that make all inputs alike, for want of any.
    fn alike(width: usize, needs: Needs) -> Self {
        let mut gram = vec![0.0; if needs.gram { width * width } else { 0 }];
        gram.iter_mut().step_by(width + 1).for_each(|square| *square = 1.0);
        let square = vec![1.0; if needs.squares() { width } else { 0 }];
        let first = vec![0.0; if needs.input_variance { width } else { 0 }];
        Self { samples: 1, all: [square, first, gram, Vec::new()] }
    }

    /// The means over samples, and the variance over `rows`, for the statistics of projections.
    fn means(self, rows: usize) -> [Option<Arc<Vec<f32>>>; 5] {
        let [samples, rows] = [self.samples, rows].map(|count| count.max(1) as f32);
        let [square, mut first, gram, departure] = self.all;
        first.iter_mut().for_each(|sum| *sum /= rows);
        let variance = zip(&first, &square);
        let variance =
            variance.map(|(mean, square)| (square / rows - mean * mean).max(0.0)).collect();
        let found = |values: Vec<f32>| (!values.is_empty()).then(|| Arc::new(values));
        let mean = |mut sum: Vec<f32>| {
            sum.iter_mut().for_each(|sum| *sum /= samples);
            found(sum)
        };
        [mean(square), found(first), found(variance), mean(gram), mean(departure)]
    }
}

impl Statistics {
    fn set_inputs(&mut self, found: &[Option<Arc<Vec<f32>>>; 5]) {
        let of_sums = [&mut self.input_square, &mut self.input_mean, &mut self.input_variance];
        let all = of_sums.into_iter().chain([&mut self.gram, &mut self.departure]);
        zip(all, found).for_each(|(own, found)| own.clone_from(found));
    }
}

impl<D: Ops> InputSums<D> {
    fn new(part: Part, projections: &[Projection], members: &[usize], needs: Needs) -> Self {
        let (projections, rows) = (Probed::all(projections, members), vec![0; projections.len()]);
        Self { part, projections, needs, rows, sums: Vec::new() }
    }

    /// Adds an input; `samples` has the rows of each sample.
    fn add(&mut self, input: &Input<'_, D>, samples: &[Range<usize>]) -> Result<(), D::Err> {
        let (height, width) = input.x.shape();
        let (x, projections) = (input.x, input.projections.iter().copied());
        let rows = input.rows.map_or(height, <[usize]>::len);
        projections.clone().for_each(|of| self.rows[of] += rows);
        let members = projections.filter(|of| self.projections[*of].is_member);
        let projections: Vec<usize> = members.collect();
        if projections.is_empty() || samples.is_empty() || !self.needs.inputs() {
            return Ok(());
        }
        let known = self.sums.iter().position(|sum| sum.projections == projections);
        let place = known.unwrap_or_else(|| {
            self.sums.push(Sum::new(projections, width));
            self.sums.len() - 1
        });
        let sum = &mut self.sums[place];
        sum.samples += samples.len();
        let Sum { square, first, gram, .. } = sum;
        if self.needs.input_variance {
            let ones = x.device().hold(vec![1.0; height], (height, 1))?;
            let first = get_or_insert(first, || x.device().nothing(1, width))?;
            D::add_product(first, &ones, x)?;
        }
        if self.needs.squares() {
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

    /// Adds the product of the difference between an input on a dense stream and the input that was
    /// added. Tokens that the dense stream sends to other experts depart by nothing.
    fn depart(&mut self, input: &Input<'_, D>, dense: &Kept<D>) -> Result<(), D::Err> {
        let is_of =
            |sum: &&mut Sum<D>| sum.projections.iter().any(|i| input.projections.contains(i));
        let found = self.sums.iter_mut().find(is_of);
        let Some(Sum { departure, width, .. }) = found.filter(|_| self.needs.gram) else {
            return Ok(());
        };
        let (mut x, mut other) = (input.x.clone(), dense.x.clone());
        if let (Some(rows), Some(others)) = (input.rows, &dense.rows)
            && *rows != **others
        {
            let places = |of: &[usize], among: &[usize]| -> Arc<[usize]> {
                let places = of.iter().enumerate();
                places.filter(|(_, row)| among.binary_search(row).is_ok()).map(|(i, _)| i).collect()
            };
            (x, other) =
                (D::rows(x, &places(rows, others))?, D::rows(other, &places(others, rows))?);
            if x.shape().0 == 0 {
                return Ok(());
            }
        }
        let sum = get_or_insert(departure, || x.device().nothing(*width, *width))?;
        D::add_product(sum, &D::difference(&x, &other)?, &x)
    }

    /// Takes the sums out.
    fn take(&mut self) -> Self {
        let Self { part, projections, needs, rows, .. } = self;
        let none = vec![0; rows.len()];
        let empty = Self {
            part: *part,
            projections: projections.clone(),
            needs: *needs,
            rows: none,
            sums: Vec::new(),
        };
        std::mem::replace(self, empty)
    }

    /// Adds the sums of another chunk.
    fn merge(&mut self, other: Self) -> Result<(), D::Err> {
        zip(&mut self.rows, other.rows).for_each(|(rows, other)| *rows += other);
        for sum in other.sums {
            match self.sums.iter_mut().find(|own| own.projections == sum.projections) {
                Some(own) => own.merge(sum)?,
                None => self.sums.push(sum),
            }
        }
        Ok(())
    }

    /// Adds the sums of a part to those on the host.
    fn on_host(self, part: usize, found: &mut HostSums) -> Result<(), D::Err> {
        for (i, rows) in self.rows.into_iter().enumerate() {
            found.counts.insert(Name { part, kind: Kind::Rows, projections: vec![i] }, rows);
        }
        for Sum { projections, samples, square, first, gram, departure, .. } in self.sums {
            let name = |kind| Name { part, kind, projections: projections.clone() };
            found.counts.insert(name(Kind::Samples), samples);
            let on_host = |sum: Option<D::Sum>| sum.map_or_else(|| Ok(Vec::new()), D::sums);
            let all = [square, on_host(first)?, on_host(gram)?, on_host(departure)?];
            let all = all.into_iter().enumerate().filter(|(_, sum)| !sum.is_empty());
            found.vectors.extend(all.map(|(i, sum)| (name(Kind::Input(i)), sum)));
        }
        Ok(())
    }
}

impl HostSums {
    /// Writes the means over samples to the statistics of the projections of a part. An expert with too
    /// few rows gets the means over all experts that were probed.
    fn inputs(
        &mut self,
        part: usize,
        projections: &[Probed],
        needs: Needs,
        statistics: &mut [Statistics],
    ) {
        let (rows, mut sums) = (self.rows(part, projections.len()), self.sums(part));
        zip(&mut *statistics, &rows).for_each(|(statistics, rows)| statistics.rows = *rows);
        let is_few = |i: &usize| {
            let Probed { expert, is_member, .. } = projections[*i];
            is_member && expert.is_some() && rows[*i] < FEWEST_ROWS
        };
        let few: Vec<usize> = (0..projections.len()).filter(is_few).collect();
        let mut pools = Feed::ALL.map(|_| HostSum::default());
        for (own, sum) in &mut sums {
            let of = projections[own[0]];
            mirror(&mut sum.all[GRAM], of.width);
            if !few.is_empty() && of.expert.is_some() {
                pools[of.feed as usize].add(sum);
            }
            let means = std::mem::take(sum).means(rows[own[0]]);
            own.iter().for_each(|i| statistics[*i].set_inputs(&means));
        }
        if few.is_empty() || !needs.inputs() {
            return;
        }
        for (feed, pool) in zip(Feed::ALL, pools) {
            let few = || few.iter().copied().filter(|i| projections[*i].feed == feed);
            let Some(first) = few().next() else { continue };
            let place = projections[first].place;
            let same = |i: &usize| projections[*i].feed == feed && projections[*i].place == place;
            let mut seen = (0..projections.len()).filter(same).map(|i| rows[i]).sum();
            let pool = match pool.samples {
                0 => {
                    seen = 1;
                    HostSum::alike(projections[first].width, needs)
                }
                _ => pool,
            };
            let means = pool.means(seen);
            for i in few() {
                statistics[i].set_inputs(&means);
                statistics[i].pooled = true;
            }
        }
    }

    /// The numbers of rows of the projections of a part.
    fn rows(&self, part: usize, count: usize) -> Vec<usize> {
        let name = |i| Name { part, kind: Kind::Rows, projections: vec![i] };
        (0..count).map(|i| self.counts.get(&name(i)).copied().unwrap_or(0)).collect()
    }

    /// Takes out the sums of a part's inputs, each with its projections.
    fn sums(&mut self, part: usize) -> Vec<(Vec<usize>, HostSum)> {
        let of = |name: &&Name| name.part == part && name.kind == Kind::Samples;
        let names: Vec<Name> = self.counts.keys().filter(of).cloned().collect();
        let sum = |name: Name| {
            let samples = self.counts[&name];
            let all = [0, 1, 2, 3].map(|i| {
                let name = Name { kind: Kind::Input(i), ..name.clone() };
                self.vectors.remove(&name).unwrap_or_default()
            });
            (name.projections, HostSum { samples, all })
        };
        names.into_iter().map(sum).collect()
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
    use crate::{executor::ops::testing::matrix, family::Role};
    use barber_metric::Dims;

    /// Two projections that read the hidden states and one that reads the inner ones, of each of
    /// some experts, or of a part without experts.
    fn projections(experts: &[Option<usize>], width: usize) -> Vec<Projection> {
        let of = |expert: Option<usize>| {
            [Role::Gate, Role::Up].map(|role| Projection {
                name: String::new(),
                role,
                expert,
                weight: String::new(),
                bias: None,
                dims: Dims { rows: 1, columns: width },
            })
        };
        experts.iter().flat_map(|expert| of(*expert)).collect()
    }

    /// Projections, the rows that they see, and their input.
    type Seen<'a> = (&'a [usize], Option<&'a [usize]>, &'a Matrix<Cpu>);

    /// What is gathered of four projections of an MLP by inputs of some of their rows.
    fn gathered(
        members: &[usize],
        samples: &[Range<usize>],
        inputs: &[Seen<'_>],
    ) -> Vec<Statistics> {
        let needs = Needs::INPUT_SQUARE.or(Needs::GRAM);
        let projections = projections(&[None; 2], inputs[0].2.shape().1);
        let mut sums = [InputSums::new(Part::Mlp, &projections, members, needs)];
        let mut hook = GatherInputs { sums: &mut sums, samples, beside: None, broken: None };
        for part in [Part::Mlp, Part::Attention] {
            for &(projections, rows, x) in inputs {
                let of = if part == Part::Mlp { projections } else { &[1, 2] };
                hook.input(&Input { part, feed: Feed::Hidden, projections: of, rows, x }).unwrap();
            }
        }
        let mut statistics = vec![Statistics::default(); 4];
        let ([sums], mut found) = (sums, HostSums::default());
        let projections = sums.projections.clone();
        sums.on_host(0, &mut found).unwrap();
        found.inputs(0, &projections, needs, &mut statistics);
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
        assert_eq!((statistics[0].rows, statistics[3].rows), (0, 4));
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
