//! Sparsity ratios that differ from layer to layer.
//!
//! One pass over the dense layers gives each layer its ratio. The number of pruned weights over all
//! layers is exactly the recipe's.

use std::slice::from_ref;

use barber_metric::Needs;

use super::{Error, InitialMasks, Sampled, failed, members};
use crate::{
    checkpoint::Pruned,
    executor::{Outputs, Pass, Probe, Targets, ops::Ops},
    family::Part,
    mask::weight_norm,
    model::Model,
    plan::{Plan, Rule},
};

/// What a layer's sparsity ratio depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum By {
    /// The layer's fraction of outliers: weights with |W|·‖x‖ above this many times the layer's
    /// mean. Layers with many outliers keep more weights (OWL, arXiv 2310.05175).
    Outliers(f64),
    /// The error of the layer's output at the least, the mean and the largest ratio: layers with a
    /// small error lose more weights.
    Error,
}

/// How sparsity is spread over layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allocation {
    /// What a layer's ratio depends on.
    pub by: By,
    /// The largest difference between a layer's ratio and the mean.
    pub spread: f64,
}

/// Sets the number of weights to prune in each matrix of the plan that is pruned unstructured to
/// `ratio`. The numbers sum to ⌊`ratio`·n⌋ for the n weights of all these matrices. Returns the
/// ratio of each layer; calls `layer_done` after each.
///
/// # Errors
/// If the model cannot be run on the samples, or a mask cannot be made.
pub fn allocate<D: Ops>(
    model: &Model<'_, D>,
    plan: &mut Plan,
    (allocation, ratio): (Allocation, f64),
    initial: &InitialMasks<'_>,
    samples: Sampled<'_>,
    layer_done: &mut dyn FnMut(),
) -> Result<Vec<f64>, Error> {
    let Allocation { by, spread } = allocation;
    let spread = spread.min(ratio).min(1.0 - ratio);
    let allocated = |rule: &Rule| rule.pattern.ratio().is_none() && rule.ratio == ratio;
    let weights: Vec<usize> = (0..plan.layers.len())
        .map(|layer| {
            let matrices = plan.matrices(&model.decoder, layer);
            let own = matrices.filter(|(member, _)| allocated(&member.rule));
            own.map(|(_, linear)| linear.dims.len()).sum()
        })
        .collect();
    let ratios = match by {
        By::Outliers(factor) => {
            let found = outliers(model, plan, samples, factor, layer_done)?;
            spread_by(&found, &weights, ratio, spread)
        }
        By::Error => {
            let tried = [ratio - spread, ratio, ratio + spread];
            let found = errors(model, plan, initial, samples, tried, &allocated, layer_done)?;
            least_error(&found, &weights, ratio, spread)
        }
    };
    let all: usize = weights.iter().sum();
    let mut wanted = Vec::new();
    for (layer, ratio) in ratios.iter().enumerate() {
        for (member, linear) in plan.matrices(&model.decoder, layer) {
            if allocated(&member.rule) {
                wanted.push(ratio * linear.dims.len() as f64);
            }
        }
    }
    let mut counts = rounded(&wanted, (ratio * all as f64 + 1e-6) as usize).into_iter();
    for members in plan.layers.iter_mut().flatten().map(|group| &mut group.members) {
        for member in members.iter_mut().filter(|member| allocated(&member.rule)) {
            member.rule.count = counts.next();
        }
    }
    Ok(ratios)
}

/// The fraction of outliers in each layer.
fn outliers<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    samples: Sampled<'_>,
    factor: f64,
    layer_done: &mut dyn FnMut(),
) -> Result<Vec<f64>, Error> {
    let mut stream = model.embed(samples.calibration(), 0)?;
    let mut found = Vec::new();
    for layer in 0..plan.layers.len() {
        let dense = Part::ALL.map(|part| model.part(layer, part, &Pruned::dense()));
        let dense = dense.into_iter().collect::<Result<Vec<_>, _>>()?;
        let wanted = members(plan, layer);
        let probe = Some(Probe::new(&wanted, Needs::INPUT_SQUARE));
        let statistics = model.executor.run(Pass { probe, ..Pass::new(&dense, &stream) });
        let statistics = statistics.map_err(failed(layer, "outliers"))?.statistics;
        let mut scores = Vec::new();
        for (member, linear) in plan.matrices(&model.decoder, layer) {
            let values = model.values(linear)?;
            let stats = &statistics[member.part as usize][member.linear];
            scores.extend(weight_norm(&stats.of(linear, &values))?);
        }
        let mean = scores.iter().map(|score| f64::from(*score)).sum::<f64>() / scores.len() as f64;
        let above = scores.iter().filter(|score| f64::from(**score) > factor * mean).count();
        found.push(above as f64 / scores.len().max(1) as f64);
        for part in &dense {
            let moved = model.executor.run(Pass::advancing(from_ref(part), &mut stream));
            moved.map_err(failed(layer, "outliers"))?;
        }
        layer_done();
    }
    Ok(found)
}

/// The mean over tokens of ‖h − h̃‖² / ‖h̃‖², for the hidden states h of each layer pruned to each
/// of `ratios` and the hidden states h̃ of the dense layer.
fn errors<D: Ops>(
    model: &Model<'_, D>,
    plan: &Plan,
    initial: &InitialMasks<'_>,
    samples: Sampled<'_>,
    ratios: [f64; 3],
    allocated: &dyn Fn(&Rule) -> bool,
    layer_done: &mut dyn FnMut(),
) -> Result<Vec<[f64; 3]>, Error> {
    let executor = &model.executor;
    let mut stream = model.embed(samples.calibration(), 0)?;
    let mut found = Vec::new();
    for layer in 0..plan.layers.len() {
        let failed = || failed(layer, "allocation");
        let weights = |pruned: &Pruned| -> Result<Vec<_>, Error> {
            let parts = Part::ALL.map(|part| model.part(layer, part, pruned));
            Ok(parts.into_iter().collect::<Result<_, _>>()?)
        };
        let dense = weights(&Pruned::dense())?;
        let (wanted, needs) = (members(plan, layer), initial.needs());
        let run = |pass: Pass<'_, D>| executor.run(pass).map_err(|e| failed()(e));
        let probe = Some(Probe::new(&wanted, needs));
        let statistics = run(Pass { probe, ..Pass::new(&dense, &stream) })?.statistics;
        let outputs = Outputs::Kept;
        let dense_outputs = run(Pass { outputs, ..Pass::new(&dense, &stream) })?.outputs;
        let mut errors = [0.0; 3];
        for (error, ratio) in errors.iter_mut().zip(ratios) {
            let mut pruned = Pruned::default();
            for (member, linear) in plan.matrices(&model.decoder, layer) {
                let mut rule = member.rule;
                if allocated(&rule) {
                    (rule.ratio, rule.count) = (ratio, None);
                }
                let values = model.values(linear)?;
                let stats = &statistics[member.part as usize][member.linear];
                let stats = stats.of(linear, &values);
                initial.matrix(model.reader, &stats, rule, &mut pruned)?;
            }
            let (sparse, targets) = (weights(&pruned)?, Targets::Relative(&dense_outputs));
            *error = run(Pass { targets, ..Pass::new(&sparse, &stream) })?.loss.calibration;
        }
        found.push(errors);
        for part in &dense {
            run(Pass::advancing(from_ref(part), &mut stream))?;
        }
        layer_done();
    }
    Ok(found)
}

/// Ratios from `ratio` − `spread` to `ratio` + `spread`: the higher a layer's score, the lower its
/// ratio.
fn spread_by(scores: &[f64], weights: &[usize], ratio: f64, spread: f64) -> Vec<f64> {
    let all: f64 = weights.iter().map(|n| *n as f64).sum();
    let sum: f64 = scores.iter().zip(weights).map(|(s, n)| s * *n as f64).sum();
    let above: Vec<f64> = scores.iter().map(|score| score - sum / all.max(1.0)).collect();
    let most = above.iter().map(|above| above.abs()).fold(0.0, f64::max);
    // Differences as small as rounding do not count.
    let scale = if most > 1e-9 * (sum / all.max(1.0)).abs() { spread / most } else { 0.0 };
    above.iter().map(|above| ratio - scale * above).collect()
}

/// The ratios from `ratio` − `spread` to `ratio` + `spread` with the least sum of errors. A layer's
/// error is interpolated linearly between its three values, and what costs least per weight is
/// pruned first.
fn least_error(errors: &[[f64; 3]], weights: &[usize], ratio: f64, spread: f64) -> Vec<f64> {
    let mut steps = Vec::new();
    for (layer, &[least, mean, most]) in errors.iter().enumerate() {
        let (first, second) = (mean - least, most - mean);
        // Where the second step is cheaper, both are taken together.
        if first <= second {
            steps.extend([(first, layer, spread), (second, layer, spread)]);
        } else {
            steps.push(((first + second) / 2.0, layer, 2.0 * spread));
        }
    }
    steps.sort_by(|(a, i, _), (b, j, _)| {
        (a * weights[*j] as f64).total_cmp(&(b * weights[*i] as f64)).then(i.cmp(j))
    });
    let mut left = spread * weights.iter().map(|n| *n as f64).sum::<f64>();
    let mut ratios = vec![ratio - spread; errors.len()];
    for (_, layer, width) in steps {
        let weights = weights[layer] as f64;
        let taken = (width * weights).min(left);
        left -= taken;
        if weights > 0.0 {
            ratios[layer] += taken / weights;
        }
    }
    ratios
}

/// The `wanted` numbers rounded to whole ones with the sum `all`: the largest remainders are
/// rounded up.
fn rounded(wanted: &[f64], all: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = wanted.iter().map(|count| *count as usize).collect();
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*b].fract().total_cmp(&wanted[*a].fract()).then(a.cmp(b)));
    let sum: usize = counts.iter().sum();
    for i in order.iter().cycle().take(all.saturating_sub(sum)) {
        counts[*i] += 1;
    }
    let mut over = sum.saturating_sub(all);
    for i in order.iter().rev() {
        let less = over.min(counts[*i]).min(1);
        counts[*i] -= less;
        over -= less;
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn layers_with_outliers_keep_more() {
        let ratios = spread_by(&[0.0, 0.1, 0.2], &[10, 10, 10], 0.5, 0.1);
        for (ratio, expected) in ratios.iter().zip([0.6, 0.5, 0.4]) {
            assert!((ratio - expected).abs() < 1e-12, "{ratios:?}");
        }
        assert_eq!(spread_by(&[0.3, 0.3], &[1, 1], 0.5, 0.1), [0.5, 0.5]);
    }

    #[test]
    fn layers_that_suffer_least_lose_most() {
        // The second layer's error hardly grows; the third's first step costs more than its second.
        let errors = [[0.0, 1.0, 3.0], [0.0, 0.1, 0.3], [0.0, 3.0, 4.0]];
        let ratios = least_error(&errors, &[10, 10, 10], 0.5, 0.1);
        for (ratio, expected) in ratios.iter().zip([0.5, 0.6, 0.4]) {
            assert!((ratio - expected).abs() < 1e-12, "{ratios:?}");
        }
    }

    proptest! {
        #[test]
        fn budgets_are_met_exactly(
            layers in vec((0.0..1.0_f64, 1..500_usize), 1..20),
            errors in vec([0.0..1.0_f64, 0.0..1.0_f64, 0.0..1.0_f64], 20),
            ratio in 0.0..1.0_f64,
            spread in 0.0..0.3_f64,
        ) {
            let (scores, weights): (Vec<f64>, Vec<usize>) = layers.into_iter().unzip();
            let spread = spread.min(ratio).min(1.0 - ratio);
            let all: usize = weights.iter().sum();
            let budget = (ratio * all as f64 + 1e-6) as usize;
            let by_error = least_error(&errors[..weights.len()], &weights, ratio, spread);
            for ratios in [spread_by(&scores, &weights, ratio, spread), by_error] {
                let wanted: Vec<f64> =
                    ratios.iter().zip(&weights).map(|(s, n)| s * *n as f64).collect();
                let counts = rounded(&wanted, budget);
                prop_assert_eq!(counts.iter().sum::<usize>(), budget);
                for (count, wanted) in counts.iter().zip(&wanted) {
                    prop_assert!((*count as f64 - wanted).abs() <= 2.0, "{} {}", count, wanted);
                }
            }
        }
    }
}
