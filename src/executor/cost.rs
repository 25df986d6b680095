//! What a pass costs, counted from the shapes of what it runs: a pass that runs and one that is only
//! planned are counted alike.

use super::{
    BATCH, Inner, PartWeights, Probe, Recorded, Side,
    activation_cache::{recorded_limit, recorded_width},
    ops::{Ops, gram_numbers, scores},
};
use crate::{
    buffer::MOST,
    family::{self, Attention, Sublayer},
};

/// Bytes of a number.
const SIZE: f64 = size_of::<f32>() as f64;

/// The shapes of a part of a decoder layer.
#[derive(Clone, Debug)]
pub struct PartShape {
    /// Outputs and inputs of each linear layer.
    pub(super) linears: Vec<(usize, usize)>,
    pub(super) attention: Option<Attention>,
}

impl From<&Sublayer> for PartShape {
    fn from(part: &Sublayer) -> Self {
        let linears = part.linears.iter().map(|linear| (linear.dims.rows, linear.dims.columns));
        let attention = match &part.inner {
            family::Inner::Attention(attention) => Some(attention.clone()),
            _ => None,
        };
        Self { linears: linears.collect(), attention }
    }
}

impl<D: Ops> From<&PartWeights<D>> for PartShape {
    fn from(part: &PartWeights<D>) -> Self {
        let linears = part.linears.iter().map(|linear| (linear.outputs(), linear.inputs()));
        let attention = match &part.inner {
            Inner::Attention(attention, _) => Some(attention.clone()),
            _ => None,
        };
        Self { linears: linears.collect(), attention }
    }
}

/// The samples of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Tokens of the calibration samples.
    pub calibration: f64,
    /// Tokens of the held-out samples.
    pub held_out: f64,
    /// Tokens of one sample.
    pub sequence: usize,
}

/// A [`Pass`](super::Pass) without weights and samples: what its cost depends on.
#[derive(Clone, Debug)]
pub struct PassShape<'a> {
    /// The parts.
    pub parts: Vec<PartShape>,
    /// The samples that go through.
    pub tokens: Tokens,
    /// Whether a dense stream goes through beside the sparse one, and the side that statistics are
    /// of.
    pub beside: Option<Side>,
    /// Whether the outputs are wanted, or the stream advances.
    pub needs_output: bool,
    /// What is gathered of linear layers.
    pub probe: Option<Probe<'a>>,
    /// What becomes of the outputs of linear layers.
    pub cache: CacheShape,
}

/// What becomes of the outputs of linear layers, as [`Caching`](super::Caching) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheShape {
    /// Nothing.
    #[default]
    Off,
    /// They are recorded.
    Record(Recorded),
    /// They are known, as far as they were recorded, where weights are the same.
    Use(Recorded),
    /// They are known, and corrected where a few weights have changed.
    Correct(Recorded),
}

impl<'a> PassShape<'a> {
    /// A pass of which nothing is wanted yet.
    pub fn new(parts: Vec<PartShape>, tokens: Tokens) -> Self {
        let cache = CacheShape::Off;
        Self { parts, tokens, beside: None, needs_output: false, probe: None, cache }
    }

    /// Floating-point operations of its matrix products.
    pub fn operations(&self) -> f64 {
        let Tokens { calibration, held_out, .. } = self.tokens;
        let all = calibration + held_out;
        // The input of the last linear layer is shown, and nobody wants its output.
        let inner = |tokens| {
            let last = self.parts.last().map_or(0.0, |part| part.weights()[1]);
            self.forward(tokens) - 2.0 * tokens * last
        };
        let plain = match (self.needs_output, self.probe) {
            (true, _) => self.forward(all),
            (false, Some(_)) => inner(calibration),
            (false, None) => 0.0,
        };
        let known = |recorded| self.recorded(recorded);
        let forward = match self.cache {
            CacheShape::Record(recorded) if !self.needs_output => {
                known(recorded) * self.forward(all) + (1.0 - known(recorded)) * plain
            }
            CacheShape::Off | CacheShape::Record(_) => plain,
            CacheShape::Use(recorded) => (1.0 - known(recorded)) * plain,
            CacheShape::Correct(recorded) => {
                let first: f64 = self.parts.iter().map(|part| part.weights()[0]).sum();
                plain - known(recorded) * 2.0 * all * first
            }
        };
        let beside = if self.beside.is_some() { plain } else { 0.0 };
        forward + beside + self.backward() + self.grams()
    }

    /// The parts from end to end.
    fn forward(&self, tokens: f64) -> f64 {
        let of = |part: &PartShape| {
            let [first, last] = part.weights();
            2.0 * tokens * (first + last) + self.attention(part, tokens)
        };
        self.parts.iter().map(of).sum()
    }

    /// The products of queries and keys, and of probabilities and values.
    fn attention(&self, part: &PartShape, tokens: f64) -> f64 {
        let Some(attention) = &part.attention else { return 0.0 };
        let length = self.tokens.sequence.max(1);
        let seen = scores(length, attention.window) as f64 / length as f64;
        2.0 * 2.0 * tokens * seen * (attention.heads * attention.head_dim) as f64
    }

    /// The gradients of the outputs, and those of weights from them.
    fn backward(&self) -> f64 {
        let Some(probe) = self.probe.filter(Probe::is_backward) else { return 0.0 };
        let (tokens, mut numbers, mut attention) = (self.tokens.calibration, 0.0, 0.0);
        for (i, (part, members)) in self.parts.iter().zip(probe.members).enumerate() {
            let [first, last] = part.weights();
            // The first layers' input has no weights before it.
            numbers += if i > 0 { first + last } else { last };
            // Its scores once more, and four gradients.
            attention += 2.5 * self.attention(part, tokens);
            numbers += members.iter().map(|&i| part.weight(i)).sum::<f64>();
        }
        2.0 * tokens * numbers + attention
    }

    /// The Gram matrices of inputs, and how inputs on two streams differ.
    fn grams(&self) -> f64 {
        let differ = self.beside == Some(Side::Sparse);
        let numbers = self.gram_widths().map(|columns| {
            let differing = if differ { columns * columns } else { 0 };
            (gram_numbers(columns) + differing) as f64
        });
        2.0 * self.tokens.calibration * numbers.sum::<f64>()
    }

    /// The widths of the inputs whose Gram matrices are gathered.
    fn gram_widths(&self) -> impl Iterator<Item = usize> {
        let members = self.probe.filter(|probe| probe.needs.gram);
        let members = members.map_or(&[][..], |probe| probe.members);
        self.parts.iter().zip(members).flat_map(|(part, members)| {
            let last = part.linears.len() - 1;
            let first = members.iter().find(|&&member| member < last);
            let last = members.iter().find(|&&member| member == last);
            first.into_iter().chain(last).map(|&member| part.linears[member].1)
        })
    }

    /// Bytes of memory that it needs, beside the hidden states and outputs that wait.
    pub fn memory(&self) -> f64 {
        let parts = || self.parts.iter();
        let mut weights: f64 = parts().flat_map(PartShape::weights).sum();
        let streams = if self.beside.is_some() { 2.0 } else { 1.0 };
        let mut numbers = streams * parts().map(PartShape::numbers).fold(0.0, f64::max);
        if self.probe.is_some_and(|probe| probe.is_backward()) {
            // The tape holds each number, and its gradient.
            numbers = 2.0 * parts().map(PartShape::numbers).sum::<f64>();
            // The weights once more, for the gradients of inputs; but the first layers' input has no
            // weights before it.
            weights *= 2.0;
            weights -= self.parts.first().map_or(0.0, |part| part.weights()[0]);
        }
        let Tokens { calibration, held_out, sequence } = self.tokens;
        let run = (BATCH / sequence.max(1)).max(1) * sequence;
        let activations = SIZE * numbers * (calibration + held_out).min(run as f64);
        // Freed activations wait to be used again.
        let buffers = activations.min(MOST as f64);
        SIZE * weights + activations + buffers + self.gathered_bytes()
    }

    /// Bytes of the statistics that it gathers.
    pub fn gathered_bytes(&self) -> f64 {
        let Some(probe) = self.probe else { return 0.0 };
        let mut numbers: f64 = self.gram_widths().map(|columns| (columns * columns) as f64).sum();
        numbers *= if self.beside == Some(Side::Sparse) { 2.0 } else { 1.0 };
        if probe.is_backward() {
            let members = self.parts.iter().zip(probe.members);
            let weights = members.flat_map(|(part, of)| of.iter().map(|&i| part.weight(i)));
            numbers += weights.sum::<f64>();
        }
        SIZE * numbers
    }

    /// Bytes of the outputs that it records.
    pub fn recorded_bytes(&self) -> f64 {
        let (CacheShape::Record(recorded), [part]) = (self.cache, &self.parts[..]) else {
            return 0.0;
        };
        let tokens = self.recorded(recorded) * (self.tokens.calibration + self.tokens.held_out);
        SIZE * tokens * recorded_width(recorded, part) as f64
    }

    /// The fraction of the tokens for which outputs are recorded: not all may fit.
    fn recorded(&self, recorded: Recorded) -> f64 {
        let [part] = &self.parts[..] else { return 0.0 };
        let tokens = self.tokens.calibration + self.tokens.held_out;
        let most = recorded_limit(recorded, part, tokens as usize) as f64;
        (most / (SIZE * tokens * recorded_width(recorded, part) as f64)).min(1.0)
    }
}

impl PartShape {
    /// Weights of the first layers, which share the part's input, and of the last one.
    fn weights(&self) -> [f64; 2] {
        let last = self.linears.len() - 1;
        [(0..last).map(|i| self.weight(i)).sum(), self.weight(last)]
    }

    /// Numbers that a forward pass makes of a token's hidden states.
    fn numbers(&self) -> f64 {
        let outputs: usize = self.linears.iter().map(|(outputs, _)| outputs).sum();
        let (width, inner) = self.linears.last().copied().unwrap_or_default();
        (3 * width + outputs + inner) as f64
    }

    /// The number of a linear layer's weights.
    fn weight(&self, linear: usize) -> f64 {
        let (outputs, inputs) = self.linears[linear];
        (outputs * inputs) as f64
    }
}
