//! The cost of a pass, counted from shapes, so that a planned pass counts like one that runs.

use std::collections::BTreeMap;

use barber_metric::Needs;

use super::{
    Inner, PartWeights, Probe, Recorded, Side,
    activation_cache::{recorded_limit, recorded_numbers, recorded_widths},
    ops::{Ops, gram_numbers, scores},
    stream::{run_count, run_limit},
};
use crate::family::{self, Attention, Feed, Projection, Sublayer};
use crate::ranks::Split;

/// Bytes per number.
const SIZE: f64 = size_of::<f32>() as f64;

/// Maximum bytes of the experts of a part that are in memory together. Larger ones are read from the
/// checkpoint by each product: the memory is that of one expert.
pub const HELD_EXPERTS: usize = 1 << 30;

/// The shapes of a part of a decoder layer.
#[derive(Clone, Debug)]
pub struct PartShape {
    /// The shapes of the projections.
    pub(super) linears: Vec<ProjectionShape>,
    pub(super) attention: Option<Attention>,
    /// Number of experts of each token; `None` without a router.
    active: Option<usize>,
    /// Number of weights of the router and of the gate of the shared expert.
    router: f64,
}

/// The shape of a projection, and its feed.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProjectionShape {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) feed: Feed,
    expert: Option<usize>,
    /// Expected fraction of the tokens that the projection reads.
    pub(super) share: f64,
}

impl ProjectionShape {
    fn new(of: &Projection, router: Option<&family::Router>) -> Self {
        let (outputs, inputs) = (of.dims.rows, of.dims.columns);
        let share = router.map_or(1.0, |router| router.share(of));
        Self { outputs, inputs, feed: of.feed(), expert: of.expert, share }
    }

    /// Number of weights.
    fn weights(&self) -> f64 {
        (self.outputs * self.inputs) as f64
    }

    /// Number of weights that a token is multiplied with, on average.
    fn active(&self) -> f64 {
        self.weights() * self.share
    }
}

impl From<&Sublayer> for PartShape {
    fn from(part: &Sublayer) -> Self {
        Self::new(
            &part.projections,
            match &part.inner {
                family::Inner::Attention(attention) => Some(attention),
                _ => None,
            },
            part.router.as_ref(),
        )
    }
}

impl<D: Ops> From<&PartWeights<D>> for PartShape {
    fn from(part: &PartWeights<D>) -> Self {
        Self::new(
            &part.projections,
            match &part.inner {
                Inner::Attention(weights) => Some(&weights.of),
                _ => None,
            },
            part.router.as_ref().map(|router| &router.of),
        )
    }
}

/// The numbers of tokens in a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Number of tokens of the calibration samples.
    pub calibration: f64,
    /// Number of tokens of the held-out samples.
    pub held_out: f64,
    /// Number of tokens of one sample.
    pub sequence: usize,
    /// Number of ranks that share the samples; zero for one process.
    pub ranks: usize,
}

impl Tokens {
    /// How ranks share the samples: those of the calibration, or only held-out ones.
    pub fn split(&self) -> Split {
        let of = if self.calibration > 0.0 { self.calibration } else { self.held_out };
        Split { ranks: self.ranks.max(1), runs: run_count(of as usize, self.sequence) }
    }
}

/// Number of rows of matrices, by the matrices' width.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows(BTreeMap<usize, f64>);

impl Rows {
    /// Adds rows.
    pub fn add(&mut self, width: usize, rows: f64) {
        *self.0.entry(width).or_default() += rows;
    }

    /// The sum of both: these and others at the same time.
    #[must_use]
    pub fn and(mut self, others: &Self) -> Self {
        others.0.iter().for_each(|(width, rows)| self.add(*width, *rows));
        self
    }

    /// The maximum of both: these and others, one after the other.
    #[must_use]
    pub fn or(mut self, others: &Self) -> Self {
        for (width, others) in &others.0 {
            let rows = self.0.entry(*width).or_default();
            *rows = rows.max(*others);
        }
        self
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> f64 {
        self.0.iter().map(|(width, rows)| SIZE * *width as f64 * rows).sum()
    }
}

/// The shape of a [`Pass`](super::Pass), which determines its cost.
#[derive(Clone, Debug)]
pub struct PassShape<'a> {
    /// The shapes of the parts.
    pub parts: Vec<PartShape>,
    /// The numbers of tokens.
    pub tokens: Tokens,
    /// The side whose statistics are computed, if a dense stream goes through beside the sparse
    /// one.
    pub beside: Option<Side>,
    /// Whether the outputs are used, or the stream advances.
    pub needs_output: bool,
    /// The statistics of linear layers.
    pub probe: Option<Probe<'a>>,
    /// The use of the cache.
    pub cache: CacheShape,
}

/// The use of the cache, as in [`Caching`](super::Caching).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheShape {
    /// The cache is ignored.
    #[default]
    Off,
    /// Outputs are recorded.
    Record(Recorded),
    /// Recorded outputs are used; the weights are the same.
    Use(Recorded),
    /// Recorded outputs are used and corrected, as a few weights have changed.
    Correct(Recorded),
}

impl<'a> PassShape<'a> {
    /// A pass without outputs, statistics and cache.
    pub fn new(parts: Vec<PartShape>, tokens: Tokens) -> Self {
        let cache = CacheShape::Off;
        Self { parts, tokens, beside: None, needs_output: false, probe: None, cache }
    }

    /// Floating-point operations of all matrix products.
    pub fn operations(&self) -> f64 {
        let Tokens { calibration, held_out, .. } = self.tokens;
        let all = calibration + held_out;
        // The pass ends with the input of the last linear layer if its output is not used.
        let inner = |tokens| {
            let last = self.parts.last().map_or(0.0, |part| part.active()[2]);
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
            CacheShape::Use(recorded) => {
                let tokens = if self.needs_output { all } else { calibration };
                let routers: f64 = self.parts.iter().map(|part| part.router).sum();
                let known = known(recorded);
                (1.0 - known) * plain + known * 2.0 * tokens * routers
            }
            CacheShape::Correct(recorded) => {
                let first: f64 = self.parts.iter().map(|part| part.active()[0]).sum();
                plain - known(recorded) * 2.0 * all * first
            }
        };
        let beside = if self.beside.is_some() { plain } else { 0.0 };
        forward + beside + self.backward() + self.grams() + self.sums()
    }

    /// Operations of a whole forward pass.
    fn forward(&self, tokens: f64) -> f64 {
        let of = |part: &PartShape| {
            let [keys, values] = self.attention(part, tokens);
            let weights = part.active().iter().sum::<f64>() + part.router;
            2.0 * tokens * weights + keys + values
        };
        self.parts.iter().map(of).sum()
    }

    /// Operations of the products of queries and keys, and of those of probabilities and values.
    fn attention(&self, part: &PartShape, tokens: f64) -> [f64; 2] {
        let Some(attention) = &part.attention else { return [0.0; 2] };
        let length = self.tokens.sequence.max(1);
        let seen = scores(length, attention.window) as f64 / length as f64;
        [attention.head_dim, attention.value_dim]
            .map(|width| 2.0 * tokens * seen * (attention.heads * width) as f64)
    }

    /// Operations of the backward pass: gradients of outputs and of weights.
    fn backward(&self) -> f64 {
        let Some(probe) = self.probe.filter(Probe::is_backward) else { return 0.0 };
        let (tokens, mut numbers, mut attention) = (self.tokens.calibration, 0.0, 0.0);
        for (i, (part, members)) in self.parts.iter().zip(probe.members).enumerate() {
            let [first, latents, last] = part.active();
            // The gradient of the first layers' input is not needed.
            numbers += latents + last + if i > 0 { first + part.router } else { 0.0 };
            // Attention's scores are computed again, and four gradients.
            let [keys, values] = self.attention(part, tokens);
            attention += 3.0 * keys + 2.0 * values;
            numbers += members.iter().map(|&i| part.linears[i].active()).sum::<f64>();
        }
        2.0 * tokens * numbers + attention
    }

    /// Operations of Gram matrices of inputs, and of products of two streams' inputs.
    fn grams(&self) -> f64 {
        let differ = self.beside == Some(Side::Sparse);
        let numbers = self.inputs(|needs| needs.gram).map(|of| {
            let differing = if differ { of.inputs * of.inputs } else { 0 };
            of.share * (gram_numbers(of.inputs) + differing) as f64
        });
        2.0 * self.tokens.calibration * numbers.sum::<f64>()
    }

    /// Operations of sums of inputs, for their variance.
    fn sums(&self) -> f64 {
        let numbers = self.inputs(|needs| needs.input_variance);
        2.0 * self.tokens.calibration * numbers.map(|of| of.share * of.inputs as f64).sum::<f64>()
    }

    /// The projections whose inputs have a statistic, one for each input.
    fn inputs(&self, has: fn(Needs) -> bool) -> impl Iterator<Item = ProjectionShape> {
        let members = self.probe.filter(|probe| has(probe.needs));
        let members = members.map_or(&[][..], |probe| probe.members);
        self.parts.iter().zip(members).flat_map(|(part, members)| {
            let mut seen = Vec::new();
            let members = members.iter().map(|&member| part.linears[member]);
            // Projections with the same input share its statistics.
            members.filter(move |of| {
                let is_new = !seen.contains(&(of.feed, of.expert));
                seen.push((of.feed, of.expert));
                is_new
            })
        })
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> f64 {
        let held =
            |part: &PartShape| part.sums(|of| if part.holds(of) { of.weights() } else { 0.0 });
        let weights: f64 = self.parts.iter().flat_map(held).sum();
        let again = match self.is_backward() {
            // The gradients of inputs take the weights once more, except for the first layers.
            true => weights - self.parts.first().map_or(0.0, |part| held(part)[0]),
            false => 0.0,
        };
        SIZE * (weights + again)
    }

    /// The matrices of a run of samples that are held at the same time.
    pub fn matrices(&self) -> Rows {
        let Tokens { calibration, held_out, sequence, .. } = self.tokens;
        let limit = run_limit(calibration.max(held_out) as usize);
        let run = (limit / sequence.max(1)).max(1) * sequence;
        let rows = (calibration + held_out).min(run as f64);
        let rows = if self.beside.is_some() { 2.0 * rows } else { rows };
        let mut all = Rows::default();
        for part in &self.parts {
            let of_part = part.matrices(rows, self.is_backward());
            // A tape holds the matrices of all parts.
            all = if self.is_backward() { all.and(&of_part) } else { all.or(&of_part) };
        }
        all
    }

    fn is_backward(&self) -> bool {
        self.probe.is_some_and(|probe| probe.is_backward())
    }

    /// Numbers of the sums over the calibration samples.
    pub fn summed(&self) -> f64 {
        let vectors = [|needs: Needs| needs.squares(), |needs: Needs| needs.input_variance];
        let vectors = vectors.map(|has| self.inputs(has).map(|of| of.inputs as f64).sum::<f64>());
        self.matrices_summed() + vectors.iter().sum::<f64>()
    }

    /// Numbers of these sums that are of pairs of inputs or of weights.
    fn matrices_summed(&self) -> f64 {
        let Some(probe) = self.probe else { return 0.0 };
        let grams = self.inputs(|needs| needs.gram);
        let mut numbers: f64 = grams.map(|of| (of.inputs * of.inputs) as f64).sum();
        numbers *= if self.beside == Some(Side::Sparse) { 2.0 } else { 1.0 };
        if probe.is_backward() {
            let members = self.parts.iter().zip(probe.members);
            let weights =
                members.flat_map(|(part, of)| of.iter().map(|&i| part.linears[i].weights()));
            numbers += weights.sum::<f64>();
        }
        numbers
    }

    /// Bytes of the statistics.
    pub fn gathered_bytes(&self) -> f64 {
        // Those of a chunk of samples, beside the sums so far.
        let Tokens { calibration, sequence, .. } = self.tokens;
        let one = run_limit(calibration as usize).max(sequence) as f64;
        SIZE * self.matrices_summed() * if calibration > one { 2.0 } else { 1.0 }
    }

    /// The outputs that the pass records.
    pub fn records(&self) -> Rows {
        let mut rows = Rows::default();
        if let (CacheShape::Record(recorded), [part]) = (self.cache, &self.parts[..]) {
            let tokens = self.tokens.calibration + self.tokens.held_out;
            let tokens = self.recorded(recorded) * tokens * self.tokens.split().fraction();
            recorded_widths(recorded, part)
                .for_each(|(width, share)| rows.add(width, share * tokens));
        }
        rows
    }

    /// The fraction of tokens whose outputs are recorded, as far as they fit.
    fn recorded(&self, recorded: Recorded) -> f64 {
        let [part] = &self.parts[..] else { return 0.0 };
        let tokens = self.tokens.calibration + self.tokens.held_out;
        let most = recorded_limit(recorded, part, tokens as usize) as f64;
        (most / (SIZE * tokens * recorded_numbers(recorded, part))).min(1.0)
    }
}

impl PartShape {
    fn new(
        projections: &[Projection],
        attention: Option<&Attention>,
        router: Option<&family::Router>,
    ) -> Self {
        let active = router.map(|router| router.active);
        let linears = projections.iter().map(|of| ProjectionShape::new(of, router)).collect();
        let routers =
            router.iter().flat_map(|of| [&of.projection].into_iter().chain(&of.shared_gate));
        let router = routers.map(|of| of.dims.len() as f64).sum();
        Self { linears, attention: attention.cloned(), active, router }
    }

    /// Sums over the projections fed by the hidden states, by latents, and by the inner function.
    fn sums(&self, of: impl Fn(&ProjectionShape) -> f64) -> [f64; 3] {
        let mut sums = [0.0; 3];
        for linear in &self.linears {
            let place = match linear.feed {
                Feed::Hidden => 0,
                Feed::QueryLatent | Feed::KeyValueLatent => 1,
                Feed::Inner => 2,
            };
            sums[place] += of(linear);
        }
        sums
    }

    /// Whether a projection's weights stay in memory.
    fn holds(&self, of: &ProjectionShape) -> bool {
        let experts = self.linears.iter().filter(|of| of.expert.is_some());
        let bytes: f64 = experts.map(|of| SIZE * of.weights()).sum();
        of.expert.is_none() || bytes <= HELD_EXPERTS as f64
    }

    /// Number of weights, by feed, that a token is multiplied with.
    fn active(&self) -> [f64; 3] {
        self.sums(ProjectionShape::active)
    }

    /// The projection that gives the part's output; one of them, if there are experts.
    pub(super) fn output(&self) -> Option<&ProjectionShape> {
        self.linears.iter().find(|of| of.feed == Feed::Inner)
    }

    /// The matrices that a pass makes for some rows of hidden states.
    fn matrices(&self, rows: f64, is_backward: bool) -> Rows {
        let mut all = Rows::default();
        let Some(output) = self.output() else { return all };
        // The normalised input, the output and its target; in a backward pass also their gradients.
        all.add(output.outputs, rows * if is_backward { 6.0 } else { 3.0 });
        if let Some(active) = self.active {
            // The inputs and the outputs of experts.
            let rows = rows * active as f64;
            all.add(output.outputs, rows * if is_backward { 4.0 } else { 1.0 });
        }
        for of in self.linears.iter().filter(|of| of.feed != Feed::Inner) {
            let rows = rows * of.share;
            all.add(of.outputs, rows * if is_backward { 2.0 } else { 1.0 });
        }
        all.add(output.inputs, rows * self.active.map_or(1.0, |active| active as f64));
        all
    }
}
