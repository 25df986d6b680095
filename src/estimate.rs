//! What a run will take: matrix products and memory, counted from the shapes before it starts.

use std::collections::BTreeMap;

use barber_metric::Needs;

use crate::{
    family::{Decoder, Linear, Part},
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
    /// What the metrics of the rebuild need, if there is one.
    pub rebuild: Option<Needs>,
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
    /// And in evaluation.
    pub evaluation: f64,
    /// Bytes of memory at the peak, without the checkpoint's pages that the system caches.
    pub memory: f64,
}

/// Bytes of a number.
const SIZE: f64 = 4.0;
/// The program itself, and what is small.
const BASE: f64 = 64e6;
/// Logits that are held at a time, in bytes.
const LOGITS: f64 = 64e6;

/// Counts a run.
pub fn estimate(decoder: &Decoder, plan: &Plan, run: &Run) -> Estimate {
    let tokens = (run.samples * run.sequence_length) as f64;
    let weights =
        |linears: &[Linear]| linears.iter().map(|linear| linear.dims.len() as f64).sum::<f64>();
    let width = decoder.hidden_size as f64;
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let all: f64 = decoder.linears().map(|linear| linear.dims.len() as f64).sum();

    let (mut pruning, mut peak) = (0.0, 0.0_f64);
    let stream = tokens * width * SIZE;
    for (layer, groups) in decoder.layers.iter().zip(&plan.layers) {
        let whole: f64 = Part::ALL.iter().map(|part| weights(layer.linears(*part))).sum();
        if run.start.inputs() {
            // Dense for the statistics, sparse for the next layer's.
            pruning += 2.0 * 2.0 * tokens * whole;
            let mut held = 2.0 * stream + 2.0 * whole * SIZE;
            if run.start.gram {
                let inputs: BTreeMap<(Part, bool), f64> = groups
                    .iter()
                    .flat_map(|group| &group.members)
                    .map(|member| {
                        let last = member.linear + 1 == layer.linears(member.part).len();
                        ((member.part, last), member.of(layer).dims.columns as f64)
                    })
                    .collect();
                let squares: f64 = inputs.values().map(|columns| columns * columns).sum();
                pruning += tokens * squares;
                for member in groups.iter().flat_map(|group| &group.members) {
                    let dims = member.of(layer).dims;
                    let columns = dims.columns as f64;
                    // The factor, then what each block passes on to the columns after it.
                    pruning += columns.powi(3) + dims.rows as f64 * columns * columns;
                }
                // The widest is factorised in two matrices of 64-bit numbers.
                let widest = inputs.values().copied().fold(0.0, f64::max);
                held += (squares + 5.0 * widest * widest) * SIZE;
            }
            peak = peak.max(held);
        }
        let Some(needs) = run.rebuild else { continue };
        for group in groups {
            let (work, held) = rebuild(group, |part| layer.linears(part), needs);
            pruning += tokens * work;
            peak = peak.max(3.0 * stream + held * SIZE);
        }
    }
    let (evaluated, models) = run.evaluated;
    let evaluation = 2.0 * (evaluated * models) as f64 * (all + head);
    if evaluated > 0 {
        let states = run.evaluated_at_once.min(evaluated) as f64 * width * SIZE;
        peak = peak.max(2.0 * states + head * SIZE + LOGITS);
    }
    Estimate { pruning, evaluation, memory: BASE + all / 8.0 + peak }
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
    // Dense, sparse, and the scores.
    let mut held = 2.0 * forward + members;
    if needs.squared_gradient {
        work += 2.0 * (inputs + members);
        // What is traced, its gradient, and the sum of squares.
        held += 3.0 * members;
    }
    (work, held)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        mask::{Pattern, Scope},
        plan::Rule,
    };

    #[test]
    fn a_small_model_is_counted_by_hand() {
        let decoder = crate::family::decoder(&json!({
            "model_type": "opt", "vocab_size": 10, "hidden_size": 4, "ffn_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 4,
        }))
        .unwrap();
        let rule = Rule { pattern: Pattern::Unstructured, ratio: 0.5, scope: Scope::Row };
        let plan = Plan::new(&decoder, &[], |_| Some(rule)).unwrap();
        let run = Run {
            samples: 2,
            sequence_length: 5,
            start: Needs::NOTHING,
            rebuild: Some(Needs::SQUARED_GRADIENT),
            evaluated: (0, 3),
            evaluated_at_once: 1 << 20,
        };
        // Attention: 64 weights, 16 of them with an input that has weights before it. The MLP: 64,
        // 32 of them so.
        let layer = (6.0 * 64.0 + 2.0 * (16.0 + 64.0)) + (6.0 * 64.0 + 2.0 * (32.0 + 64.0));
        let found = estimate(&decoder, &plan, &run);
        assert_eq!(found.pruning, 2.0 * 10.0 * layer);
        let wanda = Run { start: Needs::INPUT_SQUARE, rebuild: None, evaluated: (7, 2), ..run };
        let found = estimate(&decoder, &plan, &wanda);
        assert_eq!(found.pruning, 2.0 * 10.0 * 4.0 * 128.0);
        assert_eq!(found.evaluation, 2.0 * 14.0 * (256.0 + 40.0));
        let calibration = Run { evaluated: (0, 2), ..wanda };
        let gram = Run { start: Needs::GRAM, ..calibration };
        let [calibration, gram] = [calibration, gram].map(|run| estimate(&decoder, &plan, &run));
        assert!(gram.memory > calibration.memory && gram.pruning > calibration.pruning);
    }
}
