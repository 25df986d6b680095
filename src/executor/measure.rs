//! What the calibration samples tell of one part's weights.

use std::sync::Arc;

use barber_metric::{Dims, LayerStats, Needs};
use dfdx::{
    tensor::{HasErr, OwnedTape, PutTape, SplitTape, Tape},
    tensor_ops::Backward,
};
use rayon::prelude::*;

use super::{
    Hidden, PartWeights, forward,
    inputs::InputSums,
    ops::{InputGradient, Matrix, Ops},
};

/// The statistics of one weight matrix; those that were not asked for are `None`.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Mean over samples of the squared gradient, [rows, columns].
    pub squared_gradient: Option<Vec<f32>>,
    /// Mean over samples of Σ x² over a sample's tokens, `[columns]`.
    pub input_square: Option<Arc<Vec<f32>>>,
    /// Mean over samples of Σ x xᵀ over a sample's tokens, [columns, columns], symmetric.
    pub gram: Option<Arc<Vec<f32>>>,
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

/// What [`measure`] finds.
#[derive(Debug)]
pub struct Measured<D: Ops> {
    /// Mean over samples of the squared error between the dense and the sparse outputs.
    pub loss: f64,
    /// One per linear layer of each part.
    pub statistics: Vec<Vec<Statistics>>,
    /// The dense outputs, one per sample.
    pub outputs: Vec<Matrix<D>>,
}

/// [`Seen`](super::Seen), with the index of the part.
type SeenIn<'a, D, T> =
    dyn FnMut(usize, &[usize], &Matrix<D, T>) -> Result<(), <D as HasErr>::Err> + 'a;

/// The output of a run of parts: one part's own, without the residual; or the hidden states after
/// several. `input` is the first part's normalised input. `seen` gets the index of a part too.
fn run<D: Ops, T: Tape<f32, D> + 'static>(
    parts: &[PartWeights<D>],
    sample: &Hidden<D>,
    input: Matrix<D, T>,
    seen: &mut SeenIn<'_, D, T>,
) -> Result<Matrix<D, T>, D::Err> {
    let positions = &sample.positions;
    let output = forward(&parts[0], positions, input, InputGradient::Skipped, &mut |layers, x| {
        seen(0, layers, x)
    })?;
    if parts.len() == 1 {
        return Ok(output);
    }
    let mut states = parts[0].residual(sample.states.clone(), output)?;
    for (i, part) in parts.iter().enumerate().skip(1) {
        let (x, tape) = states.split_tape();
        let input = part.normalise(x.clone().put_tape(tape))?;
        let output = forward(part, positions, input, InputGradient::Wanted, &mut |layers, x| {
            seen(i, layers, x)
        })?;
        states = part.residual(x, output)?;
    }
    Ok(states)
}

/// Runs `dense` and `sparse`, the same run of parts, on each sample's hidden states, and gathers
/// what is needed of the layers in `members`, a list for each part. The gradients are those of a
/// sample's mean squared error with respect to the dense weights; they are squared sample by sample,
/// then averaged (LLM-Barber, arXiv 2408.10631).
///
/// # Errors
/// If the device has not enough memory.
pub fn measure<D: Ops>(
    dense: &[PartWeights<D>],
    sparse: &[PartWeights<D>],
    samples: &[Hidden<D>],
    members: &[Vec<usize>],
    needs: Needs,
) -> Result<Measured<D>, D::Err> {
    let mut traced = dense.to_vec();
    if needs.squared_gradient {
        for (part, members) in traced.iter_mut().zip(members) {
            for &i in members {
                part.linears[i] = part.linears[i].traced()?;
            }
        }
    }
    let none = |part: &PartWeights<D>| vec![Vec::new(); part.linears.len()];
    let mut squares: Vec<Vec<Vec<f32>>> = dense.iter().map(none).collect();
    let mut inputs: Vec<_> = dense.iter().map(|_| InputSums::new(needs)).collect();
    let (mut losses, mut outputs) = (0.0, Vec::with_capacity(samples.len()));
    let mut seen = |part: usize, layers: &[usize], x: &Matrix<D, OwnedTape<f32, D>>| {
        inputs[part].add(layers, &members[part], x)
    };
    for sample in samples {
        let input = dense[0].normalise(sample.states.clone())?;
        let target = run(sparse, sample, input.clone(), &mut |_, _, _| Ok(()))?;
        let input = input.put_tape(OwnedTape::default());
        let output = run(&traced, sample, input, &mut seen)?;
        let (output, tape) = output.split_tape();
        outputs.push(output.clone());
        let loss = D::squared_error(output.put_tape(tape), &target)?;
        losses += f64::from(scalar(&loss));
        if needs.squared_gradient {
            let mut gradients = loss.try_backward()?;
            for (part, members) in members.iter().enumerate() {
                for &i in members {
                    let weight = &traced[part].linears[i];
                    if let Some(gradient) = D::take_gradient(&mut gradients, weight)? {
                        add_squares(&mut squares[part][i], &gradient);
                    }
                }
            }
        }
    }
    let mut statistics = Vec::with_capacity(dense.len());
    for (squares, inputs) in squares.into_iter().zip(inputs) {
        let squares = squares.into_iter().map(|squares| mean(squares, samples.len()));
        let mut found: Vec<_> = squares
            .map(|squared_gradient| Statistics { squared_gradient, ..Statistics::default() })
            .collect();
        inputs.finish(samples.len(), &mut found);
        statistics.push(found);
    }
    Ok(Measured { loss: losses / samples.len() as f64, statistics, outputs })
}

/// Runs a part on each sample's hidden states: what `needs` asks for of the inputs of the layers in
/// `members`, and the part's outputs.
///
/// # Errors
/// If the device has not enough memory.
#[expect(clippy::type_complexity, reason = "one per linear layer, and one per sample")]
pub fn inputs<D: Ops>(
    weights: &PartWeights<D>,
    samples: &[Hidden<D>],
    members: &[usize],
    needs: Needs,
) -> Result<(Vec<Statistics>, Vec<Matrix<D>>), D::Err> {
    let mut sums = InputSums::new(needs);
    let mut outputs = Vec::with_capacity(samples.len());
    for sample in samples {
        let input = weights.normalise(sample.states.clone())?;
        let parts = std::slice::from_ref(weights);
        outputs.push(run(parts, sample, input, &mut |_, layers, x| sums.add(layers, members, x))?);
    }
    let mut statistics = vec![Statistics::default(); weights.linears.len()];
    sums.finish(samples.len(), &mut statistics);
    Ok((statistics, outputs))
}

/// The outputs of a run of parts on each sample's hidden states: one part's own, without the
/// residual; or the hidden states after several.
///
/// # Errors
/// If the device has not enough memory.
pub fn outputs<D: Ops>(
    parts: &[PartWeights<D>],
    samples: &[Hidden<D>],
) -> Result<Vec<Matrix<D>>, D::Err> {
    let each = samples.iter().map(|sample| {
        let input = parts[0].normalise(sample.states.clone())?;
        run(parts, sample, input, &mut |_, _, _| Ok(()))
    });
    each.collect()
}

/// The mean over samples of the mean squared difference between outputs and targets.
///
/// # Errors
/// If the device has not enough memory.
pub fn loss<D: Ops>(outputs: &[Matrix<D>], targets: &[Matrix<D>]) -> Result<f64, D::Err> {
    let mut sum = 0.0;
    for (output, target) in outputs.iter().zip(targets) {
        sum += f64::from(scalar(&D::squared_error(output.clone(), target)?));
    }
    Ok(sum / outputs.len() as f64)
}

fn scalar<D: Ops, T>(tensor: &dfdx::tensor::Tensor<(), f32, D, T>) -> f32 {
    tensor.as_vec()[0]
}

/// The mean of sums over samples, if there are any sums.
fn mean(mut sums: Vec<f32>, samples: usize) -> Option<Vec<f32>> {
    sums.par_iter_mut().for_each(|sum| *sum /= samples as f32);
    (!sums.is_empty()).then_some(sums)
}

fn add_squares(sums: &mut Vec<f32>, gradient: &[f32]) {
    sums.resize(gradient.len(), 0.0);
    sums.par_iter_mut().with_min_len(1 << 14).zip(gradient).for_each(|(sum, g)| *sum += g * g);
}
