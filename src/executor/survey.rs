//! A forward pass of dense parts on one stream of hidden states, or on two side by side, for all
//! that it tells: statistics of inputs, how they differ between the streams, and the outputs.

use std::ops::Range;

use barber_metric::Needs;

use super::{
    Batch, Error, Executor, PartWeights, Store, Stream,
    forward::Watch,
    inputs::Adding,
    measure::{Statistics, finish, run, sums},
    ops::{Matrix, Ops},
};
use crate::family::Part;

/// One of the two models: the dense one, or the one that is pruned so far.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The dense model.
    Dense,
    /// The pruned one.
    #[default]
    Sparse,
}

/// What [`Executor::survey`] finds.
#[derive(Debug)]
pub struct Surveyed<D: Ops> {
    /// One per linear layer of each part.
    pub statistics: Vec<Vec<Statistics>>,
    /// What the parts give on each sample, as [`Executor::outputs`] has it.
    pub outputs: Store<D>,
    /// The same on the other stream.
    pub other: Option<Store<D>>,
}

/// Notes the inputs of linear layers.
struct Inputs<D: Ops>(Vec<(Part, Range<usize>, Matrix<D>)>);

impl<D: Ops> Watch<D> for Inputs<D> {
    fn input(&mut self, part: Part, layers: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        self.0.push((part, layers, x.clone()));
        Ok(())
    }
}

impl<D: Ops> Executor<D> {
    /// Runs consecutive dense parts on a sparse stream, and on a dense one of the same samples, and
    /// gathers what `needs` asks for of the inputs that the layers in `members`, a list for each
    /// part, have on the given side. Where it asks for Gram matrices on the sparse side and there is
    /// a dense stream, how its inputs differ is gathered too.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn survey(
        &self,
        parts: &[PartWeights<D>],
        (stream, other, side): (&Stream<D>, Option<&Stream<D>>, Side),
        members: &[Vec<usize>],
        needs: Needs,
    ) -> Result<Surveyed<D>, Error> {
        let mut sums = sums(parts, members, needs);
        let mut outputs = self.storage.store(stream.runs.len());
        let mut others = other.map(|other| self.storage.store(other.runs.len()));
        for index in 0..stream.runs.len() {
            let pass = |stream: &Stream<D>, store: &mut Store<D>| -> Result<_, Error> {
                let batch: Batch<D> = self.batch(stream, index)?;
                let mut inputs = Inputs(Vec::new());
                let output: Matrix<D> =
                    run(parts, &batch, Default::default(), &mut inputs).map_err(Error::device)?;
                store.put(index, output)?;
                Ok((batch, inputs.0))
            };
            let (batch, inputs) = pass(stream, &mut outputs)?;
            let theirs = match (other, &mut others) {
                (Some(other), Some(store)) => Some(pass(other, store)?.1),
                _ => None,
            };
            if stream.held_out(index) {
                continue;
            }
            let mut watch = Adding::new(&mut sums, &batch.samples);
            let dense = theirs.as_ref().filter(|_| side == Side::Dense);
            for (part, layers, x) in dense.unwrap_or(&inputs) {
                watch.input(*part, layers.clone(), x).map_err(Error::device)?;
            }
            batch.check_inputs(parts, watch.broken)?;
            let theirs = theirs.filter(|_| side == Side::Sparse);
            for ((part, layers, x), (_, _, other)) in inputs.iter().zip(theirs.iter().flatten()) {
                let of = sums.iter_mut().find(|sums| sums.part() == *part);
                let added = of.map_or(Ok(()), |sums| sums.depart(layers, x, other));
                added.map_err(Error::device)?;
            }
        }
        let statistics = finish(parts, sums, stream.calibration)?;
        Ok(Surveyed { statistics, outputs, other: others })
    }
}
