//! The loss of the dense model's predictions, and statistics of its gradients, by a backward pass that
//! goes layer by layer from the end.
//!
//! A sample's loss is the mean cross-entropy of its next tokens. This is the loss by which
//! LLM-Pruner (arXiv 2305.11627, section 3.2) weighs structures: where nothing is pruned yet, there is
//! no output error to differentiate.

use std::iter::zip;

use barber_metric::Needs;

use super::{
    Error, failed,
    objective::{boundaries, parts},
};
use crate::{
    checkpoint::Pruned,
    evaluate::Head,
    executor::{Pass, Probe, Statistics, StructureStatistics, ops::Ops},
    model::{self, Model},
};

/// The statistics of a layer.
pub(super) struct Found {
    /// Those of the linear layers of each part.
    pub(super) statistics: Vec<Vec<Statistics>>,
    /// Those of structures.
    pub(super) structures: StructureStatistics,
}

/// Shows `see` the statistics of the linear layers of `members`, the indices in each part of each
/// layer, from the last decoder layer to the first. All are of the dense model; squared gradients are
/// means over samples of the squares of the gradient of a sample's loss.
pub(super) fn statistics<D: Ops>(
    model: &Model<'_, D>,
    samples: &[Vec<u32>],
    members: &[Vec<Vec<usize>>],
    needs: Needs,
    see: &mut dyn FnMut(usize, Found) -> Result<(), Error>,
) -> Result<(), Error> {
    let (executor, dense) = (&model.executor, Pruned::dense());
    let (mut boundaries, last) = boundaries(model, &dense, samples, &executor.storage)?;
    let head = Head::new(model)?;
    let of_sample = |i: usize, states: &[f32]| head.next_tokens_gradient(states, &samples[i]);
    let mut gradients = executor.stored::<model::Error>(&last, of_sample)?;
    drop((head, last));
    let of_inputs = Needs { squared_gradient: false, ..needs };
    for (layer, members) in members.iter().enumerate().rev() {
        let Some(before) = boundaries.pop() else { break };
        let parts = parts(model, layer, &dense)?;
        let failed = || failed(layer, "backward pass");
        let probe = Probe::new(members, Needs::SQUARED_GRADIENT);
        let found = executor.backward_statistics(&parts, probe, &before, &mut gradients);
        let mut found = found.map_err(failed())?;
        if of_inputs.inputs() {
            let probe = Some(Probe::new(members, of_inputs));
            let inputs = executor.run(Pass { probe, ..Pass::new(&parts, &before) });
            let inputs = inputs.map_err(failed())?.statistics;
            for (found, inputs) in zip(found.iter_mut().flatten(), inputs.into_iter().flatten()) {
                let squared_gradient = found.squared_gradient.take();
                *found = Statistics { squared_gradient, ..inputs };
            }
        }
        let mut structures = StructureStatistics::default();
        if of_inputs.structures() {
            let found = executor.structure_statistics(&parts, &before, of_inputs);
            structures = found.map_err(failed())?;
        }
        see(layer, Found { statistics: found, structures })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{
        checkpoint::Reader, dtype::Dtype, evaluate::hidden, executor::ops::CrossEntropy,
        family::Part,
    };

    /// The mean over predictions of the cross-entropy of a sample's next tokens.
    fn loss(model: &Model<'_, Cpu>, pruned: &Pruned, sample: &[u32]) -> f64 {
        let stream = model.embed(&[sample.to_vec()], 0).unwrap();
        let stream = hidden(model, pruned, stream, |_| ()).unwrap();
        let states = model.executor.sample(&stream, 0).unwrap();
        let head = Head::new(model).unwrap();
        let predictions = sample.len() - 1;
        let states = &states[..predictions * model.decoder.hidden_size];
        let sum = head.loss(states, None, |rows, logits| {
            let next: Vec<u32> = rows.iter().map(|row| sample[row + 1]).collect();
            Cpu::cross_entropy(logits, &next)
        });
        sum.unwrap() / predictions as f64
    }

    #[test]
    fn squared_gradients_are_those_of_finite_differences() {
        for path in ["tests/conformance/tiny-llama", "tests/conformance/tiny-opt"] {
            let reader = Reader::open(Path::new(path)).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            let ids: Vec<Vec<u32>> =
                [3, 7].map(|by: u32| (0..12).map(|i| (i * by + 1) % 250).collect()).into();
            let layers = &model.decoder.layers;
            let of = |layer: usize, part| 0..layers[layer].projections(part).len();
            let members: Vec<Vec<Vec<usize>>> = (0..layers.len())
                .map(|layer| Part::ALL.map(|part| of(layer, part).collect()).into())
                .collect();
            let needs = Needs::SQUARED_GRADIENT.or(Needs::INPUT_SQUARE);
            let mut seen = 0;
            statistics(&model, &ids, &members, needs, &mut |layer, found| {
                for (part, found) in zip(Part::ALL, found.statistics) {
                    for (linear, found) in zip(layers[layer].projections(part), found) {
                        let inputs = found.input_square.unwrap();
                        assert_eq!(inputs.len(), linear.dims.columns);
                        assert!(inputs.iter().any(|square| *square > 0.0));
                        let squares = found.squared_gradient.unwrap();
                        let largest = |(i, _): &(usize, &f32), (j, _): &(usize, &f32)| {
                            squares[*i].total_cmp(&squares[*j])
                        };
                        let (i, square) = squares.iter().enumerate().max_by(largest).unwrap();
                        let dense = model.values(linear).unwrap();
                        let shifted = |h: f32, sample: &[u32]| {
                            let (mut values, mut pruned) = (dense.clone(), Pruned::dense());
                            values[i] += h;
                            let (dtype, dir) = (Some(Dtype::F32), std::env::temp_dir());
                            pruned.change(&reader, &linear.weight, &values, dtype, &dir).unwrap();
                            loss(&model, &pruned, sample)
                        };
                        // Farther away, OPT's inner states would change their signs.
                        let h = 1e-3;
                        let slope = |sample: &Vec<u32>| {
                            (shifted(h, sample) - shifted(-h, sample)) / f64::from(2.0 * h)
                        };
                        let expected = ids.iter().map(|of| slope(of).powi(2)).sum::<f64>() / 2.0;
                        let error = (f64::from(*square).sqrt() - expected.sqrt()).abs();
                        let name = &linear.weight;
                        assert!(
                            error < 1e-3 + 0.02 * expected.sqrt(),
                            "{name}: {square} {expected}"
                        );
                        seen += 1;
                    }
                }
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, model.decoder.projections().count());
        }
    }
}
