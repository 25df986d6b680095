//! Perplexity over independent segments of a text; the first token of a segment is not predicted.

use serde::{Deserialize, Serialize};

use super::{
    head::{Head, head_fraction},
    losses::{CERTAIN, Loss, MOST, difference, mean},
};
use crate::{
    checkpoint::Pruned,
    executor::or_nan,
    executor::{Pass, Stream, ops::Ops},
    family::Part,
    model::{Error, Model},
};

/// The perplexity of a model on a text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of the mean cross-entropy over all predicted tokens.
    #[serde(deserialize_with = "or_nan")]
    pub perplexity: f64,
    /// Standard error of the perplexity, from the differences between segments; `None` for a single
    /// segment.
    #[serde(default)]
    pub perplexity_stderr: Option<f64>,
    /// The mean cross-entropy, in nats per token.
    #[serde(deserialize_with = "or_nan")]
    pub cross_entropy: f64,
    /// Number of predicted tokens.
    pub predictions: usize,
    /// Number of segments.
    pub segments: usize,
    /// The losses of the segments in order; if there are many, of runs of consecutive ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<Loss>,
}

impl Perplexity {
    /// The perplexity from the losses on the segments.
    fn of(cross_entropy: f64, segments: usize, losses: Vec<Loss>) -> Self {
        let perplexity = cross_entropy.exp();
        Self {
            perplexity,
            // By the delta method: the derivative of exp is the perplexity.
            perplexity_stderr: mean(&losses).map(|[_, error]| perplexity * error),
            cross_entropy,
            predictions: losses.iter().map(|of| of.predictions).sum(),
            segments,
            losses,
        }
    }

    /// The relative difference to another perplexity on the same segments, p / q − 1, and its
    /// standard error. `None` if the segments differ, or there is only one.
    pub fn above(&self, other: &Self) -> Option<[f64; 2]> {
        let [nats, error] = difference(&self.losses, &other.losses)?;
        Some([nats.exp_m1(), nats.exp() * error])
    }

    /// Whether two perplexities differ by more than two standard errors: those of the difference if
    /// both are on the same segments. Without standard errors, whether they differ at all.
    pub fn differs(&self, other: &Self) -> bool {
        if let Some([nats, error]) = difference(&self.losses, &other.losses) {
            return nats.abs() > CERTAIN * error;
        }
        let error = |of: &Self| of.perplexity_stderr.unwrap_or(0.0);
        let apart = (self.perplexity - other.perplexity).abs();
        apart > CERTAIN * error(self).hypot(error(other))
    }
}

/// Maximum count of numbers in the hidden states held at a time: 256 MiB. More segments run in
/// several passes over the layers.
pub const STATES: usize = 1 << 26;

/// The perplexity of the pruned model on segments of at least two tokens. Calls `done_so_far` with
/// the finished fraction of the work, after each decoder layer and each segment's logits.
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
    let head_fraction = head_fraction(&model.decoder);
    let (mut sum, mut predictions, mut done) = (0.0, 0, 0);
    let mut losses = vec![Loss::default(); segments.len().min(MOST)];
    for batch in segments.chunks(batch) {
        let all = segments.len() as f64;
        let mut so_far =
            |of_batch: f64| done_so_far((done as f64 + of_batch * batch.len() as f64) / all);
        let stream = model.embed(batch, 0)?;
        let states =
            hidden(model, pruned, stream, |layers| so_far((1.0 - head_fraction) * layers))?;
        let head = Head::new(model)?;
        let of_tiles = model.executor.of_samples(&states, |i, states| {
            let (targets, mut of_tiles) = (&batch[i][1..], Vec::new());
            let tokens: Vec<usize> = (0..targets.len()).collect();
            head.tiles(states, &tokens, |rows, logits| {
                let targets = &targets[rows[0]..rows[0] + rows.len()];
                of_tiles.push(f64::from(D::cross_entropy(logits, targets)?.as_vec()[0]));
                Ok(())
            })?;
            so_far(1.0 - head_fraction + head_fraction * (i + 1) as f64 / batch.len() as f64);
            Ok::<_, Error>(of_tiles)
        })?;
        for (i, of_tiles) in of_tiles.into_iter().enumerate() {
            let own = (done + i) * losses.len() / segments.len();
            let (own, targets) = (&mut losses[own], batch[i].len() - 1);
            own.predictions += targets;
            predictions += targets;
            for loss in of_tiles {
                sum += loss;
                own.nats += loss;
            }
        }
        done += batch.len();
    }
    Ok(Perplexity::of(sum / predictions as f64, segments.len(), losses))
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
    let head = Head::new(model)?;
    let all = model.executor.of_samples(&states, |_, states| {
        let mut all = Vec::new();
        head.tiles(states, &tokens, |_, logits| {
            all.extend(logits.on_host()?.into_iter().map(f64::from));
            Ok(())
        })?;
        Ok::<_, Error>(all)
    })?;
    Ok(all.into_iter().flatten().map(|logit| logit as f32).collect())
}

/// The hidden states after the last layer, from those before the first layer.
pub(crate) fn hidden<D: Ops>(
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
                .run(Pass::advancing(std::slice::from_ref(&weights), &mut stream))
                .map_err(Error::executor(format!("layer {layer}, {part:?}")))?;
        }
        layer_done((layer + 1) as f64 / layers as f64);
    }
    Ok(stream)
}
