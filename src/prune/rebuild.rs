//! LLM-Barber's rebuild as a stage (arXiv 2408.10631): gradients of the group's output error give
//! scores, and weights change places by them.

use std::iter::zip;

use barber_metric::{LayerStats, Needs};

use super::{
    Error, Event, Side, Stage,
    group::{Grouped, Ran},
};
use crate::{
    buffer::recycle,
    checkpoint::Dtype,
    executor::{Loss, ops::Ops},
    mask::{self, Comparison, Distribution, Mask, Scope, Scored},
    plan::{Member, Rule},
};

/// How many of the swaps that would raise the score are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// This share of them, whatever becomes of the error.
    Share(f64),
    /// The share that lowers the group's output error most, and none where none lowers it.
    Auto,
}

impl Alpha {
    /// How many shares [`Alpha::Auto`] tries at most.
    pub const TRIED: usize = SHARES.len();
}

/// How masks are rebuilt.
pub struct Rebuild<'a> {
    /// The share of the swaps worth doing that are done, α.
    pub alpha: Alpha,
    /// Where weights compete, unless a rule says otherwise.
    pub scope: Scope,
    /// The weights at which gradients are taken: the dense ones, whose output is compared with the
    /// sparse ones' as in the paper, or the sparse ones, whose output is compared with what the group
    /// is to give.
    pub at: Side,
    /// How often at most, each time with gradients at the new masks. More than one are guarded: a
    /// round that does not lower the error is taken back, and is the last. The masks alone decide the
    /// error, which falls from round to round, so that no masks come twice: any number of rounds ends.
    pub rounds: usize,
    /// Whether kept weights that the initialiser changed stay so; otherwise they are dense again.
    pub retain: bool,
    /// What scores the weights.
    pub pipeline: &'a [Stage],
}

/// The shares that [`Alpha::Auto`] tries, from the smallest on until the error rises.
const SHARES: [f64; 6] = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// The scores of each matrix of a group.
type Scores = Vec<Vec<f32>>;

impl Rebuild<'_> {
    pub(super) fn run<D: Ops>(
        &self,
        grouped: &mut Grouped<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Ran, Error> {
        if let (Alpha::Share(share), 1) = (self.alpha, self.rounds) {
            let (before, scores) = self.scores(grouped, event)?;
            self.restore(grouped);
            let masks = grouped.masks();
            self.swap(grouped, &scores, share, Comparison::Pools)?;
            grouped.loss = None;
            let mut all = self.measure();
            distribute(&mut all, &scores, &masks, &grouped.masks());
            return Ok(Ran { before, after: None, accepted: true, scores: Some(all) });
        }
        self.restore(grouped);
        let first = grouped.measured()?;
        let (mut last, mut all) = (first, self.measure());
        for _ in 0..self.rounds {
            let (_, scores) = self.scores(grouped, event)?;
            let masks = grouped.masks();
            let mut best: Option<(Loss, Vec<Mask>)> = None;
            let shares = match &self.alpha {
                Alpha::Share(share) => std::slice::from_ref(share),
                Alpha::Auto => &SHARES,
            };
            for &share in shares {
                self.swap(grouped, &scores, share, Comparison::Tiles)?;
                let tried = grouped.masks();
                // A few more swaps than none may change nothing yet.
                if tried == masks {
                    continue;
                }
                grouped.loss = None;
                let found = grouped.measured()?;
                grouped.set(&masks);
                if !found.improves(best.as_ref().map_or(last, |(loss, _)| *loss)) {
                    break;
                }
                best = Some((found, tried));
            }
            grouped.loss = Some(last);
            let Some((loss, rebuilt)) = best else { break };
            distribute(&mut all, &scores, &masks, &rebuilt);
            grouped.set(&rebuilt);
            grouped.loss = Some(loss);
            last = loss;
        }
        let accepted = last.improves(first);
        Ok(Ran { before: first, after: Some(last), accepted, scores: accepted.then_some(all) })
    }

    /// No scores yet, of the pipeline.
    fn measure(&self) -> Distribution {
        let names: Vec<&str> = self.pipeline.iter().map(|(name, _)| name.as_str()).collect();
        Distribution::new(names.join(" · "))
    }

    /// Makes kept weights that the initialiser changed dense again.
    fn restore<D: Ops>(&self, grouped: &mut Grouped<'_, D>) {
        if self.retain {
            return;
        }
        for member in &grouped.group.members {
            let name = grouped.linear(*member).weight.clone();
            if grouped.pruned.restore(&name) {
                (grouped.loss, grouped.before) = (None, None);
            }
        }
    }

    /// The scores of the group's weights, and its error as it is.
    fn scores<D: Ops>(
        &self,
        grouped: &mut Grouped<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Loss, Scores), Error> {
        let group = grouped.group;
        let needs = self.pipeline.iter().fold(Needs::NOTHING, |n, (_, m)| n.or(m.needs()));
        let wanted = grouped.wanted();
        let executor = &grouped.model.executor;
        let mut measured = match self.at {
            Side::Dense => {
                let (sparse, stream) = (grouped.sparse()?, &grouped.streams.sparse);
                let mut outputs = if grouped.advances {
                    let noted = executor.noted_outputs(&sparse[0], stream);
                    let (outputs, known) = noted.map_err(grouped.failed())?;
                    grouped.before = Some((known, grouped.masks()));
                    outputs
                } else {
                    executor.outputs(&sparse, stream).map_err(grouped.failed())?
                };
                drop(sparse);
                // The dense outputs take the sparse ones' place: without a dense stream they are
                // what the group is to give.
                let (dense, stream) = (grouped.dense()?, &grouped.streams.sparse);
                let measured = executor
                    .measure(&dense, stream, &mut outputs, &wanted, needs, grouped.known)
                    .map_err(grouped.failed())?;
                drop(dense);
                if grouped.streams.dense.is_none() {
                    grouped.targets = Some(outputs);
                    let loss = grouped.finite(measured.loss)?;
                    // In half precision it is the sparse outputs that were rounded here, and the
                    // targets elsewhere: errors that are compared are measured alike.
                    if executor.storage.dtype() == Dtype::F32 {
                        grouped.loss.get_or_insert(loss);
                    }
                }
                measured
            }
            Side::Sparse => {
                let sparse = grouped.sparse()?;
                grouped.aim()?;
                let (stream, targets) = (&grouped.streams.sparse, grouped.aimed());
                let measured = executor.measure_against(&sparse, stream, targets, &wanted, needs);
                let measured = measured.map_err(grouped.failed())?;
                let loss = grouped.finite(measured.loss)?;
                grouped.loss.get_or_insert(loss);
                measured
            }
        };
        let before = grouped.measured()?;
        let mut scores = Vec::new();
        for member in &group.members {
            let linear = grouped.linear(*member);
            let (tensor, dims) = (&linear.weight, linear.dims);
            // Statistics are as large as the weights: each goes when its matrix has scores.
            let place = grouped.place(*member);
            let statistics = std::mem::take(&mut measured.statistics[place][member.linear]);
            event(Event::Measured(tensor, &statistics));
            let weight =
                if self.retain { grouped.values(linear)? } else { grouped.model.values(linear)? };
            let stats = statistics.of(tensor, dims, &weight);
            let mask = grouped.mask(*member).to_bools();
            scores.push(score(self.pipeline, &LayerStats { mask: &mask, ..stats })?);
            recycle(weight);
        }
        Ok((before, scores))
    }

    /// Makes a share of the swaps.
    fn swap<D: Ops>(
        &self,
        grouped: &mut Grouped<'_, D>,
        scores: &Scores,
        share: f64,
        comparison: Comparison,
    ) -> Result<(), Error> {
        let mut masks = grouped.masks();
        let members = &grouped.group.members;
        let scope = |rule: &Rule| rule.scope.unwrap_or(self.scope);
        for (i, Member { rule, .. }) in members.iter().enumerate() {
            // Matrices with one scope and one pattern are rebuilt together, when the first is
            // reached.
            let alike = |of: &Rule| (scope(of), of.pattern) == (scope(rule), rule.pattern);
            if members[..i].iter().any(|member| alike(&member.rule)) {
                continue;
            }
            let together = zip(members, zip(&mut masks, scores));
            let together = together.filter(|(member, _)| alike(&member.rule));
            let mut matrices: Vec<_> = together
                .map(|(member, (mask, scores))| Scored {
                    name: &grouped.linear(*member).weight,
                    scores,
                    mask,
                })
                .collect();
            mask::rebuild(&mut matrices, scope(rule), rule.pattern, share, comparison)?;
        }
        grouped.set(&masks);
        Ok(())
    }
}

/// Adds the scores of each matrix.
fn distribute(all: &mut Distribution, scores: &Scores, before: &[Mask], after: &[Mask]) {
    for (scores, (before, after)) in zip(scores, zip(before, after)) {
        all.matrix(before, after, |i| scores[i]);
    }
}

/// Runs the metric pipeline on one matrix.
pub(super) fn score(pipeline: &[Stage], stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    let mut scores = vec![1.0; stats.weight.len()];
    for (name, metric) in pipeline {
        metric.score(stats, &mut scores).map_err(|source| Error::Metric {
            metric: name.clone(),
            tensor: stats.name.into(),
            source,
        })?;
    }
    Ok(scores)
}
