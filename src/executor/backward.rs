//! The backward pass through a decoder layer: from the gradient of its output to those of its input
//! and of its linear layers.

use super::{
    Error, Executor, PartWeights, Probe, Statistics, Store, Stream,
    forward::forward,
    ops::{InputGradient, Matrix, Ops, Trace, gradient, seeded, traced},
    probe::Gathered,
    stream::Batch,
};
use crate::ranks::Turn;

/// What a backward pass found of a layer: for each part and each linear layer that was asked for, in
/// the order of its `members`, what its gradient consists of in each of the rank's runs, by the run's
/// index.
pub type Traces<D> = Vec<Vec<Vec<(usize, Trace<D>)>>>;

impl<D: Ops> Executor<D> {
    /// Goes backward through consecutive parts of a decoder layer, which run again from the hidden
    /// states before them. The `gradients` of a loss, a matrix [tokens, channels] per run, are those
    /// of the hidden states after the parts, and then of those before them. `members` are the linear
    /// layers of each part whose traces are wanted.
    ///
    /// # Errors
    /// If the device has not enough memory, or the scratch space fails.
    pub fn backward(
        &self,
        parts: &[PartWeights<D>],
        members: &[Vec<usize>],
        stream: &Stream<D>,
        gradients: &mut [(usize, Matrix<D>)],
    ) -> Result<Traces<D>, Error> {
        let none = |members: &Vec<usize>| vec![Vec::new(); members.len()];
        let mut traces: Traces<D> = members.iter().map(none).collect();
        for (run, gradient) in gradients {
            let batch = self.batch(stream, *run)?;
            let traced: Vec<PartWeights<D>> =
                parts.iter().zip(members).map(|(part, members)| part.traced(members)).collect();
            *gradient = through(&traced, &batch, gradient).map_err(Error::device)?;
            for (part, (members, traces)) in traced.iter().zip(members.iter().zip(&mut traces)) {
                for (linear, traces) in members.iter().zip(traces) {
                    let trace = part.linears[*linear].take_trace();
                    traces.extend(trace.map(|trace| (*run, trace)));
                }
            }
        }
        Ok(traces)
    }

    /// [`Executor::backward`] with the statistics of gradients that a probe asks for, in place of
    /// traces, and with stored gradients: a sample's gradient is that of its own loss.
    ///
    /// # Errors
    /// As [`Executor::backward`].
    pub fn backward_statistics(
        &self,
        parts: &[PartWeights<D>],
        probe: Probe<'_>,
        stream: &Stream<D>,
        gradients: &mut Store<D>,
    ) -> Result<Vec<Vec<Statistics>>, Error> {
        let mut gathered = Gathered::new(parts, probe, &self.ranks);
        for Turn { runs, sums } in stream.chunks.turns(0..stream.runs.len()) {
            for run in runs {
                let (batch, traced) = (self.batch(stream, run)?, gathered.traced(parts));
                let after = gradients.get(run, &self.device)?;
                let before = through(&traced, &batch, &after).map_err(Error::device)?;
                gradients.put(run, before)?;
                gathered.add_gradients(&traced, &batch.samples).map_err(Error::device)?;
            }
            if sums {
                gathered.end_chunk().map_err(Error::device)?;
            }
        }
        gathered.finish(stream.len()).map_err(Error::device)
    }
}

/// The gradient of a batch's hidden states before some parts, for that of those after them.
fn through<D: Ops>(
    parts: &[PartWeights<D>],
    batch: &Batch<D>,
    after: &Matrix<D>,
) -> Result<Matrix<D>, D::Err> {
    let before = &batch.states;
    let mut states = traced(before.clone());
    for part in parts {
        let (x, tape) = states.split_tape();
        let input = part.normalise(x.clone().put_tape(tape))?;
        let output = forward(part, &batch.positions, input, InputGradient::Wanted)?;
        states = part.residual(x, output)?;
    }
    gradient(seeded(states, after.clone())?, before)
}
