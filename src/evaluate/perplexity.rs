//! Perplexity over segments of a text, each on its own; a segment's first token is not predicted.

use serde::{Deserialize, Serialize};

use super::head::{Head, share};

use crate::{
    checkpoint::Pruned,
    executor::{Stream, ops::Ops},
    family::Part,
    model::{Error, Model},
    number::or_nan,
};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of the mean cross-entropy over all predicted tokens.
    #[serde(deserialize_with = "or_nan")]
    pub perplexity: f64,
    /// The mean cross-entropy, in nats per token.
    #[serde(deserialize_with = "or_nan")]
    pub cross_entropy: f64,
    /// How many tokens were predicted.
    pub predictions: usize,
    /// How many segments they are from.
    pub segments: usize,
}

/// Hidden states, in numbers, that are held at a time: 256 MiB. More segments run in several
/// passes over the layers.
pub const STATES: usize = 1 << 26;

/// The perplexity of the model, as pruning left it, on segments of at least two tokens. Calls
/// `done_so_far` with the share of the work that is done, after each decoder layer and the logits of
/// each segment.
///
/// # Errors
/// If the model cannot be run.
pub fn perplexity<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    segments: &[Vec<u32>],
    mut done_so_far: impl FnMut(f64),
) -> Result<Perplexity, Error> {
    let longest = segments.iter().map(Vec::len).max().unwrap_or(1);
    let batch = (STATES / (longest * model.decoder.hidden_size)).max(1);
    let head_share = share(&model.decoder);
    let (mut sum, mut predictions, mut done) = (0.0, 0, 0);
    for batch in segments.chunks(batch) {
        let all = segments.len() as f64;
        let mut so_far =
            |of_batch: f64| done_so_far((done as f64 + of_batch * batch.len() as f64) / all);
        let stream = model.embed(batch, 0)?;
        let states = hidden(model, pruned, stream, |layers| so_far((1.0 - head_share) * layers))?;
        let head = Head::new(model)?;
        model.executor.each_sample(&states, |i, states| {
            let targets = &batch[i][1..];
            let tokens: Vec<usize> = (0..targets.len()).collect();
            predictions += targets.len();
            head.tiles(states, &tokens, |rows, logits| {
                let targets = &targets[rows[0]..rows[0] + rows.len()];
                let loss = D::cross_entropy(logits, targets)?;
                sum += f64::from(loss.as_vec()[0]);
                Ok(())
            })?;
            so_far(1.0 - head_share + head_share * (i + 1) as f64 / batch.len() as f64);
            Ok::<_, Error>(())
        })?;
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
    let states = hidden(model, pruned, model.embed(&[ids.to_vec()], 0)?, |_| ())?;
    let tokens: Vec<usize> = (0..ids.len()).collect();
    let mut all = Vec::new();
    let head = Head::new(model)?;
    model.executor.each_sample(&states, |_, states| {
        head.tiles(states, &tokens, |_, logits| {
            all.extend(logits.on_host()?);
            Ok(())
        })
    })?;
    Ok(all)
}

/// The hidden states after the last layer, from those before the first.
pub(super) fn hidden<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    mut stream: Stream<D>,
    mut layer_done: impl FnMut(f64),
) -> Result<Stream<D>, Error> {
    let layers = model.decoder.layers.len();
    for layer in 0..layers {
        for part in Part::ALL {
            let weights = model.part(layer, part, pruned)?;
            model
                .executor
                .advance(&weights, &mut stream)
                .map_err(Error::executor(format!("layer {layer}, {part:?}")))?;
        }
        layer_done((layer + 1) as f64 / layers as f64);
    }
    Ok(stream)
}
