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
    /// Runs consecutive dense parts on a stream, and on another one of the same samples, and gathers
    /// what `needs` asks for of the inputs of the layers in `members`, a list for each part. Where it
    /// asks for Gram matrices and there is another stream, how the inputs differ is gathered too.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch file fails.
    pub fn survey(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        other: Option<&Stream<D>>,
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
            let calibrating = !stream.held_out(index);
            if calibrating {
                let mut watch = Adding { sums: &mut sums, samples: &batch.samples };
                for (part, layers, x) in &inputs {
                    watch.input(*part, layers.clone(), x).map_err(Error::device)?;
                }
            }
            let (Some(other), Some(store)) = (other, &mut others) else { continue };
            let (_, theirs) = pass(other, store)?;
            if !calibrating {
                continue;
            }
            for ((part, layers, x), (_, _, other)) in inputs.iter().zip(&theirs) {
                let of = sums.iter_mut().find(|sums| sums.part() == *part);
                let added = of.map_or(Ok(()), |sums| sums.depart(layers, x, other));
                added.map_err(Error::device)?;
            }
        }
        let statistics = finish(parts, sums, stream.calibration);
        Ok(Surveyed { statistics, outputs, other: others })
    }
}
