//! Perplexity over segments of a text, each on its own; a segment's first token is not predicted.

use std::ops::Range;

use dfdx::{shapes::HasShape, tensor_ops::TryMul};
use serde::Serialize;

use crate::{
    checkpoint::Pruned,
    executor::{
        self, Hidden,
        ops::{InputGradient, Matrix, Norm, Ops, Weight},
    },
    family::{Decoder, Part},
    model::{Error, Model},
};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// exp of the mean cross-entropy over all predicted tokens.
    pub perplexity: f64,
    /// The mean cross-entropy, in nats per token.
    pub cross_entropy: f64,
    /// How many tokens were predicted.
    pub predictions: usize,
    /// How many segments they are from.
    pub segments: usize,
}

/// Hidden states, in numbers, that are held at a time: 256 MiB. More segments run in several
/// passes over the layers.
const STATES: usize = 1 << 26;
/// Logits, in numbers, that are held at a time: 32 MiB.
const LOGITS: usize = 1 << 23;

/// The perplexity of the model, as pruning left it, on segments of at least two tokens. Calls
/// `layer_done` with the share that is done after each decoder layer.
///
/// # Errors
/// If the model cannot be run.
pub fn perplexity<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    segments: &[Vec<u32>],
    mut layer_done: impl FnMut(f64),
) -> Result<Perplexity, Error> {
    let longest = segments.iter().map(Vec::len).max().unwrap_or(1);
    let batch = (STATES / (longest * model.decoder.hidden_size)).max(1);
    let (mut sum, mut predictions, mut done) = (0.0, 0, 0);
    for batch in segments.chunks(batch) {
        let share = batch.len() as f64 / segments.len() as f64;
        let start = done as f64 / segments.len() as f64;
        let states = hidden(model, pruned, batch, |layers| layer_done(start + share * layers))?;
        let head = Head::new(model)?;
        for (segment, states) in batch.iter().zip(states) {
            let targets = &segment[1..];
            head.tiles(&states.states, 0..targets.len(), |rows, logits| {
                let loss = D::cross_entropy(logits, &targets[rows])?;
                sum += f64::from(loss.as_vec()[0]);
                Ok(())
            })?;
            predictions += targets.len();
        }
        done += batch.len();
    }
    let cross_entropy = sum / predictions as f64;
    Ok(Perplexity {
        perplexity: cross_entropy.exp(),
        cross_entropy,
        predictions,
        segments: segments.len(),
    })
}

/// The logits of one sequence, [tokens, vocabulary], row-major.
///
/// # Errors
/// If the model cannot be run.
pub fn logits<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    ids: &[u32],
) -> Result<Vec<f32>, Error> {
    let states = hidden(model, pruned, &[ids.to_vec()], |_| ())?;
    let mut all = Vec::new();
    Head::new(model)?.tiles(&states[0].states, 0..ids.len(), |_, logits| {
        all.extend(logits.as_vec());
        Ok(())
    })?;
    Ok(all)
}

/// The hidden states after the last layer.
fn hidden<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    segments: &[Vec<u32>],
    mut layer_done: impl FnMut(f64),
) -> Result<Vec<Hidden<D>>, Error> {
    let mut stream = model.embed(segments)?;
    let layers = model.decoder.layers.len();
    for layer in 0..layers {
        for part in Part::ALL {
            let weights = model.pruned(layer, &model.part(layer, part)?, pruned)?;
            let outputs = executor::outputs(&weights, &stream);
            outputs
                .and_then(|outputs| weights.add(&mut stream, outputs))
                .map_err(Error::device(format!("layer {layer}, {part:?}")))?;
        }
        layer_done((layer + 1) as f64 / layers as f64);
    }
    Ok(stream)
}

/// The last norm and the output head.
struct Head<'a, D: Ops> {
    model: &'a Model<'a, D>,
    norm: Option<Norm<D>>,
    project: Option<Weight<D>>,
    weight: Weight<D>,
}

impl<'a, D: Ops> Head<'a, D> {
    fn new(model: &'a Model<'a, D>) -> Result<Self, Error> {
        let decoder = &model.decoder;
        let dims = (decoder.vocab_size, decoder.embedding.width);
        let values = model.reader.read(&decoder.head, &[dims.0, dims.1])?;
        let weight = Weight::frozen(&model.device, values, dims, None);
        let project = decoder.project_out.as_ref();
        Ok(Self {
            model,
            norm: decoder.final_norm.as_ref().map(|norm| model.norm(norm)).transpose()?,
            project: project.map(|linear| model.linear(linear)).transpose()?,
            weight: weight.map_err(Error::device(&decoder.head))?,
        })
    }

    /// Shows `see` the logits of some tokens, a few rows at a time: those of a whole segment
    /// would be hundreds of megabytes.
    fn tiles(
        &self,
        states: &Matrix<D>,
        tokens: Range<usize>,
        mut see: impl FnMut(Range<usize>, Matrix<D>) -> Result<(), D::Err>,
    ) -> Result<(), Error> {
        let Decoder { hidden_size: width, vocab_size, logit_cap, .. } = self.model.decoder;
        let mut run = || {
            let mut values = vec![0.0; states.shape().0 * width];
            D::copy_into(states, &mut values);
            let step = (LOGITS / vocab_size).max(1);
            for start in tokens.clone().step_by(step) {
                let rows = start..tokens.end.min(start + step);
                let tile = values[rows.start * width..rows.end * width].to_vec();
                let mut x = self.model.device.try_tensor_from_vec(tile, (rows.len(), width))?;
                if let Some(norm) = &self.norm {
                    x = D::normalise(x, norm)?;
                }
                if let Some(project) = &self.project {
                    x = D::linear(x, project, InputGradient::Skipped)?;
                }
                let mut logits = D::linear(x, &self.weight, InputGradient::Skipped)?;
                if let Some(cap) = logit_cap {
                    logits = logits.try_mul(cap.recip())?.try_tanh()?.try_mul(cap)?;
                }
                see(rows, logits)?;
            }
            Ok(())
        };
        run().map_err(|e: D::Err| Error::device("output head")(e))
    }
}
