//! What a run will take: matrix products and memory, counted from the shapes before it starts.

use std::collections::BTreeMap;

use barber_metric::Needs;

use crate::{
    executor::{self, BATCH},
    family::{Decoder, Layer, Linear, Part},
    plan::{Group, Plan},
};

/// What decides how much a run takes.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Calibration samples.
    pub samples: usize,
    /// Tokens of each.
    pub sequence_length: usize,
    /// What the initialiser needs.
    pub start: Needs,
    /// Whether masks are refined, and then whether in one pass with the initial ones.
    pub refined: Option<bool>,
    /// What the metrics of rebuilds need, if there are any.
    pub rebuild: Option<Needs>,
    /// Whether a stage works on the Gram matrices of inputs: swaps, or a reconstruction.
    pub swaps: bool,
    /// Whether the dense model's hidden states are there too.
    pub dense: bool,
    /// Bytes of a number of a hidden state that waits.
    pub stream_size: usize,
    /// Tokens of all evaluations of one model, and how many models are evaluated.
    pub evaluated: (usize, usize),
    /// Tokens of an evaluation that are held at a time.
    pub evaluated_at_once: usize,
}

/// What a run takes, about.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Floating-point operations of the matrix products in calibration and rebuild.
    pub pruning: f64,
    /// Those of them that a pass for the initial masks alone takes.
    pub initial: f64,
    /// And in evaluation.
    pub evaluation: f64,
    /// Bytes of memory that it cannot do without, at the peak, beside the checkpoint's pages that
    /// the system caches.
    pub memory: f64,
    /// Bytes of what waits between layers, in memory or in a scratch file.
    pub waiting: f64,
}

/// Bytes of a number.
const SIZE: f64 = 4.0;
/// The program itself, and what is small.
const BASE: f64 = 64e6;
/// Logits that are held at a time, in bytes.
const LOGITS: f64 = 64e6;
/// Buffers that wait to be used again, in bytes at most.
const BUFFERS: f64 = crate::buffer::MOST as f64;
/// What a sparse part's first layers gave, in bytes at most.
const NOTED: f64 = executor::NOTED as f64;

/// Counts a run.
pub fn estimate(decoder: &Decoder, plan: &Plan, run: &Run) -> Estimate {
    let tokens = (run.samples * run.sequence_length) as f64;
    let weights =
        |linears: &[Linear]| linears.iter().map(|linear| linear.dims.len() as f64).sum::<f64>();
    let width = decoder.hidden_size as f64;
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let all: f64 = decoder.linears().map(|linear| linear.dims.len() as f64).sum();

    let (mut pruning, mut initial, mut peak) = (0.0, 0.0, 0.0_f64);
    let stream = tokens * width * run.stream_size as f64;
    let mut waiting = if run.start.inputs() { stream } else { 0.0 };
    // Tokens that go through a layer together.
    let together = tokens.min(run.sequence_length.max(BATCH) as f64);
    for (layer, groups) in decoder.layers.iter().zip(&plan.layers) {
        let before = pruning;
        let parts = Part::ALL.map(|part| layer.linears(part));
        let whole: f64 = parts.iter().map(|linears| weights(linears)).sum();
        let activations = parts.iter().map(|linears| numbers(linears, width)).fold(0.0, f64::max);
        let widest = parts.iter().flat_map(|linears| linears.iter());
        let widest = widest.map(|linear| linear.dims.len() as f64).fold(0.0, f64::max);
        let single = run.refined == Some(true)
            && run.start.inputs()
            && groups.iter().all(|group| group.parts.len() == 1);
        if run.start.inputs() {
            let last: f64 = layer.linears(Part::ALL[1]).last().map_or(0, |l| l.dims.len()) as f64;
            // Dense for the statistics, sparse for the next layer's. In a single pass the rebuild
            // has need of both.
            pruning += if single { 0.0 } else { 2.0 * tokens * (2.0 * whole - last) };
            let mut held = whole + widest + together * activations;
            if run.start.gram {
                let inputs = inputs(groups, layer);
                let squares: f64 = inputs.values().map(|columns| columns * columns).sum();
                pruning += tokens * squares;
                for member in groups.iter().flat_map(|group| &group.members) {
                    let dims = member.of(layer).dims;
                    let columns = dims.columns as f64;
                    // The factor, then what each block passes on to the columns after it.
                    pruning += columns.powi(3) + dims.rows as f64 * columns * columns;
                }
                // The widest is factorised in two matrices of 64-bit numbers, when the dense
                // weights are gone.
                let square = inputs.values().copied().fold(0.0, f64::max).powi(2);
                held = squares + held.max(5.0 * square + 3.0 * widest);
            }
            peak = peak.max(held * SIZE + BUFFERS.min(together * activations * SIZE));
        }
        if run.refined != Some(true) {
            initial += pruning - before;
        }
        if run.refined.is_none() {
            continue;
        }
        let streams = if run.dense { 2.0 } else { 1.0 };
        if run.swaps || run.dense {
            // The dense layer on each stream, and the sparse one before and after.
            pruning += tokens * 2.0 * whole * (streams + 2.0);
            let widest = parts.iter().map(|linears| weights(linears)).fold(0.0, f64::max);
            let mut held = widest + together * activations * streams;
            if run.swaps {
                let squares = |part: Part| -> f64 {
                    let inputs = inputs(groups, layer);
                    let of = inputs.iter().filter(|((own, _), _)| *own == part);
                    of.map(|(_, columns)| columns * columns).sum()
                };
                // How a dense stream's inputs differ is not symmetric.
                let each = if run.dense { 3.0 } else { 1.0 };
                pruning += Part::ALL.map(squares).iter().sum::<f64>() * tokens * each;
                for member in groups.iter().flat_map(|group| &group.members) {
                    let dims = member.of(layer).dims;
                    let product = 2.0 * dims.rows as f64 * (dims.columns as f64).powi(2);
                    // The slopes before and after, and the shift of the target.
                    pruning += product * (1.0 + streams);
                }
                held += Part::ALL.map(squares).into_iter().fold(0.0, f64::max) * streams;
            }
            peak = peak.max(held * SIZE + BUFFERS.min(together * activations * SIZE));
        }
        waiting = waiting.max(2.0 * stream * streams);
        let Some(needs) = run.rebuild else { continue };
        for group in groups {
            let linears = |part: Part| layer.linears(part);
            let (work, held) = rebuild(group, linears, needs);
            pruning += tokens * work;
            // The tape holds each number, and its gradient.
            let taped: f64 =
                group.parts.iter().map(|part| 2.0 * numbers(linears(*part), width)).sum();
            let held = (held + widest + together * taped) * SIZE;
            peak = peak.max(held + BUFFERS.min(together * taped * SIZE));
        }
        let known = parts.iter().map(|linears| outputs(linears)).fold(0.0, f64::max);
        let states = (tokens * width * SIZE) as usize;
        let known = (tokens * known * SIZE).min(executor::kept(states) as f64);
        let known = if single { known } else { 0.0 };
        let first = |linears: &&[Linear]| outputs(&linears[..linears.len() - 1]);
        let noted = parts.iter().map(first).fold(0.0, f64::max);
        let noted = NOTED.min(tokens * noted * SIZE);
        waiting = waiting.max(2.0 * stream * streams + known + noted);
    }
    let (evaluated, models) = run.evaluated;
    let evaluation = 2.0 * (evaluated * models) as f64 * (all + head);
    if evaluated > 0 {
        let states = run.evaluated_at_once.min(evaluated) as f64 * width * SIZE;
        peak = peak.max(2.0 * states + 2.0 * head * SIZE + LOGITS);
    }
    Estimate { pruning, initial, evaluation, memory: BASE + all / 8.0 + peak, waiting }
}

/// The widths of the inputs that a layer's matrices have, by part, and whether of its last one.
fn inputs(groups: &[Group], layer: &Layer) -> BTreeMap<(Part, bool), f64> {
    let members = groups.iter().flat_map(|group| &group.members);
    let inputs = members.map(|member| {
        let last = member.linear + 1 == layer.linears(member.part).len();
        ((member.part, last), member.of(layer).dims.columns as f64)
    });
    inputs.collect()
}

/// Outputs of linear layers for a token.
fn outputs(linears: &[Linear]) -> f64 {
    linears.iter().map(|linear| linear.dims.rows as f64).sum()
}

/// Numbers that a forward pass of a part makes of a token's `width` hidden states.
fn numbers(linears: &[Linear], width: f64) -> f64 {
    let inner = linears.last().map_or(0, |linear| linear.dims.columns) as f64;
    3.0 * width + outputs(linears) + inner
}

/// Operations per token, and numbers held, of the rebuild of one group.
fn rebuild<'a>(group: &Group, linears: impl Fn(Part) -> &'a [Linear], needs: Needs) -> (f64, f64) {
    let (mut forward, mut inputs, mut members) = (0.0, 0.0, 0.0);
    for (i, part) in group.parts.iter().enumerate() {
        let linears = linears(*part);
        for (j, linear) in linears.iter().enumerate() {
            let weights = linear.dims.len() as f64;
            forward += weights;
            // The first layers' input has no weights before it.
            if i > 0 || j + 1 == linears.len() {
                inputs += weights;
            }
        }
    }
    let lengths = |part: Part, linear: usize| linears(part)[linear].dims.len() as f64;
    group.members.iter().for_each(|member| members += lengths(member.part, member.linear));
    // The target, the dense output, and the output with the new mask.
    let mut work = 3.0 * 2.0 * forward;
    // One set of weights, and later the scores in its place.
    let mut held = forward.max(members);
    if needs.squared_gradient {
        work += 2.0 * (inputs + members);
        // The sums of squares, and the factors of the gradients of inputs.
        held += members + inputs;
    }
    (work, held)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{mask::Pattern, plan::Rule};

    #[test]
    fn a_small_model_is_counted_by_hand() {
        let decoder = crate::family::decoder(&json!({
            "model_type": "opt", "vocab_size": 10, "hidden_size": 4, "ffn_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 4,
        }))
        .unwrap();
        let rule = Rule { pattern: Pattern::Unstructured, ratio: 0.5, count: None, scope: None };
        let plan = Plan::new(&decoder, &[], |_| Some(rule)).unwrap();
        let run = Run {
            samples: 2,
            sequence_length: 5,
            start: Needs::NOTHING,
            refined: Some(false),
            rebuild: Some(Needs::SQUARED_GRADIENT),
            swaps: false,
            dense: false,
            stream_size: 4,
            evaluated: (0, 3),
            evaluated_at_once: 1 << 20,
        };
        // Attention: 64 weights, 16 of them with an input that has weights before it. The MLP: 64,
        // 32 of them so.
        let layer = (6.0 * 64.0 + 2.0 * (16.0 + 64.0)) + (6.0 * 64.0 + 2.0 * (32.0 + 64.0));
        let found = estimate(&decoder, &plan, &run);
        assert_eq!(found.pruning, 2.0 * 10.0 * layer);
        let start = Needs::INPUT_SQUARE;
        let wanda = Run { start, refined: None, rebuild: None, evaluated: (7, 2), ..run };
        let found = estimate(&decoder, &plan, &wanda);
        // The last linear layer's dense output is nobody's input.
        assert_eq!(found.pruning, 2.0 * 10.0 * 2.0 * (2.0 * 128.0 - 32.0));
        let both = Run { refined: Some(true), rebuild: Some(Needs::SQUARED_GRADIENT), ..wanda };
        assert_eq!(estimate(&decoder, &plan, &both).pruning, 2.0 * 10.0 * layer);
        assert_eq!(found.waiting, 10.0 * 4.0 * 4.0);
        assert_eq!(found.evaluation, 2.0 * 14.0 * (256.0 + 40.0));
        // Two dense passes and two sparse ones; Gram matrices of inputs of 4, 4, 4 and 8, and how
        // they differ; three products with them for each matrix.
        assert_eq!(estimate(&decoder, &plan, &both).initial, 0.0);
        let first = Run { refined: Some(false), ..wanda };
        assert_eq!(estimate(&decoder, &plan, &first).initial, found.pruning);
        let swaps = Run { refined: Some(true), swaps: true, dense: true, ..wanda };
        let squares = 3.0 * (3.0 * 16.0 + 64.0);
        let products = 3.0 * 2.0 * (4.0 * 4.0 * 16.0 + 8.0 * 16.0 + 4.0 * 64.0);
        let found = estimate(&decoder, &plan, &swaps);
        assert_eq!(found.pruning, 2.0 * (10.0 * (8.0 * 128.0 + squares) + products));
        assert_eq!(found.waiting, 4.0 * 10.0 * 4.0 * 4.0);
        let calibration = Run { evaluated: (0, 2), ..wanda };
        let gram = Run { start: Needs::GRAM, ..calibration };
        let [calibration, gram] = [calibration, gram].map(|run| estimate(&decoder, &plan, &run));
        assert!(gram.memory > calibration.memory && gram.pruning > calibration.pruning);
    }
}
