//! LLM-Barber's rebuild as a stage (arXiv 2408.10631): pruned weights with high scores and kept
//! weights with low scores change places. Gradients of the group's output error give the scores.

use std::{fmt, iter::zip};

use barber_metric::LayerStats;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Unexpected, Visitor},
};
use serde_json::json;

use super::{Described, Error, Event, Outcome, Run, Shares, Stage, Wrong};
use crate::{
    buffer::recycle,
    choice::word,
    executor::{Loss, ops::Ops},
    mask::{self, Comparison, Distribution, Mask, Scope, Scored},
    plan::{Member, Rule},
    prune::{Side, Tally, group::GroupState, pipeline},
    ranks::owners,
    structure::{Removal, Scores as StructureScores, bias_name},
};

/// LLM-Barber's rebuild, and its keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rebuild {
    /// The weights that compete: all of the `model`, a `group`, a `layer`, a `row` (one output) or a
    /// `column` (one input). `swap` has only `row` and `layer`, `end-to-end` has these and `model`,
    /// `rebuild` has all but `model`.
    #[serde(deserialize_with = "word")]
    pub scope: Scope,
    /// The fraction of worthwhile swaps to make, from 0 to 1. A swap is worthwhile if it raises the
    /// score of the kept weights. `auto` takes the fraction that lowers the group's output error
    /// most. The paper has 0.1, and 0.01 for Wanda's mask on models of 7 billion weights. A scope
    /// with fewer than 1/alpha worthwhile swaps gets none: the rows of small models need 0.1.
    #[schemars(schema_with = "alpha")]
    pub alpha: Alpha,
    /// The weights at which gradients are computed: `dense`, as in the paper, or `sparse`.
    // At the sparse weights, their output is compared with the target output.
    #[serde(deserialize_with = "word")]
    pub gradient: Side,
    /// Maximum number of rounds, each with new gradients, or `until-converged`. The first round
    /// that does not lower the error is undone and ends the stage.
    // The error depends on the masks alone and falls in every round, so no masks come twice: any
    // number of rounds ends.
    #[schemars(schema_with = "rounds")]
    pub rounds: Rounds,
    /// Whether kept weights that the initial mask changed (`sparsegpt`) stay changed. If not, they
    /// get their dense values back.
    pub retain: bool,
}

impl Default for Rebuild {
    fn default() -> Self {
        Self {
            scope: Scope::Row,
            alpha: Alpha::Fraction(0.1),
            gradient: Side::Dense,
            rounds: Rounds(1),
            retain: false,
        }
    }
}

/// The fraction α of worthwhile swaps to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// A fixed fraction, from 0 to 1.
    Fraction(f64),
    /// The fraction that lowers the group's output error most; no swap if none lowers it.
    Auto,
}

/// The maximum number of rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds(pub usize);

impl Alpha {
    const AUTO: &str = "auto";
}

impl Rounds {
    /// As many rounds as lower the error.
    pub const UNTIL_CONVERGED: Self = Self(usize::MAX);
    const CONVERGED: &str = "until-converged";
}

impl fmt::Display for Alpha {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fraction(fraction) => fraction.fmt(f),
            Self::Auto => f.write_str(Self::AUTO),
        }
    }
}

impl Serialize for Alpha {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Fraction(fraction) => serializer.serialize_f64(fraction),
            Self::Auto => serializer.serialize_str(Self::AUTO),
        }
    }
}

impl Serialize for Rounds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::UNTIL_CONVERGED => serializer.serialize_str(Self::CONVERGED),
            Self(rounds) => rounds.serialize(serializer),
        }
    }
}

/// The schema of α.
fn alpha(_: &mut SchemaGenerator) -> Schema {
    let number = json!({ "type": "number", "minimum": 0, "maximum": 1 });
    json_schema!({ "anyOf": [number, { "const": Alpha::AUTO }] })
}

/// The schema of a number of rounds.
fn rounds(_: &mut SchemaGenerator) -> Schema {
    let number = json!({ "type": "integer", "minimum": 1 });
    json_schema!({ "anyOf": [number, { "const": Rounds::CONVERGED }] })
}

/// A number or one word.
struct NumberOr<'a> {
    word: &'a str,
    expecting: &'a str,
}

impl Visitor<'_> for NumberOr<'_> {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, or \"{}\"", self.expecting, self.word)
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Some(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        if text == self.word {
            return Ok(None);
        }
        Err(E::invalid_value(Unexpected::Str(text), &self))
    }
}

impl<'de> Deserialize<'de> for Alpha {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = NumberOr { word: Self::AUTO, expecting: "a fraction of swaps" };
        Ok(deserializer.deserialize_any(visitor)?.map_or(Self::Auto, Self::Fraction))
    }
}

impl<'de> Deserialize<'de> for Rounds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a whole number of rounds from 1 on";
        let visitor = NumberOr { word: Self::CONVERGED, expecting };
        match deserializer.deserialize_any(visitor)? {
            None => Ok(Self::UNTIL_CONVERGED),
            Some(rounds) if rounds >= 1.0 && rounds.fract() == 0.0 && rounds < 1e6 => {
                Ok(Self(rounds as usize))
            }
            Some(rounds) => Err(de::Error::invalid_value(Unexpected::Float(rounds), &expecting)),
        }
    }
}

impl Stage for Rebuild {
    fn check(&self, _: &[&str]) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        if let Alpha::Fraction(alpha) = self.alpha
            && !(0.0..=1.0).contains(&alpha)
        {
            wrong.push(Wrong {
                key: "alpha",
                why: format!("must be from 0 to 1, or \"auto\"; got {alpha}"),
                help: "it must be from 0, no swap, to 1, every swap that raises the score, or \
                       \"auto\"",
            });
        }
        wrong
    }

    fn describe(&self, refinement: &Described<'_>) -> String {
        let Self { scope, alpha, .. } = self;
        // The settings that differ from the paper's.
        let mut otherwise = String::new();
        match self.rounds {
            Rounds(1) => {}
            Rounds::UNTIL_CONVERGED => otherwise += ", until it converges",
            Rounds(rounds) => otherwise += &format!(", at most {rounds} rounds"),
        }
        if self.gradient == Side::Sparse {
            otherwise += ", at the sparse weights";
        }
        if self.retain {
            otherwise += ", changed weights retained";
        }
        let Described { metrics, groups, structures, .. } = refinement;
        let groups = groups.join(", ");
        let scope = if *structures { String::new() } else { format!("scope {scope}, ") };
        format!("rebuild, {scope}alpha {alpha}{otherwise}, metric {metrics}, blocks {groups}")
    }

    fn scope(&self) -> Option<Scope> {
        Some(self.scope)
    }

    fn scopes(&self) -> &'static [Scope] {
        &[Scope::Group, Scope::Layer, Scope::Row, Scope::Column]
    }

    fn uses_metrics(&self) -> bool {
        true
    }

    fn takes_structures(&self) -> bool {
        true
    }

    fn shares(&self) -> Option<Shares> {
        (self.scope != Scope::Group).then_some(Shares::Matrices)
    }

    fn choices(&self) -> usize {
        if self.alpha == Alpha::Auto { FRACTIONS.len() } else { 1 }
    }

    fn count(&self, tally: &mut Tally<'_>) {
        if self.is_guarded() {
            tally.error();
        }
        match self.gradient {
            Side::Dense => tally.dense_statistics(),
            Side::Sparse => tally.sparse_statistics(),
        }
        tally.error();
        if self.is_guarded() {
            // Counts one round, in which all fractions are tried.
            (0..self.choices()).for_each(|_| tally.forward());
            tally.measures_result();
        }
    }
}

/// The fractions that [`Alpha::Auto`] tries in order, until the error rises.
const FRACTIONS: [f64; 6] = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// The scores of each matrix of a group; `None` of a matrix that another rank rebuilds.
type Scores = Vec<Option<Vec<f32>>>;

impl Run for Rebuild {
    const HELP: &'static str = "swaps by the scores that gradients of the group's output error give \
                                (LLM-Barber, arXiv 2408.10631)";

    fn run<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, Error> {
        if let (Alpha::Fraction(alpha), Rounds(1)) = (self.alpha, self.rounds) {
            let (before, scores) = self.scores(state, event)?;
            self.restore(state);
            let masks = state.masks();
            self.swap(state, &scores, alpha, Comparison::Pools)?;
            state.loss = None;
            let mut all = no_scores(state);
            distribute(&mut all, &scores, &masks, &state.masks());
            let scores = Some(self.of_all(state, all));
            return Ok(Outcome { before, after: None, accepted: true, scores });
        }
        self.restore(state);
        let first = state.error()?;
        let (mut last, mut all) = (first, no_scores(state));
        for _ in 0..self.rounds.0 {
            let (_, scores) = self.scores(state, event)?;
            let masks = state.masks();
            let mut best: Option<(Loss, Vec<Mask>)> = None;
            let fractions = match &self.alpha {
                Alpha::Fraction(alpha) => std::slice::from_ref(alpha),
                Alpha::Auto => &FRACTIONS,
            };
            for &alpha in fractions {
                self.swap(state, &scores, alpha, Comparison::Tiles)?;
                let tried = state.masks();
                // A small fraction may round down to no swap.
                if tried == masks {
                    continue;
                }
                state.loss = None;
                let found = state.error()?;
                state.set(&masks);
                if !found.improves(best.as_ref().map_or(last, |(loss, _)| *loss)) {
                    break;
                }
                best = Some((found, tried));
            }
            state.loss = Some(last);
            let Some((loss, rebuilt)) = best else { break };
            distribute(&mut all, &scores, &masks, &rebuilt);
            state.set(&rebuilt);
            state.loss = Some(loss);
            last = loss;
        }
        let (accepted, all) = (last.improves(first), self.of_all(state, all));
        Ok(Outcome { before: first, after: Some(last), accepted, scores: accepted.then_some(all) })
    }
}

impl Rebuild {
    /// Whether the stage is undone where it does not lower the error.
    fn is_guarded(&self) -> bool {
        self.alpha == Alpha::Auto || self.rounds != Rounds(1)
    }

    /// Restores the dense values of kept weights and biases that the initialiser or an earlier stage
    /// changed.
    fn restore<D: Ops>(&self, state: &mut GroupState<'_, D>) {
        if self.retain {
            return;
        }
        for member in &state.group.members {
            let of = state.linear(*member);
            let (weight, bias) = (of.weight.clone(), bias_name(of));
            if state.pruned.restore(&weight) | state.pruned.forget(&bias) {
                (state.loss, state.recorded) = (None, None);
            }
        }
    }

    /// The scores of the group's weights, and its current output error.
    fn scores<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Loss, Scores), Error> {
        let metrics = state.refinement.pipeline;
        let needs = pipeline::needs(metrics);
        let mut statistics = match self.gradient {
            Side::Dense => state.dense_statistics(needs)?,
            Side::Sparse => state.sparse_statistics(needs)?,
        };
        state.count_experts(&statistics, event);
        let before = state.error()?;
        let (mut scores, owners) = (Vec::new(), self.owners(state));
        for (i, member) in state.group.members.iter().enumerate() {
            let linear = state.linear(*member);
            // Statistics are as large as the weights, so they are dropped once a matrix has scores.
            let place = state.place(*member);
            let statistics = std::mem::take(&mut statistics[place][member.linear]);
            event(Event::Measured(&linear.weight, &statistics));
            if owners.as_ref().is_some_and(|of| of[i] != state.model.executor.ranks.rank()) {
                scores.push(None);
                continue;
            }
            let weight =
                if self.retain { state.values(linear)? } else { state.model.values(linear)? };
            let rows =
                |removal: &Removal| removal.has_rows(state.layer, member.part, member.linear);
            let whole_rows = state.removal.is_some_and(rows);
            let stats = LayerStats { whole_rows, ..statistics.of(linear, &weight) };
            let mask = state.mask(*member).to_bools();
            scores.push(Some(pipeline::score(metrics, &LayerStats { mask: &mask, ..stats })?));
            recycle(weight);
        }
        Ok((before, scores))
    }

    /// Makes the fraction `alpha` of the worthwhile swaps.
    fn swap<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        scores: &Scores,
        alpha: f64,
        comparison: Comparison,
    ) -> Result<(), Error> {
        if let Some(removal) = state.removal {
            self.exchange(state, removal, scores, alpha);
            return Ok(());
        }
        let mut masks = state.masks();
        let members = &state.group.members;
        let scope = |rule: &Rule| self.scope_of(rule);
        for (i, Member { rule, .. }) in members.iter().enumerate() {
            // All matrices with the same scope and pattern are rebuilt together with the first.
            let alike = |of: &Rule| (scope(of), of.pattern) == (scope(rule), rule.pattern);
            if members[..i].iter().any(|member| alike(&member.rule)) {
                continue;
            }
            let together = zip(members, zip(&mut masks, scores));
            let together = together.filter(|(member, _)| alike(&member.rule));
            let mut matrices: Vec<_> = together
                .filter_map(|(member, (mask, scores))| {
                    let name = state.linear(*member).weight.as_str();
                    Some(Scored { name, scores: scores.as_ref()?, mask })
                })
                .collect();
            mask::rebuild(&mut matrices, scope(rule), rule.pattern, alpha, comparison)?;
        }
        let ranks = &state.model.executor.ranks;
        if ranks.size() > 1 && self.owners(state).is_some() {
            let unpack = |i: usize, bytes: &[u8]| {
                let dims = masks[i].dims();
                Mask::from_bytes(dims, bytes).unwrap_or_else(|| unreachable!("a mask of {dims}"))
            };
            let (own, mut all) = (|i: usize| Ok::<_, Error>(masks[i].clone()), Vec::new());
            ranks.of_items(&work(state), own, (Mask::to_bytes, unpack), |_, mask| {
                all.push(mask);
                Ok(())
            })?;
            masks = all;
        }
        state.set(&masks);
        Ok(())
    }

    /// The weights that compete in a matrix with this rule.
    fn scope_of(&self, rule: &Rule) -> Scope {
        rule.scope.unwrap_or(self.scope)
    }

    /// The rank that rebuilds each matrix; `None` if weights of several matrices, or whole structures,
    /// compete.
    fn owners<D: Ops>(&self, state: &GroupState<'_, D>) -> Option<Vec<usize>> {
        let mut rules = state.group.members.iter().map(|member| &member.rule);
        let alone = rules.all(|rule| self.scope_of(rule) != Scope::Group);
        let ranks = state.model.executor.ranks.size();
        (alone && state.removal.is_none()).then(|| owners(&work(state), ranks))
    }

    /// The distribution over all matrices, of which each rank has that of its own.
    fn of_all<D: Ops>(&self, state: &GroupState<'_, D>, own: Distribution) -> Distribution {
        if self.owners(state).is_none() {
            return own;
        }
        let mut parts = state.model.executor.ranks.gather_values(own).into_iter();
        let mut all = parts.next().unwrap_or_default();
        parts.for_each(|part| all.add(&part));
        all
    }
}

/// The numbers of weights of a group's matrices.
fn work<D: Ops>(state: &GroupState<'_, D>) -> Vec<f64> {
    let members = state.group.members.iter();
    members.map(|member| state.linear(*member).dims.len() as f64).collect()
}

impl Rebuild {
    /// Makes the fraction `alpha` of the worthwhile exchanges of structures: their scores are the sums of
    /// their weights'.
    fn exchange<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        removal: &Removal,
        scores: &Scores,
        alpha: f64,
    ) {
        let mut sums = StructureScores::new(removal);
        for (member, scores) in zip(&state.group.members, scores.iter().flatten()) {
            let place = (state.layer, member.part, member.linear);
            sums.add(place, state.linear(*member).dims, scores);
        }
        let (decoder, masks) = (&state.model.decoder, &mut state.pruned.masks);
        for part in &state.group.parts {
            sums.exchange((state.layer, *part), decoder, masks, alpha);
        }
    }
}

/// An empty distribution of the pipeline's scores.
fn no_scores<D: Ops>(state: &GroupState<'_, D>) -> Distribution {
    let metrics = state.refinement.pipeline.iter();
    let names: Vec<&str> = metrics.map(|(name, _)| name.as_str()).collect();
    Distribution::new(names.join(" · "))
}

/// Adds the scores of each matrix to a distribution.
fn distribute(all: &mut Distribution, scores: &Scores, before: &[Mask], after: &[Mask]) {
    for (scores, (before, after)) in zip(scores, zip(before, after)) {
        if let Some(scores) = scores {
            all.matrix(before, after, |i| scores[i]);
        }
    }
}
