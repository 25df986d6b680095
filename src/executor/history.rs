//! The next tokens of sequences whose keys and values so far are kept: a text is written a token at a
//! time, without running all of it again.

use rayon::prelude::*;

use super::{
    Error, Executor, PartWeights, Stream,
    forward::{Hooks, forward_with},
    ops::{Heads, InputGradient, Matrix, Ops},
};
use crate::family::{Decoder, Inner};

/// The keys and values of a sequence's tokens so far in the attention of one layer, on the host.
#[derive(Clone, Debug)]
pub struct History {
    /// Number of tokens that the sequence will have at most.
    most: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl History {
    /// The history of a sequence that will have so many tokens at most: memory is taken for all of them
    /// when the first ones come.
    pub fn new(most: usize) -> Self {
        Self { most, keys: Vec::new(), values: Vec::new() }
    }

    /// Bytes of the keys and values of a sequence of `tokens` in all layers.
    pub fn bytes(decoder: &Decoder, tokens: usize) -> usize {
        let attention = decoder.layers.iter().filter_map(|layer| match &layer.attention.inner {
            Inner::Attention(attention) => Some(attention),
            _ => None,
        });
        let widths = attention.map(|of| of.kv_heads * (of.head_dim + of.value_dim));
        tokens * widths.sum::<usize>() * size_of::<f32>()
    }
}

/// The output of attention for the next tokens of sequences, `heads.sequence_length` of each, which
/// join its history; `None` if the histories were empty: then these tokens see only each other.
pub(super) fn attend<D: Ops, T>(
    histories: &mut [History],
    [q, k, v]: [&Matrix<D, T>; 3],
    heads: Heads,
    sinks: Option<&[f32]>,
) -> Result<Option<Matrix<D>>, D::Err> {
    let shape = (q.shape().0, heads.queries * heads.values);
    let (device, [q, k, v]) = (q.device(), [q.on_host()?, k.on_host()?, v.on_host()?]);
    let of = |all: &[f32]| all.len() / histories.len().max(1);
    let (new, of_q, of_k, of_v) = (heads.sequence_length, of(&q), of(&k), of(&v));
    if histories.iter().all(|history| history.keys.is_empty()) {
        for ((history, k), v) in histories.iter_mut().zip(k.chunks(of_k)).zip(v.chunks(of_v)) {
            history.keys.reserve_exact(history.most * of_k / new);
            history.values.reserve_exact(history.most * of_v / new);
            history.keys.extend(k);
            history.values.extend(v);
        }
        return Ok(None);
    }
    let each = histories.par_iter_mut().zip(q.par_chunks(of_q));
    let each = each.zip(k.par_chunks(of_k)).zip(v.par_chunks(of_v));
    let outputs = each.flat_map_iter(|(((History { keys, values, .. }, q), k), v)| {
        let tokens = q.chunks(of_q / new).zip(k.chunks(of_k / new)).zip(v.chunks(of_v / new));
        tokens.flat_map(|((q, k), v)| {
            keys.extend(k);
            values.extend(v);
            heads.of_last(q, keys, values, sinks)
        })
    });
    device.hold(outputs.collect(), shape).map(Some)
}

impl<D: Ops> Executor<D> {
    /// Advances a stream through a part of a decoder layer. The tokens of a sample follow those of its
    /// history in that layer, which they join; a new sequence has an empty history.
    ///
    /// # Errors
    /// If the device runs out of memory, the scratch space fails, or an activation is not finite.
    pub fn go_on(
        &self,
        part: &PartWeights<D>,
        stream: &mut Stream<D>,
        histories: &mut [History],
    ) -> Result<(), Error> {
        let parts = std::slice::from_ref(part);
        for run in stream.chunks.own() {
            let batch = self.batch(stream, run)?;
            let histories = &mut histories[stream.runs[run].samples.clone()];
            let mut hooks = Hooks { histories: Some(histories), ..Hooks::default() };
            let states = part
                .normalise(batch.states.clone())
                .and_then(|x| {
                    forward_with(part, &batch.positions, x, InputGradient::Skipped, &mut hooks)
                })
                .and_then(|output| part.residual(batch.states.clone(), output))
                .map_err(Error::device)?;
            batch.check_states(parts, &states)?;
            stream.states.put(run, states)?;
        }
        Ok(())
    }
}
