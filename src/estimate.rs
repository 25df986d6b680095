//! What a run will take: matrix products and memory, counted from the shapes before it starts.

use std::collections::BTreeMap;

use barber_metric::Needs;

use crate::{
    calibration::Extent,
    executor::{self, BATCH, Side, ops},
    family::{Decoder, Inner, Layer, Linear, Part},
    plan::{Group, Plan},
    prune::Refine,
};

/// What decides how much a run takes.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// Calibration samples.
    pub calibration: Extent,
    /// What the initialiser needs.
    pub start: Needs,
    /// Whether the initial masks are made in one pass with the refinement.
    pub single: bool,
    /// The stages of the refinement, if there is one.
    pub stages: &'a [Refine],
    /// What the metrics need that score weights for them.
    pub metrics: Needs,
    /// Whether the dense model's hidden states are there too.
    pub dense: bool,
    /// Whose hidden states statistics of inputs are of.
    pub statistics: Side,
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
    /// Floating-point operations of the matrix products in calibration and refinement.
    pub pruning: f64,
    /// Those of them that a pass for the initial masks alone takes.
    pub initial: f64,
    /// Those of them that find masks and values once the statistics are there, where a run does not
    /// count them.
    pub solving: f64,
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
pub fn estimate(decoder: &Decoder, plan: &Plan, run: &Run<'_>) -> Estimate {
    let tokens = run.calibration.tokens as f64;
    let weights =
        |linears: &[Linear]| linears.iter().map(|linear| linear.dims.len() as f64).sum::<f64>();
    let width = decoder.hidden_size as f64;
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let all: f64 = decoder.linears().map(|linear| linear.dims.len() as f64).sum();
    let grams = run.stages.iter().any(|stage| stage.needs_gram());

    let [mut products, mut initial, mut solving] = [0.0; 3];
    let mut peak = 0.0_f64;
    let stream = tokens * width * run.stream_size as f64;
    let mut waiting = if run.start.inputs() { stream } else { 0.0 };
    // Tokens that go through a layer together.
    let together = tokens.min(run.calibration.longest.max(BATCH) as f64);
    for (index, (layer, groups)) in decoder.layers.iter().zip(&plan.layers).enumerate() {
        let work = Work { run, layer, groups };
        let first = work.initial(index + 1 == decoder.layers.len());
        products += first + work.refinement();
        let parts = Part::ALL.map(|part| layer.linears(part));
        let whole: f64 = parts.iter().map(|linears| weights(linears)).sum();
        let activations = parts.iter().map(|linears| numbers(linears, width)).fold(0.0, f64::max);
        let widest = parts.iter().flat_map(|linears| linears.iter());
        let widest = widest.map(|linear| linear.dims.len() as f64).fold(0.0, f64::max);
        let squared = |part: Part| -> f64 {
            let of = inputs(groups, layer).into_iter().filter(|((own, _), _)| *own == part);
            of.map(|(_, columns)| columns * columns).sum()
        };
        let members = groups.iter().flat_map(|group| &group.members);
        let dims = members.map(|member| member.of(layer).dims).collect::<Vec<_>>();
        let mut solved = 0.0;
        if run.start.inputs() {
            let mut held = whole + widest + together * activations;
            if run.start.gram {
                for dims in &dims {
                    let columns = dims.columns as f64;
                    // The factor, then what each block passes on to the columns after it.
                    solved += columns.powi(3) + dims.rows as f64 * columns * columns;
                }
                // The widest is factorised in two matrices of 64-bit numbers, when the dense
                // weights are gone.
                let inputs = inputs(groups, layer);
                let square = inputs.values().copied().fold(0.0, f64::max).powi(2);
                let squares: f64 = Part::ALL.map(squared).iter().sum();
                held = squares + held.max(5.0 * square + 3.0 * widest);
            }
            peak = peak.max(held * SIZE + BUFFERS.min(together * activations * SIZE));
        }
        if !run.single {
            initial += first + solved;
        }
        solving += solved;
        if run.stages.is_empty() {
            continue;
        }
        let streams = if run.dense { 2.0 } else { 1.0 };
        if grams || run.dense {
            let widest = parts.iter().map(|linears| weights(linears)).fold(0.0, f64::max);
            let mut held = widest + together * activations * streams;
            if grams {
                for dims in &dims {
                    let product = 2.0 * dims.rows as f64 * (dims.columns as f64).powi(2);
                    // The slopes before and after, and the shift of the target.
                    solving += product * (1.0 + streams);
                }
                held += Part::ALL.map(squared).into_iter().fold(0.0, f64::max) * streams;
            }
            peak = peak.max(held * SIZE + BUFFERS.min(together * activations * SIZE));
        }
        waiting = waiting.max(2.0 * stream * streams);
        if !run.stages.iter().any(|stage| stage.uses_metrics()) {
            continue;
        }
        for group in groups {
            // The tape holds each number, and its gradient.
            let taped: f64 =
                group.parts.iter().map(|part| 2.0 * numbers(layer.linears(*part), width)).sum();
            let held = (held(group, layer, run.metrics) + widest + together * taped) * SIZE;
            peak = peak.max(held + BUFFERS.min(together * taped * SIZE));
        }
        let known = parts.iter().map(|linears| outputs(linears)).fold(0.0, f64::max);
        let states = (tokens * width * SIZE) as usize;
        let known = (tokens * known * SIZE).min(executor::kept(states) as f64);
        let known = if work.knows() { known } else { 0.0 };
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
    let (pruning, memory) = (products + solving, BASE + all / 8.0 + peak);
    Estimate { pruning, initial, solving, evaluation, memory, waiting }
}

/// The products of one decoder layer, pass by pass, as [`crate::prune`] makes them.
#[derive(Clone, Copy)]
struct Work<'a> {
    run: &'a Run<'a>,
    layer: &'a Layer,
    groups: &'a [Group],
}

impl Work<'_> {
    /// Calibration tokens, and those that are held out.
    fn tokens(self) -> [f64; 2] {
        self.run.calibration.parts()
    }

    /// All tokens.
    fn all(self) -> f64 {
        self.tokens().iter().sum()
    }

    /// Attention, where it is in a part.
    fn attention(self, part: Part, tokens: f64) -> f64 {
        let Inner::Attention(attention) = &self.layer.part(part).inner else { return 0.0 };
        let length = self.run.calibration.longest.max(1);
        let scores = ops::scores(length, attention.window) as f64 / length as f64;
        let width = (attention.heads * attention.head_dim) as f64;
        // Of queries and keys, and of probabilities and values.
        2.0 * 2.0 * tokens * scores * width
    }

    /// A part's first layers, which share its input, and its last one.
    fn linears(self, part: Part) -> [f64; 2] {
        let linears = self.layer.linears(part);
        let weights = |linears: &[Linear]| linears.iter().map(|of| of.dims.len() as f64).sum();
        let (last, first) = linears
            .split_last()
            .map_or((&[][..], &[][..]), |(last, first)| (std::slice::from_ref(last), first));
        [weights(first), weights(last)]
    }

    /// Some parts from end to end.
    fn forward(self, parts: &[Part], tokens: f64) -> f64 {
        let of = |part: &Part| {
            2.0 * tokens * self.linears(*part).iter().sum::<f64>() + self.attention(*part, tokens)
        };
        parts.iter().map(of).sum()
    }

    /// The gradients of a group's weights; they are squared, or summed.
    fn backward(self, group: &Group, tokens: f64) -> f64 {
        let mut weights = 0.0;
        let mut attention = 0.0;
        for (i, part) in group.parts.iter().enumerate() {
            let [first, last] = self.linears(*part);
            // The first layers' input has no weights before it.
            weights += if i > 0 { first + last } else { last };
            // Its scores once more, and four gradients.
            attention += 2.5 * self.attention(*part, tokens);
        }
        let members = group.members.iter().map(|member| member.of(self.layer).dims.len() as f64);
        2.0 * tokens * (weights + members.sum::<f64>()) + attention
    }

    /// The Gram matrices of a part's inputs, and how the inputs on another stream differ.
    fn grams(self, parts: &[Part], differ: bool) -> f64 {
        let [tokens, _] = self.tokens();
        let inputs = inputs(self.groups, self.layer).into_iter();
        let inputs = inputs.filter(|((part, _), _)| parts.contains(part));
        let numbers = inputs.map(|(_, columns)| {
            let differing = if differ { columns * columns } else { 0.0 };
            ops::gram_numbers(columns as usize) as f64 + differing
        });
        2.0 * tokens * numbers.sum::<f64>()
    }

    /// Whether groups are judged by more than one part.
    fn is_across(self) -> bool {
        self.groups.iter().any(|group| group.parts.len() > 1)
    }

    /// Whether the layer's initial masks are made from one forward pass of all of it.
    fn starts_whole(self) -> bool {
        let Run { start, single, .. } = self.run;
        start.inputs() && (!single || self.is_across())
    }

    /// Whether what the dense layers gave for the statistics of initial masks is noted for the
    /// rebuild.
    fn knows(self) -> bool {
        let Run { start, single, dense, stages, .. } = self.run;
        let first_is_rebuild = stages.first().is_some_and(|stage| !stage.needs_gram());
        *single && start.inputs() && !self.is_across() && !dense && first_is_rebuild
    }

    /// The share of the tokens for which that is so in a part: it does not all fit.
    fn known(self, part: Part) -> f64 {
        if !self.knows() {
            return 0.0;
        }
        let linears = self.layer.linears(part);
        let attention = matches!(self.layer.part(part).inner, Inner::Attention(..));
        let last = linears.last().filter(|_| attention);
        let width = outputs(linears) + last.map_or(0.0, |last| last.dims.columns as f64);
        let channels = linears.last().map_or(0, |last| last.dims.rows) as f64;
        let most = executor::kept((self.all() * channels * SIZE) as usize) as f64;
        (most / (self.all() * width * SIZE)).min(1.0)
    }

    /// What comes before a refinement, of the last layer or of another one.
    fn initial(self, is_last: bool) -> f64 {
        let Run { start, single, .. } = self.run;
        if !self.starts_whole() {
            return 0.0;
        }
        let [tokens, _] = self.tokens();
        // The last linear layer's output is nobody's input.
        let last = self.linears(Part::ALL[Part::ALL.len() - 1])[1];
        let dense = self.forward(&Part::ALL, tokens) - 2.0 * tokens * last;
        let grams = if start.gram { self.grams(&Part::ALL, false) } else { 0.0 };
        let advance = if *single || is_last { 0.0 } else { self.forward(&Part::ALL, tokens) };
        dense + grams + advance
    }

    /// The refinement, and the initial masks that are made part by part with it.
    fn refinement(self) -> f64 {
        if self.run.stages.is_empty() {
            return 0.0;
        }
        Part::ALL.iter().enumerate().map(|(i, part)| self.part(*part, i == 0)).sum()
    }

    /// The refinement of a part's groups; groups across parts come before the first.
    fn part(self, part: Part, is_first: bool) -> f64 {
        let Run { start, single, stages, dense, statistics, .. } = self.run;
        let of_inputs = stages.first().is_some_and(|stage| stage.needs_gram());
        let starts = *single && start.inputs() && !self.is_across();
        let mut work = if of_inputs || *dense {
            let differ = *dense && *statistics == Side::Sparse;
            let gram = of_inputs || starts && start.gram;
            let grams = if gram { self.grams(&[part], differ) } else { 0.0 };
            self.on_streams(&[part]) + grams
        } else if starts {
            let [tokens, _] = self.tokens();
            let [_, last] = self.linears(part);
            let known = self.known(part);
            let whole = self.forward(&[part], self.all());
            let inner = self.forward(&[part], tokens) - 2.0 * tokens * last;
            let grams = if start.gram { self.grams(&[part], false) } else { 0.0 };
            known * whole + (1.0 - known) * inner + grams
        } else {
            0.0
        };
        let own = self.groups.iter().filter(|group| group.parts == [part]);
        let across = self.groups.iter().filter(|group| is_first && group.parts.len() > 1);
        let groups: Vec<&Group> = own.chain(across).collect();
        let mut moved = false;
        for (i, group) in groups.iter().enumerate() {
            let own = group.parts == [part];
            let last = own && i + 1 == groups.len();
            // What a group is to give is known from the survey.
            let aimed = own && (of_inputs || *dense);
            let (stages, advanced) = self.group(group, (aimed, own && of_inputs), last);
            work += stages;
            moved = advanced;
        }
        if !moved {
            work += self.forward(&[part], self.all());
        }
        work
    }

    /// Dense parts, on the dense stream too, if there is one.
    fn on_streams(self, parts: &[Part]) -> f64 {
        let streams = if self.run.dense { 2.0 } else { 1.0 };
        streams * self.forward(parts, self.all())
    }

    /// The stages of a group, of which the target output may be known, and the Gram matrices of its
    /// inputs; and whether the stream moves on with its `last` stage.
    fn group(self, group: &Group, (aimed, surveyed): (bool, bool), last: bool) -> (f64, bool) {
        let mut tally = Tally {
            work: self,
            group,
            operations: 0.0,
            aimed,
            surveyed,
            is_measured: false,
            measures_result: false,
            notes: false,
        };
        let mut advanced = false;
        for (i, stage) in self.run.stages.iter().enumerate() {
            (tally.measures_result, tally.notes) = (false, false);
            stage.count(&mut tally);
            advanced = last && i + 1 == self.run.stages.len() && !tally.measures_result;
            if advanced && tally.notes {
                tally.operations += self.moves_on(&group.parts, self.all());
            } else if !tally.measures_result {
                tally.forward();
            }
        }
        (tally.operations, advanced)
    }

    /// A part whose first layers are corrected by what has changed of them, as far as it was noted
    /// what they gave.
    fn moves_on(self, parts: &[Part], all: f64) -> f64 {
        let of = |part: &Part| {
            let linears = self.layer.linears(*part);
            let first = &linears[..linears.len().saturating_sub(1)];
            let noted = (NOTED / (all * outputs(first) * SIZE)).min(1.0);
            self.forward(&[*part], all) - noted * 2.0 * all * self.linears(*part)[0]
        };
        parts.iter().map(of).sum()
    }
}

/// The operations of a group so far, and what is known of it. A stage counts here what it does.
pub struct Tally<'a> {
    work: Work<'a>,
    group: &'a Group,
    operations: f64,
    /// Whether the target output is known.
    aimed: bool,
    /// Whether the Gram matrices are known.
    surveyed: bool,
    /// Whether the output error is known.
    is_measured: bool,
    /// Whether the stage measures the output error of its result itself.
    measures_result: bool,
    /// Whether the outputs of the first layers are kept for the pass that moves the stream on.
    notes: bool,
}

impl Tally<'_> {
    /// One forward pass of the group.
    pub fn forward(&mut self) {
        self.operations += self.work.forward(&self.group.parts, self.work.all());
    }

    /// One forward pass of the dense group, as far as its outputs are not known.
    fn again(&self) -> f64 {
        let parts = &self.group.parts[..];
        let known = if let [part] = parts { self.work.known(*part) } else { 0.0 };
        (1.0 - known) * self.work.forward(parts, self.work.all())
    }

    /// Makes the target output, unless it is known.
    pub fn aim(&mut self) {
        if !std::mem::replace(&mut self.aimed, true) {
            self.operations += self.again();
            if self.work.run.dense {
                self.forward();
            }
        }
    }

    /// Measures the output error, unless it is known.
    pub fn measure(&mut self) {
        if !self.is_measured {
            self.aim();
            self.forward();
        }
        self.is_measured = true;
    }

    /// The output error was found by the way.
    pub fn measured(&mut self) {
        self.is_measured = true;
    }

    /// One pass with the gradients that the metrics need.
    pub fn gradients(&mut self) {
        self.forward();
        if self.work.run.metrics.squared_gradient {
            let [tokens, _] = self.work.tokens();
            self.operations += self.work.backward(self.group, tokens);
        }
    }

    /// The dense outputs, as far as they are not known. They are the target output, unless that is
    /// blended; and their error counts, unless the sparse ones are rounded.
    pub fn dense_outputs(&mut self) {
        let Run { dense, stream_size, .. } = *self.work.run;
        self.operations += self.again();
        self.aimed |= !dense;
        self.is_measured |= !dense && stream_size == SIZE as usize;
    }

    /// The Gram matrices of the inputs, unless they are known.
    pub fn grams(&mut self) {
        if !self.surveyed {
            let (run, parts) = (self.work.run, &self.group.parts[..]);
            let differ = run.dense && run.statistics == Side::Sparse;
            self.operations += self.work.on_streams(parts) + self.work.grams(parts, differ);
        }
    }

    /// One forward pass over the samples that are held out.
    pub fn held_out(&mut self) {
        let [_, held_out] = self.work.tokens();
        self.operations += self.work.forward(&self.group.parts, held_out);
    }

    /// So many passes over the calibration samples, with gradients.
    pub fn steps(&mut self, passes: usize) {
        let [tokens, _] = self.work.tokens();
        let pass = self.work.forward(&self.group.parts, tokens);
        self.operations += passes as f64 * (pass + self.work.backward(self.group, tokens));
    }

    /// The stage measures the output error of its result itself.
    pub fn measures_result(&mut self) {
        (self.measures_result, self.is_measured) = (true, true);
    }

    /// The outputs of the first layers are kept for the pass that moves the stream on.
    pub fn notes_outputs(&mut self) {
        self.notes = true;
    }
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

/// Numbers held in the rebuild of one group.
fn held(group: &Group, layer: &Layer, needs: Needs) -> f64 {
    let (mut forward, mut inputs) = (0.0, 0.0);
    for (i, part) in group.parts.iter().enumerate() {
        let linears = layer.linears(*part);
        for (j, linear) in linears.iter().enumerate() {
            let weights = linear.dims.len() as f64;
            forward += weights;
            // The first layers' input has no weights before it.
            if i > 0 || j + 1 == linears.len() {
                inputs += weights;
            }
        }
    }
    let members = group.members.iter().map(|member| member.of(layer).dims.len() as f64);
    let members: f64 = members.sum();
    // One set of weights, and later the scores in its place; the sums of squares, and the factors of
    // the gradients of inputs.
    forward.max(members) + if needs.squared_gradient { members + inputs } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        mask::Pattern,
        plan::Rule,
        prune::{Rebuild, Swap},
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
        let run = Run {
            calibration: Extent { samples: 2, longest: 5, tokens: 10, ..Extent::default() },
            start: Needs::NOTHING,
            single: false,
            stages: rebuild,
            metrics: Needs::SQUARED_GRADIENT,
            dense: false,
            statistics: Side::Sparse,
            stream_size: 4,
            evaluated: (0, 3),
            evaluated_at_once: 1 << 20,
        };
        // Of 10 tokens: 64 weights in attention, 16 of them with an input that has weights before
        // it, and scores of 5 by 5 tokens in two heads of two samples; 64 in the MLP, 32 of them so.
        let attention = 2.0 * 2.0 * 25.0 * 2.0 * 4.0;
        let forward = 20.0 * 128.0 + attention;
        let backward = 20.0 * (16.0 + 64.0 + 32.0 + 64.0) + 2.5 * attention;
        // What the first layers gave is corrected.
        let layer = 2.0 * forward + backward + 20.0 * (16.0 + 32.0) + attention;
        let found = estimate(&decoder, &plan, &run);
        assert_eq!(found.pruning, 2.0 * layer);
        let start = Needs::INPUT_SQUARE;
        let wanda = Run { start, stages: &[], evaluated: (7, 2), ..run.clone() };
        let found = estimate(&decoder, &plan, &wanda);
        // The last linear layer's dense output is nobody's input, nor is the last layer's sparse one.
        assert_eq!(found.pruning, 2.0 * (forward - 20.0 * 32.0) + forward);
        let both = Run { single: true, stages: rebuild, ..wanda.clone() };
        assert_eq!(estimate(&decoder, &plan, &both).pruning, 2.0 * layer);
        assert_eq!(found.waiting, 10.0 * 4.0 * 4.0);
        assert_eq!(found.evaluation, 2.0 * 14.0 * (256.0 + 40.0));
        assert_eq!(estimate(&decoder, &plan, &both).initial, 0.0);
        let first = Run { stages: rebuild, ..wanda.clone() };
        assert_eq!(estimate(&decoder, &plan, &first).initial, found.pruning);
        // Two dense passes and two sparse ones; Gram matrices of inputs of 4, 4, 4 and 8, and how
        // they differ; three products with them for each matrix.
        let swap = &[Refine::Swap(Swap::default())];
        let swaps = Run { single: true, stages: swap, dense: true, ..wanda.clone() };
        let squares = 2.0 * 20.0 * (3.0 * 16.0 + 64.0);
        let products = 3.0 * 2.0 * (4.0 * 4.0 * 16.0 + 8.0 * 16.0 + 4.0 * 64.0);
        let found = estimate(&decoder, &plan, &swaps);
        assert_eq!(found.pruning, 2.0 * (4.0 * forward + squares + products));
        assert_eq!(found.solving, 2.0 * products);
        assert_eq!(found.waiting, 4.0 * 10.0 * 4.0 * 4.0);
        let calibration = Run { evaluated: (0, 2), ..wanda };
        let gram = Run { start: Needs::GRAM, ..calibration.clone() };
        let [calibration, gram] = [calibration, gram].map(|run| estimate(&decoder, &plan, &run));
        assert!(gram.memory > calibration.memory && gram.pruning > calibration.pruning);
    }
}
