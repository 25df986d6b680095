//! The properties of metrics that score whole structures.

use proptest::{
    collection::vec,
    strategy::{BoxedStrategy, Strategy},
    test_runner::{TestCaseError, TestError},
};

use super::{
    property::{Property, close, guarded},
    runner,
};
use crate::{Metric, Needs, StructureStats};

/// Structures with statistics.
#[derive(Clone, Debug)]
struct Case {
    influence: Vec<f32>,
    contribution: Vec<f32>,
    scores: Vec<f64>,
    /// Sort keys, for a permutation.
    places: Vec<u8>,
}

/// The statistics, by their names.
const STATISTICS: [(&str, Needs); 2] =
    [("influence", Needs::INFLUENCE), ("contribution", Needs::CONTRIBUTION)];

impl Case {
    /// The statistics that a metric with these needs sees.
    fn stats(&self, needs: Needs) -> StructureStats<'_> {
        StructureStats {
            structure: "structures",
            layer: None,
            influence: needs.influence.then_some(&self.influence[..]),
            contribution: needs.contribution.then_some(&self.contribution[..]),
        }
    }

    fn permuted(&self) -> Self {
        Self {
            influence: self.in_order(&self.influence),
            contribution: self.in_order(&self.contribution),
            scores: self.in_order(&self.scores),
            places: self.places.clone(),
        }
    }

    fn in_order<T: Copy>(&self, values: &[T]) -> Vec<T> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by_key(|i| self.places[*i]);
        order.into_iter().map(|i| values[i]).collect()
    }
}

fn cases() -> BoxedStrategy<Case> {
    let numbers = |count| vec(0..=300_u16, count);
    let of = |(a, b, c, places): (Vec<u16>, Vec<u16>, Vec<u16>, _)| {
        let ordinary =
            |values: Vec<u16>| values.into_iter().map(|n| f32::from(n) / 100.0).collect();
        let scores = c.into_iter().map(|n| f64::from(n) / 100.0).collect();
        Case { influence: ordinary(a), contribution: ordinary(b), scores, places }
    };
    (0..=6_usize)
        .prop_flat_map(move |n| {
            (numbers(n), numbers(n), numbers(n), vec(0..=255_u8, n)).prop_map(of)
        })
        .boxed()
}

fn score(metric: &dyn Metric, case: &Case, stats: &StructureStats<'_>) -> Result<Vec<f64>, String> {
    let mut scores = case.scores.clone();
    guarded(|| metric.score_structures(stats, &mut scores))?;
    Ok(scores)
}

/// A test of a case.
type Test<'a> = &'a dyn Fn(&Case) -> Result<(), String>;

/// The properties that a metric of structures lacks, and how.
pub(super) fn lacking(metric: &dyn Metric) -> Vec<(Property, String)> {
    let needs = metric.needs();
    let own = |case: &Case| score(metric, case, &case.stats(needs));
    let finite = |case: &Case| match own(case)?.iter().find(|score| !score.is_finite()) {
        None => Ok(()),
        Some(score) => Err(format!("a score is {score}")),
    };
    let same = |case: &Case| match own(case)? == own(case)? {
        true => Ok(()),
        false => Err("the same structures have other scores the second time".into()),
    };
    let permuted = |case: &Case| {
        let (found, expected) = (own(&case.permuted())?, case.in_order(&own(case)?));
        let close = |(a, b): (&f64, &f64)| close(*a as f32, *b as f32);
        match found.iter().zip(&expected).all(close) {
            true => Ok(()),
            false => Err(format!("in another order the scores are {found:?}, not {expected:?}")),
        }
    };
    let poisoned = |case: &Case| {
        let poison = vec![f32::NAN; case.scores.len()];
        for (name, one) in STATISTICS.into_iter().filter(|(_, one)| needs.or(*one) != needs) {
            let stats = case.stats(needs);
            let stats = StructureStats {
                influence: one.influence.then_some(&poison[..]).or(stats.influence),
                contribution: one.contribution.then_some(&poison[..]).or(stats.contribution),
                ..stats
            };
            if score(metric, case, &stats)? != own(case)? {
                return Err(format!("it reads `{name}`, but does not declare it"));
            }
        }
        Ok(())
    };
    let tests: [(Property, Test<'_>); 4] = [
        (Property::Finiteness, &finite),
        (Property::Determinism, &same),
        (Property::Permutation, &permuted),
        (Property::Needs, &poisoned),
    ];
    let failed = |test: Test<'_>| {
        let run = runner().run(&cases(), |case| test(&case).map_err(TestCaseError::fail));
        match run.err()? {
            TestError::Fail(reason, case) => Some(format!("{}\n    {case:?}", reason.message())),
            TestError::Abort(reason) => Some(reason.message().to_owned()),
        }
    };
    let found = tests.into_iter().filter_map(|(property, test)| Some((property, failed(test)?)));
    let mut found: Vec<_> = found.collect();
    for (name, one) in STATISTICS.into_iter().filter(|(_, one)| needs.or(*one) == needs) {
        let case = |changed: f32| Case {
            influence: vec![1.0, if one.influence { changed } else { 1.0 }],
            contribution: vec![1.0, if one.contribution { changed } else { 1.0 }],
            scores: vec![1.0, 1.0],
            places: vec![0, 1],
        };
        if own(&case(1.0)) == own(&case(2.0)) {
            let reason = format!("it declares `{name}`, which has no influence on its scores");
            found.push((Property::Needs, reason));
        }
    }
    found
}
