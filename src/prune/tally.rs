//! The cost of pruning: the passes of all layers and stages, in order, each counted from its shape.

use barber_metric::Needs;

use super::{By, Refine, Side};
use crate::{
    calibration::Extent,
    executor::{CacheShape, PartShape, PassShape, Probe, Recorded, Rows, Tokens},
    family::{Decoder, Feed, Layer, Part},
    mask::Init,
    permutation::Site,
    plan::{Group, Plan},
    ranks::{Sent, Split},
};

/// The settings that determine the cost of pruning.
#[derive(Clone, Debug)]
pub struct Pruning<'a> {
    /// Number and lengths of the calibration samples.
    pub calibration: Extent,
    /// How initial masks are made.
    pub init: Init,
    /// The statistics that the initial masks need.
    pub initial_needs: Needs,
    /// Whether the initial masks are made in one pass with the refinement.
    pub single: bool,
    /// The stages that work group by group.
    pub stages: &'a [Refine],
    /// The stages that work on the whole model, after the others.
    pub model_stages: &'a [Refine],
    /// Statistics that the metric pipeline of the stages needs.
    pub metrics: Needs,
    /// Whether the dense model's hidden states are kept, too.
    pub dense: bool,
    /// Which model's hidden states the statistics of inputs are computed on.
    pub statistics: Side,
    /// Bytes per number of a stored hidden state.
    pub stream_size: usize,
    /// Bytes of a changed weight.
    pub weight_size: usize,
    /// Number of ranks that share the samples.
    pub ranks: usize,
}

/// The cost of some passes. Bytes in memory are those of the first rank, if there are several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations of all matrix products.
    pub operations: f64,
    /// Those of the first rank; no rank has more.
    pub of_first: f64,
    /// Bytes that ranks send.
    pub sent: Sent,
    /// How often a rank goes through the weights of all layers, beyond once.
    pub sweeps: f64,
    /// Peak bytes of weights and statistics.
    pub held: f64,
    /// Peak bytes of statistics.
    pub gathered: f64,
    /// Peak bytes of hidden states and outputs.
    pub matrices: f64,
    /// Peak bytes of hidden states and outputs that are stored between passes.
    pub waiting: f64,
    /// Peak number of rows of each width, per width: freed matrices are kept for reuse.
    pub widths: Rows,
}

impl Cost {
    /// Adds a pass during which the matrices of `waiting` are stored.
    fn add(&mut self, pass: &PassShape<'_>, waiting: &Rows) {
        let split = pass.tokens.split();
        self.add_shared(pass, waiting, split.fraction(), split.sums(pass.summed()));
    }

    /// Adds a pass of which the first rank does this fraction, and for which this is sent.
    fn add_shared(&mut self, pass: &PassShape<'_>, waiting: &Rows, fraction: f64, sent: Sent) {
        let widths = pass.matrices().and(waiting);
        let gathered = pass.gathered_bytes();
        let operations = pass.operations();
        self.then(Self {
            operations,
            of_first: operations * fraction,
            sent,
            sweeps: 0.0,
            held: pass.weight_bytes() + gathered,
            gathered,
            matrices: widths.bytes(),
            waiting: waiting.bytes(),
            widths,
        });
    }

    /// Adds the cost of later passes: operations add up, peaks are maxima.
    pub fn then(&mut self, other: Self) {
        self.operations += other.operations;
        self.of_first += other.of_first;
        self.sent += other.sent;
        self.sweeps += other.sweeps;
        self.held = self.held.max(other.held);
        self.gathered = self.gathered.max(other.gathered);
        self.matrices = self.matrices.max(other.matrices);
        self.waiting = self.waiting.max(other.waiting);
        self.widths = std::mem::take(&mut self.widths).or(&other.widths);
    }
}

/// A layer whose passes are counted.
struct Work<'a> {
    pruning: &'a Pruning<'a>,
    groups: &'a [Group],
    /// Width of the hidden states.
    width: usize,
    /// The shapes of the layer's parts.
    parts: Vec<PartShape>,
    /// The indices of the pruned matrices in each part.
    members: Vec<Vec<usize>>,
}

impl Pruning<'_> {
    pub(crate) fn tokens(&self) -> Tokens {
        let [calibration, held_out] = self.calibration.parts();
        Tokens { calibration, held_out, sequence: self.calibration.longest, ranks: self.ranks }
    }

    /// Cost of a layer's passes for a permutation of its inner channels.
    pub fn permutation(&self, plan: &Plan, decoder: &Decoder, index: usize) -> Cost {
        let work = Work::new(self, plan, (index, &decoder.layers[index]));
        let (mut cost, tokens) = (Cost::default(), self.tokens());
        let waiting = work.stores(2.0, tokens);
        for part in Part::ALL {
            let sites = Site::planned(plan, decoder, (index, part));
            let members = [sites.iter().map(|(site, _)| site.output).collect::<Vec<_>>()];
            let probe = Some(Probe::new(&members, Needs::INPUT_SQUARE));
            let pass = PassShape::new(work.parts(&[part]), tokens);
            let pass = PassShape { needs_output: true, ..pass };
            cost.add(&PassShape { probe, ..pass.clone() }, &waiting);
            if sites.is_empty() {
                continue;
            }
            // A matrix, and its importances in two orders, beside the dense weights.
            let linears = members[0].iter().map(|of| &decoder.layers[index].projections(part)[*of]);
            let largest = linears.map(|linear| linear.dims.len()).max().unwrap_or(0);
            let held = pass.weight_bytes() + (3 * largest * size_of::<f32>()) as f64;
            cost.then(Cost { held, ..Cost::default() });
            (0..2).for_each(|_| cost.add(&pass, &waiting));
        }
        cost
    }

    /// Cost of a layer's passes for an allocation.
    pub fn allocation(&self, plan: &Plan, (index, layer): (usize, &Layer), by: By) -> Cost {
        let (work, mut cost) = (Work::new(self, plan, (index, layer)), Cost::default());
        let tokens = Tokens { held_out: 0.0, ..self.tokens() };
        let (needs, tried) = match by {
            By::Outliers(_) => (Needs::INPUT_SQUARE, 0_u32),
            // One dense layer and three sparse ones.
            By::Error => (self.initial_needs, 4),
        };
        let (whole, probe) =
            (PassShape::new(work.parts.clone(), tokens), Probe::new(&work.members, needs));
        let waiting = work.stores(1.0 + f64::from(tried.min(1)), tokens);
        cost.add(&PassShape { probe: Some(probe), ..whole.clone() }, &waiting);
        for _ in 0..tried {
            cost.add(&PassShape { needs_output: true, ..whole.clone() }, &waiting);
        }
        work.advance(&mut cost, tokens);
        cost
    }

    /// Cost of a layer's passes for initial masks that are made before its refinement.
    pub fn initial(&self, plan: &Plan, (index, layer): (usize, &Layer)) -> Cost {
        let work = Work::new(self, plan, (index, layer));
        let mut cost = Cost::default();
        if self.initial_needs.squared_gradient {
            return work.predictions(layer, plan.layers.len());
        }
        let needs = self.initial_needs;
        if !needs.samples() || self.single && !work.is_across() {
            return cost;
        }
        let tokens = Tokens { held_out: 0.0, ..self.tokens() };
        let pass = || PassShape::new(work.parts.clone(), tokens);
        if needs.inputs() {
            let probe = Some(Probe::new(&work.members, needs));
            cost.add(&PassShape { probe, ..pass() }, &work.stores(1.0, tokens));
        }
        if needs.structures() {
            cost.add(&PassShape { needs_output: true, ..pass() }, &work.stores(1.0, tokens));
        }
        if !self.single && index + 1 < plan.layers.len() {
            work.advance(&mut cost, tokens);
        }
        cost
    }

    /// Cost of a layer's refinement, and of initial masks that are made with it.
    pub fn refinement(&self, plan: &Plan, (index, layer): (usize, &Layer)) -> Cost {
        let mut cost = Cost::default();
        if !self.stages.is_empty() {
            let work = Work::new(self, plan, (index, layer));
            Part::ALL.iter().for_each(|part| cost.then(work.part(*part)));
        }
        cost
    }
}

impl<'a> Work<'a> {
    fn new(pruning: &'a Pruning<'a>, plan: &'a Plan, (index, layer): (usize, &Layer)) -> Self {
        let parts = Part::ALL.iter().map(|part| layer.part(*part).into()).collect();
        let mut projections = layer.projections(Part::ALL[0]).iter();
        let output = projections.find(|of| of.feed() == Feed::Inner);
        // Between the parts of a parallel layer, hidden states are twice as wide.
        let width = output.map_or(0, |of| of.dims.rows) * (1 + usize::from(layer.parallel));
        let (groups, members) = (&plan.layers[index][..], super::members(plan, index));
        Self { pruning, groups, width, parts, members }
    }

    /// Cost of a layer's passes for statistics of the dense model's predictions: forward to the next
    /// layer's boundary, backward from there, and for statistics of inputs forward once more.
    fn predictions(&self, layer: &Layer, layers: usize) -> Cost {
        let (mut cost, needs) = (Cost::default(), self.pruning.initial_needs);
        let tokens = Tokens { held_out: 0.0, ..self.pruning.tokens() };
        // The hidden states before all layers, and the gradients of one.
        let waiting = self.stores(layers as f64 + 2.0, tokens);
        let pass = || PassShape::new(self.parts.clone(), tokens);
        let whole = PassShape { needs_output: true, ..pass() };
        cost.add(&whole, &waiting);
        let backward = Probe::new(&self.members, Needs::SQUARED_GRADIENT);
        cost.add(&PassShape { probe: Some(backward), ..whole }, &waiting);
        // The gradient of the layer's input is wanted too.
        let first = layer.projections(Part::ALL[0]).iter().filter(|of| of.feed() == Feed::Hidden);
        let input: usize = first.map(|of| of.dims.len()).sum();
        let of_input = 2.0 * tokens.calibration * input as f64;
        cost.operations += of_input;
        cost.of_first += of_input * tokens.split().fraction();
        let needs = Needs { squared_gradient: false, ..needs };
        if needs.inputs() {
            let probe = Some(Probe::new(&self.members, needs));
            cost.add(&PassShape { probe, ..pass() }, &waiting);
        }
        if needs.structures() {
            cost.add(&PassShape { needs_output: true, ..pass() }, &waiting);
        }
        cost
    }

    /// Adds the passes that advance a stream.
    fn advance(&self, cost: &mut Cost, tokens: Tokens) {
        for part in &self.parts {
            let pass = PassShape::new(vec![part.clone()], tokens);
            cost.add(&PassShape { needs_output: true, ..pass }, &self.stores(1.0, tokens));
        }
    }

    /// The rows of `count` streams or outputs of all samples.
    fn stores(&self, count: f64, tokens: Tokens) -> Rows {
        let mut rows = Rows::default();
        let rounded = self.pruning.stream_size as f64 / size_of::<f32>() as f64;
        let tokens = (tokens.calibration + tokens.held_out) * tokens.split().fraction();
        rows.add(self.width, count * rounded * tokens);
        rows
    }

    /// Whether the output error of a group spans more than one part.
    fn is_across(&self) -> bool {
        self.groups.iter().any(|group| group.parts.len() > 1)
    }

    /// The shapes of some parts.
    fn parts(&self, parts: &[Part]) -> Vec<PartShape> {
        parts.iter().map(|part| self.parts[*part as usize].clone()).collect()
    }

    /// Cost of refining a part's groups; groups across parts count with the first part.
    fn part(&self, part: Part) -> Cost {
        let Pruning { initial_needs, single, stages, dense, statistics, .. } = self.pruning;
        let of_inputs = stages.first().is_some_and(|stage| stage.needs_gram());
        let starts = *single && initial_needs.inputs() && !self.is_across();
        let needs = if starts { *initial_needs } else { Needs::NOTHING };
        let needs = if of_inputs { needs.or(Needs::GRAM) } else { needs };
        let tokens = self.pruning.tokens();
        let members = std::slice::from_ref(&self.members[part as usize]);
        let pass = || PassShape::new(self.parts(&[part]), tokens);
        let probe = Some(Probe::new(members, needs));
        // One stream and its outputs for each model.
        let mut waiting = self.stores(if *dense { 4.0 } else { 2.0 }, tokens);
        let mut cost = Cost::default();
        let mut known = None;
        if of_inputs || *dense {
            let beside = dense.then_some(*statistics);
            cost.add(&PassShape { beside, needs_output: true, probe, ..pass() }, &waiting);
        } else if starts {
            let cache = CacheShape::Record(Recorded::All);
            let pass = PassShape { probe, cache, ..pass() };
            waiting = waiting.and(&pass.records());
            cost.add(&pass, &waiting);
            known = Some(Recorded::All);
        }
        let own = self.groups.iter().filter(|group| group.parts == [part]);
        let is_first = part == Part::ALL[0];
        let across = self.groups.iter().filter(|group| is_first && group.parts.len() > 1);
        let groups: Vec<&Group> = own.chain(across).collect();
        let mut advanced = false;
        for (i, group) in groups.iter().enumerate() {
            let (own, members) = (group.parts == [part], group.linears());
            let mut tally = Tally {
                pruning: self.pruning,
                parts: self.parts(&group.parts),
                members: &members,
                cost,
                waiting: waiting.clone(),
                known: known.filter(|_| own),
                // The pass of the dense part gives the target output.
                has_target: own && (of_inputs || *dense),
                has_grams: own && of_inputs,
                has_error: false,
                measures_result: false,
                advances: false,
                records: false,
            };
            // The stream advances with the output of the last group with its last masks.
            advanced = tally.stages(own && i + 1 == groups.len());
            cost = tally.cost;
        }
        if !advanced {
            cost.add(&PassShape { needs_output: true, ..pass() }, &waiting);
        }
        cost
    }
}

/// The cost of a group so far, and what is known of the group. A stage counts its passes here.
pub struct Tally<'a> {
    pruning: &'a Pruning<'a>,
    parts: Vec<PartShape>,
    /// The indices of the group's matrices in each part.
    members: &'a [Vec<usize>],
    cost: Cost,
    /// Matrices that are stored between passes.
    waiting: Rows,
    /// Which outputs of the dense part are known.
    known: Option<Recorded>,
    has_target: bool,
    has_grams: bool,
    /// Whether the output error is known.
    has_error: bool,
    /// Whether the stage itself measures the output error of its result.
    measures_result: bool,
    /// Whether the stream advances with the stage's result.
    advances: bool,
    /// Whether the outputs of the first layers are recorded for the advance.
    records: bool,
}

impl<'a> Tally<'a> {
    /// Counts all stages; returns whether the stream advances with the last one.
    fn stages(&mut self, advance: bool) -> bool {
        let stages = self.pruning.stages;
        for (i, stage) in stages.iter().enumerate() {
            (self.measures_result, self.records) = (false, false);
            self.advances = advance && i + 1 == stages.len();
            stage.count(self);
            self.advances &= !self.measures_result;
            if self.advances && self.records {
                let cache = CacheShape::Correct(Recorded::First);
                self.add(&PassShape { cache, ..self.pass() });
            } else if !self.measures_result {
                self.forward();
            }
        }
        self.advances
    }

    fn add(&mut self, pass: &PassShape<'_>) {
        self.cost.add(pass, &self.waiting);
    }

    /// A pass through the group that computes its outputs.
    fn pass(&self) -> PassShape<'a> {
        PassShape {
            needs_output: true,
            ..PassShape::new(self.parts.clone(), self.pruning.tokens())
        }
    }

    /// Counts a forward pass of the group.
    pub fn forward(&mut self) {
        self.add(&self.pass());
    }

    /// Counts a forward pass of the group over the held-out samples.
    pub fn held_out(&mut self) {
        let tokens = Tokens { calibration: 0.0, ..self.pruning.tokens() };
        self.add(&PassShape { tokens, ..self.pass() });
    }

    /// A pass of the dense group; it reuses the outputs that are known.
    fn dense(&self) -> PassShape<'a> {
        PassShape { cache: self.known.map_or(CacheShape::Off, CacheShape::Use), ..self.pass() }
    }

    /// Counts the target output, unless it is known.
    pub fn target(&mut self) {
        if !std::mem::replace(&mut self.has_target, true) {
            self.add(&self.dense());
            if self.pruning.dense {
                self.forward();
            }
        }
    }

    /// Counts the output error, unless it is known.
    pub fn error(&mut self) {
        if !self.has_error {
            self.target();
            self.forward();
        }
        self.has_error = true;
    }

    /// Counts the sparse outputs, and the metrics' statistics at the dense weights, whose outputs
    /// are compared with the sparse ones.
    pub fn dense_statistics(&mut self) {
        let mut sparse = self.pass();
        if self.advances {
            // For the pass that advances the stream.
            self.records = true;
            sparse.cache = CacheShape::Record(Recorded::First);
            self.waiting = std::mem::take(&mut self.waiting).and(&sparse.records());
        }
        self.add(&sparse);
        let probe = Some(Probe::new(self.members, self.pruning.metrics));
        self.add(&PassShape { probe, ..self.dense() });
        // Without blending, the dense outputs are the target output. Without rounding, their error
        // is the output error.
        self.has_target |= !self.pruning.dense;
        self.has_error |= !self.pruning.dense && self.pruning.stream_size == size_of::<f32>();
    }

    /// Counts the metrics' statistics at the sparse weights, whose outputs are compared with the
    /// target output.
    pub fn sparse_statistics(&mut self) {
        self.target();
        let probe = Some(Probe::new(self.members, self.pruning.metrics));
        self.add(&PassShape { probe, ..self.pass() });
        self.has_error = true;
    }

    /// Counts the Gram matrices of inputs, unless they are known.
    pub fn grams(&mut self) {
        if !self.has_grams {
            let beside = self.pruning.dense.then_some(self.pruning.statistics);
            let probe = Some(Probe::new(self.members, Needs::GRAM));
            self.add(&PassShape { beside, probe, ..self.pass() });
        }
    }

    /// Counts a pass of the dense group for the means of inputs.
    pub fn means(&mut self) {
        let tokens = Tokens { held_out: 0.0, ..self.pruning.tokens() };
        let probe = Some(Probe::new(self.members, Needs::INPUT_VARIANCE));
        let pass = PassShape { probe, ..PassShape::new(self.parts.clone(), tokens) };
        self.add(&pass);
    }

    /// Counts `passes` passes over the calibration samples, each with a gradient.
    pub fn gradients(&mut self, passes: usize) {
        let tokens = Tokens { held_out: 0.0, ..self.pruning.tokens() };
        let probe = Probe { members: self.members, needs: Needs::NOTHING, gradient: true };
        let pass = PassShape { tokens, probe: Some(probe), ..self.pass() };
        // One run of samples follows the other.
        let (split, runs) = (tokens.split(), tokens.split().runs as f64);
        let mut sent = Split { runs: 1, ..split }.sums(pass.summed()).times(runs);
        // Of each run's sums all ranks send a share, and of the gradients those that have the run.
        sent.first *= (1.0 + split.fraction()) / 2.0;
        (0..passes).for_each(|_| self.cost.add_shared(&pass, &self.waiting, 1.0, sent));
    }

    /// Notes that the stage itself measures the output error of its result.
    pub fn measures_result(&mut self) {
        (self.measures_result, self.has_error) = (true, true);
    }
}
