//! What the calibration samples tell of one part's weights.

use std::sync::Arc;

use barber_metric::{Dims, LayerStats, Needs};
use dfdx::{
    tensor::{OwnedTape, PutTape, SplitTape},
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
    /// Mean over samples of the squared error between the dense and the sparse part's outputs.
    pub loss: f64,
    /// One per linear layer.
    pub statistics: Vec<Statistics>,
    /// The dense part's outputs, one per sample.
    pub outputs: Vec<Matrix<D>>,
}

/// Runs `dense` and `sparse`, the same part, on each sample's hidden states, and gathers what is
/// needed of the layers in `members`. The gradients are those of a sample's mean squared error
/// with respect to the dense weights; they are squared sample by sample, then averaged
/// (LLM-Barber, arXiv 2408.10631).
///
/// # Errors
/// If the device has not enough memory.
pub fn measure<D: Ops>(
    dense: &PartWeights<D>,
    sparse: &PartWeights<D>,
    samples: &[Hidden<D>],
    members: &[usize],
    needs: Needs,
) -> Result<Measured<D>, D::Err> {
    let mut traced = dense.clone();
    if needs.squared_gradient {
        for &i in members {
            traced.linears[i] = traced.linears[i].traced()?;
        }
    }
    let mut squares = vec![Vec::new(); dense.linears.len()];
    let mut inputs = InputSums::new(needs);
    let (mut losses, mut outputs) = (0.0, Vec::with_capacity(samples.len()));
    let mut seen =
        |layers: &[usize], x: &Matrix<D, OwnedTape<f32, D>>| inputs.add(layers, members, x);
    for sample in samples {
        let input = dense.normalise(sample.states.clone())?;
        let target = forward(
            sparse,
            &sample.positions,
            input.clone(),
            InputGradient::Skipped,
            &mut |_, _| Ok(()),
        )?;
        let input = input.put_tape(OwnedTape::default());
        let output = forward(&traced, &sample.positions, input, InputGradient::Skipped, &mut seen)?;
        let (output, tape) = output.split_tape();
        outputs.push(output.clone());
        let loss = D::squared_error(output.put_tape(tape), &target)?;
        losses += f64::from(scalar(&loss));
        if needs.squared_gradient {
            let mut gradients = loss.try_backward()?;
            for &i in members {
                if let Some(gradient) = D::take_gradient(&mut gradients, &traced.linears[i])? {
                    add_squares(&mut squares[i], &gradient);
                }
            }
        }
    }
    let mut statistics = vec![Statistics::default(); dense.linears.len()];
    for (squares, statistics) in squares.into_iter().zip(&mut statistics) {
        statistics.squared_gradient = mean(squares, samples.len());
    }
    inputs.finish(samples.len(), &mut statistics);
    Ok(Measured { loss: losses / samples.len() as f64, statistics, outputs })
}

/// Runs a part on each sample's hidden states: what `needs` asks for of the inputs of the layers in
/// `members`, and the part's outputs.
///
/// # Errors
/// If the device has not enough memory.
pub fn inputs<D: Ops>(
    weights: &PartWeights<D>,
    samples: &[Hidden<D>],
    members: &[usize],
    needs: Needs,
) -> Result<(Vec<Statistics>, Vec<Matrix<D>>), D::Err> {
    let mut sums = InputSums::new(needs);
    let mut outputs = Vec::with_capacity(samples.len());
    for sample in samples {
        outputs.push(forward(
            weights,
            &sample.positions,
            weights.normalise(sample.states.clone())?,
            InputGradient::Skipped,
            &mut |layers, x| sums.add(layers, members, x),
        )?);
    }
    let mut statistics = vec![Statistics::default(); weights.linears.len()];
    sums.finish(samples.len(), &mut statistics);
    Ok((statistics, outputs))
}

/// A part's outputs on each sample's hidden states.
///
/// # Errors
/// If the device has not enough memory.
pub fn outputs<D: Ops>(
    weights: &PartWeights<D>,
    samples: &[Hidden<D>],
) -> Result<Vec<Matrix<D>>, D::Err> {
    samples
        .iter()
        .map(|Hidden { states, positions }| {
            let input = weights.normalise(states.clone())?;
            forward(weights, positions, input, InputGradient::Skipped, &mut |_, _| Ok(()))
        })
        .collect()
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
