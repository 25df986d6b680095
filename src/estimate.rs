//! Estimates the matrix products and the memory of a run from its shapes.

use barber_metric::Dims;

use crate::{
    buffer::MOST,
    evaluate::LOGITS,
    executor::Tokens,
    family::{Decoder, Part},
    mask::{CHOICE, InitialMask, Takes},
    plan::Plan,
    prune::{By, Cost, Pruning, Refine, Shares},
    ranks::{Sent, owners},
};

/// The settings that determine the cost of a run.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The pruning.
    pub pruning: Pruning<'a>,
    /// What the layers' ratios depend on, if they differ between layers.
    pub allocation: Option<By>,
    /// Whether inner channels are permuted first.
    pub permutes: bool,
    /// Number of tokens of all evaluations of one model, and number of evaluated models.
    pub evaluated: (usize, usize),
    /// Number of tokens of an evaluation that are held at a time.
    pub evaluated_at_once: usize,
    /// Number of tokens of the longest evaluated segment.
    pub evaluated_longest: usize,
}

/// The estimated cost of a run. Memory is that of the first rank, if there are several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Floating-point operations of the matrix products in calibration and refinement.
    pub pruning: f64,
    /// Part of `pruning` for the permutation of channels.
    pub permutation: f64,
    /// Part of `pruning` for the allocation.
    pub allocation: f64,
    /// Part of `pruning` for a separate pass of initial masks.
    pub initial: f64,
    /// Part of `pruning` that computes masks and values from statistics, which a run does not
    /// count.
    pub solving: f64,
    /// Floating-point operations of the matrix products in evaluation.
    pub evaluation: f64,
    /// The part of the first rank, which has as much to do as any other.
    pub of_first: OfFirst,
    /// Bytes that ranks send.
    pub sent: Sent,
    /// How often a rank goes through the weights of all layers.
    pub sweeps: f64,
    /// Peak bytes of memory that the run needs, without the checkpoint's cached pages.
    pub memory: f64,
    /// Bytes of hidden states between layers, in memory or in a scratch file.
    pub waiting: f64,
}

/// What the first of some ranks does of an [`Estimate`]'s operations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OfFirst {
    /// Of those in calibration and refinement, without `solving`.
    pub passes: f64,
    /// Of those that compute masks and values from statistics.
    pub solving: f64,
    /// Operations that take as long as to go through the weights and choose among them.
    pub choosing: f64,
    /// Of those in evaluation.
    pub evaluation: f64,
}

/// What it takes to choose the masks of some matrices that ranks share: that of the rank that has most
/// to do.
struct Shared {
    /// Floating-point operations to solve linear equations.
    solving: f64,
    /// Number of weights.
    weights: f64,
    sent: Sent,
}

impl Shared {
    /// Ranks send so many bits of a weight.
    fn new(matrices: &[Dims], takes: Takes, bits: f64, ranks: usize) -> Self {
        let work: Vec<f64> = matrices.iter().map(|dims| takes.work(*dims)).collect();
        let mut loads = vec![[0.0; 3]; ranks];
        for ((rank, dims), work) in owners(&work, ranks).into_iter().zip(matrices).zip(work) {
            let [all, solving, weights] = &mut loads[rank];
            *all += work;
            *solving += takes.solving(*dims);
            *weights += dims.len() as f64;
        }
        let bytes = |weights: f64| bits * weights / 8.0 * (ranks as f64 - 1.0);
        let (first, all) = (bytes(loads[0][2]), bytes(loads.iter().map(|of| of[2]).sum()));
        let most = loads.into_iter().max_by(|a, b| a[0].total_cmp(&b[0]));
        let [_, solving, weights] = most.unwrap_or_default();
        Self { solving, weights, sent: Sent { first, all } }
    }
}

/// Bytes per number.
const SIZE: f64 = 4.0;
/// Bytes of the program itself and of small data.
const BASE: f64 = 8e6;
/// Bytes for reading the recipe, the tokenizer and the texts, which are free again before the first
/// pass.
const READING: f64 = 6e6;
/// Bytes of the tokenizer per token of the vocabulary.
const TOKEN: f64 = 600.0;

/// Estimates the cost of a run.
pub fn estimate(decoder: &Decoder, plan: &Plan, run: &Run<'_>) -> Estimate {
    let Pruning { initial_needs, single, stages, dense, ref calibration, stream_size, .. } =
        run.pruning;
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let all: f64 = decoder.projections().map(|linear| linear.dims.len() as f64).sum();
    let widest = decoder.projections().map(|linear| linear.dims.len() as f64).fold(0.0, f64::max);
    let has_grams = stages.iter().any(|stage| stage.needs_gram());
    let streams = if dense { 2.0 } else { 1.0 };
    let (mut cost, mut solver) = (Cost::default(), 0.0_f64);
    let [mut permutation, mut allocation, mut initial, mut solving] = [0.0; 4];
    let ranks = run.pruning.ranks;
    let mut solving_of_first = 0.0;
    let shares_rows = |stage: &Refine| matches!(stage.shares(), Some(Shares::Rows(_)));
    let of_rows = stages.iter().all(|stage| !stage.needs_gram() || shares_rows(stage));
    let rows_of_first = if of_rows { 1.0 / ranks as f64 } else { 1.0 };
    let mut choosing_of_first = 0.0;
    for (index, layer) in decoder.layers.iter().enumerate() {
        if run.permutes {
            let passes = run.pruning.permutation(plan, decoder, index);
            permutation += passes.operations;
            cost.then(passes);
        }
        if let Some(by) = run.allocation {
            let passes = run.pruning.allocation(plan, (index, layer), by);
            allocation += passes.operations;
            cost.then(passes);
        }
        let first = run.pruning.initial(plan, (index, layer));
        let mut solved = 0.0;
        for linear in plan.matrices(decoder, index).map(|(_, linear)| linear) {
            let [rows, columns] = [linear.dims.rows, linear.dims.columns].map(|n| n as f64);
            if initial_needs.gram {
                let Takes { numbers, .. } = run.pruning.init.takes;
                solved += run.pruning.init.takes.solving(linear.dims);
                // The dense weights are freed before.
                let numbers = numbers[0] * columns * columns + numbers[1] * widest;
                solver = solver.max(numbers * SIZE);
            }
            if has_grams {
                // The slopes before and after, and the shift of the target, which all ranks find.
                let [slopes, shift] =
                    [2.0, streams - 1.0].map(|n| 2.0 * n * rows * columns * columns);
                solving += slopes + shift;
                solving_of_first += slopes * rows_of_first + shift;
            }
        }
        if !single {
            initial += first.operations + solved;
        }
        solving += solved;
        for part in Part::ALL {
            let matrices = plan.matrices(decoder, index).filter(|(member, _)| member.part == part);
            let matrices: Vec<Dims> = matrices.map(|(_, linear)| linear.dims).collect();
            // What is removed whole is chosen on each rank.
            let ranks = if plan.removal.is_some() { 1 } else { ranks };
            let &InitialMask { takes, needs, .. } = run.pruning.init.0;
            // The mask, and the weights if they change.
            let bits = if needs.gram { 1.0 + 8.0 * run.pruning.weight_size as f64 } else { 1.0 };
            let shared = Shared::new(&matrices, takes, bits, ranks);
            solving_of_first += shared.solving;
            choosing_of_first += CHOICE * shared.weights;
            cost.sent += shared.sent;
            let weights: f64 = matrices.iter().map(|dims| dims.len() as f64).sum();
            for stage in stages.iter().chain(run.pruning.model_stages) {
                let choices = stage.choices() as f64;
                let of_first = match stage.shares() {
                    Some(Shares::Rows(bits)) => {
                        cost.sent += Sent::gathered(bits * weights / 8.0, ranks);
                        weights / ranks as f64
                    }
                    Some(Shares::Matrices) => {
                        let shared = Shared::new(&matrices, Takes::default(), 1.0, ranks);
                        cost.sent += shared.sent.times(choices);
                        shared.weights
                    }
                    None => weights,
                };
                choosing_of_first += CHOICE * choices * of_first;
            }
        }
        cost.then(first);
        cost.then(run.pruning.refinement(plan, (index, layer)));
    }
    if initial_needs.squared_gradient {
        // The output head, forward and backward to the hidden states. The last token of a sample
        // predicts none.
        let predictions = calibration.parts()[0] - calibration.samples as f64;
        let operations = 2.0 * 2.0 * predictions * head;
        initial += operations;
        let held = 2.0 * SIZE * head;
        let of_first = operations * run.pruning.tokens().split().fraction();
        cost.then(Cost { operations, of_first, held, ..Cost::default() });
    }
    for stage in run.pruning.model_stages {
        cost.then(stage.model_cost(&run.pruning, decoder, plan));
    }
    // The streams of an allocation, and of initial masks that are made before the refinement.
    let begins_again = !single && initial_needs.inputs() && !stages.is_empty();
    let earlier = usize::from(run.allocation.is_some()) + usize::from(begins_again);
    let earlier = earlier + usize::from(run.permutes);
    let stream = (calibration.tokens * decoder.hidden_size * stream_size) as f64
        * run.pruning.tokens().split().fraction();
    // Freed matrices are kept for reuse.
    let freed = cost.widths.bytes() - cost.matrices + earlier as f64 * stream;
    // A matrix is read while the others of a pass are held.
    let held = (cost.held + widest * SIZE).max(cost.gathered + solver);
    let passes = held + cost.matrices - cost.waiting + freed.min(MOST as f64);
    let (evaluated, models) = run.evaluated;
    let active = decoder.active_weights();
    let evaluation = 2.0 * (evaluated * models) as f64 * (active + head);
    let states = (run.evaluated_at_once.min(evaluated) * decoder.hidden_size) as f64;
    let logits = (run.evaluated_longest * decoder.vocab_size).min(LOGITS) as f64;
    let measuring = if evaluated > 0 { 2.0 * SIZE * (states + head + logits) } else { 0.0 };
    let (at_once, sequence) = (run.evaluated_at_once.min(evaluated), run.evaluated_longest);
    let batch = Tokens { calibration: at_once as f64, sequence, ..run.pruning.tokens() };
    // Each model's measurement goes through the weights with each batch of segments.
    let batches = (models * evaluated.div_ceil(at_once.max(1))) as f64;
    let base = BASE + TOKEN * decoder.vocab_size as f64 + all / 8.0;
    Estimate {
        pruning: cost.operations + solving,
        permutation,
        allocation,
        initial,
        solving,
        evaluation,
        of_first: OfFirst {
            passes: cost.of_first,
            solving: solving_of_first,
            choosing: choosing_of_first,
            evaluation: evaluation * batch.split().fraction(),
        },
        sent: cost.sent,
        sweeps: cost.sweeps + batches + earlier as f64 + 1.0,
        memory: base + passes.max(measuring).max(READING),
        waiting: cost.waiting,
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Needs;
    use serde_json::json;

    use super::*;
    use crate::{
        calibration::Extent,
        mask::{Init, Pattern},
        plan::Rule,
        prune::{Rebuild, Refine, Side, Swap},
    };

    #[test]
    fn a_small_model_is_counted_by_hand() {
        let decoder = crate::family::decoder(&json!({
            "model_type": "opt", "vocab_size": 10, "hidden_size": 4, "ffn_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 4,
        }))
        .unwrap();
        let rule = Rule { pattern: Pattern::UNSTRUCTURED, ratio: 0.5, count: None, scope: None };
        let plan = Plan::new(&decoder, &[], |_| Some(rule)).unwrap();
        let rebuild = &[Refine::Rebuild(Rebuild::default())];
        let pruning = Pruning {
            init: Init::default(),
            calibration: Extent { samples: 2, longest: 5, tokens: 10, ..Extent::default() },
            initial_needs: Needs::NOTHING,
            single: false,
            stages: rebuild,
            model_stages: &[],
            metrics: Needs::SQUARED_GRADIENT,
            dense: false,
            statistics: Side::Sparse,
            stream_size: 4,
            weight_size: 4,
            ranks: 1,
        };
        let run = Run {
            pruning: pruning.clone(),
            allocation: None,
            permutes: false,
            evaluated: (0, 3),
            evaluated_at_once: 1 << 20,
            evaluated_longest: 5,
        };
        // Of 10 tokens: 64 weights in attention, 16 of them with an input that has weights before
        // it, and scores of 5 by 5 tokens in two heads of two samples; 64 in the MLP, 32 of them
        // so.
        let attention = 2.0 * 2.0 * 25.0 * 2.0 * 4.0;
        let forward = 20.0 * 128.0 + attention;
        let backward = 20.0 * (16.0 + 64.0 + 32.0 + 64.0) + 2.5 * attention;
        // What the first layers gave is corrected.
        let layer = 2.0 * forward + backward + 20.0 * (16.0 + 32.0) + attention;
        let found = estimate(&decoder, &plan, &run);
        assert_eq!(found.pruning, 2.0 * layer);
        let of = |pruning: &Pruning<'_>, evaluated| {
            estimate(&decoder, &plan, &Run { pruning: pruning.clone(), evaluated, ..run })
        };
        let initial_needs = Needs::INPUT_SQUARE;
        let wanda = Pruning { initial_needs, stages: &[], ..pruning.clone() };
        let found = of(&wanda, (7, 2));
        // The last linear layer's dense output is nobody's input, nor is the last layer's sparse
        // one.
        assert_eq!(found.pruning, 2.0 * (forward - 20.0 * 32.0) + forward);
        assert_eq!(found.waiting, 10.0 * 4.0 * 4.0);
        assert_eq!(found.evaluation, 2.0 * 14.0 * (256.0 + 40.0));
        let both = of(&Pruning { single: true, stages: rebuild, ..wanda.clone() }, (7, 2));
        assert_eq!((both.pruning, both.initial), (2.0 * layer, 0.0));
        let first = of(&Pruning { stages: rebuild, ..wanda.clone() }, (7, 2));
        assert_eq!(first.initial, found.pruning);
        // Two dense passes and two sparse ones; Gram matrices of inputs of 4, 4, 4 and 8, and how
        // they differ; three products with them for each matrix.
        let swap = &[Refine::Swap(Swap::default())];
        let swaps = Pruning { single: true, stages: swap, dense: true, ..wanda.clone() };
        let squares = 2.0 * 20.0 * (3.0 * 16.0 + 64.0);
        let products = 3.0 * 2.0 * (4.0 * 4.0 * 16.0 + 8.0 * 16.0 + 4.0 * 64.0);
        let found = of(&swaps, (7, 2));
        assert_eq!(found.pruning, 2.0 * (4.0 * forward + squares + products));
        assert_eq!(found.solving, 2.0 * products);
        assert_eq!(found.waiting, 4.0 * 10.0 * 4.0 * 4.0);
        let calibration = of(&wanda, (0, 2));
        let gram = of(&Pruning { initial_needs: Needs::GRAM, ..wanda }, (0, 2));
        assert!(gram.pruning > calibration.pruning);
    }
}
