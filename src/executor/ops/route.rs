//! The router of a mixture of experts: sends each token to the experts with the highest scores, and
//! weighs what they give.
//!
//! With scores p = softmax(z) or σ(z) of a token's logits z, and w the weights of its experts: w = a p
//! at these, or a p / Σ p over these, whose gradient with respect to p is
//! (a ∂L/∂w − Σ ∂L/∂w · w) / Σ p; and ∂L/∂z = p (∂L/∂p − Σ ∂L/∂p · p), or p (1 − p) ∂L/∂p. The choice
//! itself has no gradient. There are so few logits that the host does this for all devices.

use std::sync::Arc;

use dfdx::tensor::Tape;

use super::{Hold, Matrix, tape::record};
use crate::family::{Groups, Score, Scoring};

/// The tokens of one expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Index of the expert.
    pub expert: usize,
    /// Indices of the tokens, in order.
    pub rows: Arc<[usize]>,
    /// For each token, which of its experts this one is, from the one with the highest score.
    pub slots: Vec<usize>,
    /// The weight of the expert's output for each token.
    pub weights: Vec<f32>,
}

impl Route {
    /// The indices of the expert's weights among those of all tokens, [tokens, `active`].
    pub(super) fn places(&self, active: usize) -> impl Iterator<Item = usize> {
        self.rows.iter().zip(&self.slots).map(move |(row, slot)| row * active + slot)
    }
}

/// The weights of each token's experts, and the experts' routes.
pub type Weighted<D, T> = (Matrix<D, T>, Arc<[Route]>);

/// The weights of each token's experts, [tokens, `active`], and the routes of the experts that have
/// tokens, in order. `logits` are [tokens, experts]; `active` of the experts get each token. The
/// `correction` is added to the experts' scores for the choice alone. Of equal scores the first
/// wins.
pub fn route<D: Hold, T: Tape<f32, D>>(
    logits: Matrix<D, T>,
    active: usize,
    scoring: Scoring,
    correction: Option<&[f32]>,
) -> Result<Weighted<D, T>, D::Err> {
    let (logits, tape) = logits.split_tape();
    let (tokens, experts) = logits.shape();
    let mut scores = logits.on_host()?;
    match scoring.score {
        Score::Softmax => scores.chunks_mut(experts.max(1)).for_each(softmax),
        Score::Sigmoid => scores.iter_mut().for_each(|z| *z = sigmoid(*z)),
    }
    let (mut chosen, mut weights) = (Vec::new(), Vec::new());
    for scores in scores.chunks(experts.max(1)) {
        let own = chosen_of(scores, active, scoring.groups, correction);
        let sum = sum_of(scores, &own, scoring);
        weights.extend(own.iter().map(|expert| scoring.scale * scores[*expert] / sum));
        chosen.extend(own);
    }
    let routes = routes(&chosen, &weights, (experts, active));
    let y = logits
        .beside(logits.device().upload(weights.clone(), (tokens, active))?, (tokens, active))?;
    let weights = record(tape, [logits.name()], y, move |g| {
        let g = D::download(&g)?;
        let mut gradient = vec![0.0; tokens * experts];
        let of_tokens = scores.chunks(experts.max(1)).zip(gradient.chunks_mut(experts.max(1)));
        for (token, (p, gradient)) in of_tokens.enumerate() {
            let own = token * active..(token + 1) * active;
            let (chosen, weights, g) = (&chosen[own.clone()], &weights[own.clone()], &g[own]);
            let mean = match scoring.normalised {
                true => g.iter().zip(weights).map(|(g, w)| g * w).sum::<f32>(),
                false => 0.0,
            };
            let sum = sum_of(p, chosen, scoring);
            for (expert, g) in chosen.iter().zip(g) {
                gradient[*expert] = (scoring.scale * g - mean) / sum;
            }
            let mean: f32 = gradient.iter().zip(p).map(|(g, p)| g * p).sum();
            let slope = |g: f32, p: f32| match scoring.score {
                Score::Softmax => p * (g - mean),
                Score::Sigmoid => p * (1.0 - p) * g,
            };
            gradient.iter_mut().zip(p).for_each(|(g, p)| *g = slope(*g, *p));
        }
        Ok([logits.device().upload(gradient, (tokens, experts))?])
    });
    Ok((weights, routes))
}

/// The sigmoid of each token's logit, [tokens, 1], as its weight of an expert that all tokens share,
/// and the route of that expert.
pub fn gate<D: Hold, T: Tape<f32, D>>(logits: Matrix<D, T>) -> Result<Weighted<D, T>, D::Err> {
    let (logits, tape) = logits.split_tape();
    let shape = logits.shape();
    let weights: Vec<f32> = logits.on_host()?.iter().map(|z| sigmoid(*z)).collect();
    let (rows, slots) = ((0..shape.0).collect(), vec![0; shape.0]);
    let route = Route { expert: 0, rows, slots, weights: weights.clone() };
    let y = logits.beside(logits.device().upload(weights.clone(), shape)?, shape)?;
    let weights = record(tape, [logits.name()], y, move |g| {
        let g = D::download(&g)?.into_iter().zip(&weights);
        let gradient = g.map(|(g, weight)| g * weight * (1.0 - weight)).collect();
        Ok([logits.device().upload(gradient, shape)?])
    });
    Ok((weights, [route].into()))
}

/// The divisor of the scores of the `chosen` experts.
fn sum_of(scores: &[f32], chosen: &[usize], scoring: Scoring) -> f32 {
    // The constant of DeepSeek, far below any softmax.
    const LEAST: f32 = 1e-20;
    match scoring.normalised {
        true => chosen.iter().map(|expert| scores[*expert]).sum::<f32>() + LEAST,
        false => 1.0,
    }
}

/// The experts of a token.
fn chosen_of(
    scores: &[f32],
    active: usize,
    groups: Option<Groups>,
    correction: Option<&[f32]>,
) -> Vec<usize> {
    let mut scores = scores.to_vec();
    scores.iter_mut().zip(correction.unwrap_or_default()).for_each(|(score, add)| *score += add);
    if let Some(Groups { count, active }) = groups {
        let size = scores.len() / count;
        let best = |group: &[f32]| highest(group, 2).into_iter().map(|i| group[i]).sum();
        let of_groups: Vec<f32> = scores.chunks(size).map(best).collect();
        let left = highest(&of_groups, active);
        let mut groups = scores.chunks_mut(size).enumerate();
        let others = groups.by_ref().filter(|(group, _)| !left.contains(group));
        others.for_each(|(_, scores)| scores.fill(f32::NEG_INFINITY));
    }
    highest(&scores, active)
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

/// Replaces the logits of a token by their softmax.
fn softmax(logits: &mut [f32]) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter_mut().for_each(|z| *z = (*z - most).exp());
    let sum: f32 = logits.iter().sum();
    logits.iter_mut().for_each(|p| *p /= sum);
}

/// The indices of the highest scores, from the highest on; of equal scores the first.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(count);
    order
}

/// The routes of the `chosen` experts of each token.
fn routes(chosen: &[usize], weights: &[f32], (experts, active): (usize, usize)) -> Arc<[Route]> {
    let mut of_experts = vec![(Vec::new(), Vec::new(), Vec::new()); experts];
    for (place, (expert, weight)) in chosen.iter().zip(weights).enumerate() {
        let (rows, slots, weights) = &mut of_experts[*expert];
        rows.push(place / active);
        slots.push(place % active);
        weights.push(*weight);
    }
    let routes = of_experts.into_iter().enumerate();
    let routes = routes.filter(|(_, (rows, ..))| !rows.is_empty());
    let route = |(expert, (rows, slots, weights)): (usize, (Vec<usize>, _, _))| Route {
        expert,
        rows: rows.into(),
        slots,
        weights,
    };
    routes.map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix};
    use dfdx::tensor::Cpu;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let correction: Vec<f32> = (0..8).map(|i| 0.1 * (i * 3 % 8) as f32).collect();
        for (normalised, scale) in [(false, 1.0), (true, 1.0), (true, 2.5), (false, 0.5)] {
            let softmax = Scoring { scale, ..Scoring::softmax(normalised) };
            check!(|device: D| [(5, 7)], |[x]| Ok(route(x, 3, softmax, None)?.0));
            let groups = Some(Groups { count: 4, active: 2 });
            let sigmoid = Scoring { score: Score::Sigmoid, groups, ..softmax };
            let correction = Some(&correction[..]);
            check!(|device: D| [(5, 8)], |[x]| Ok(route(x, 3, sigmoid, correction)?.0));
        }
        check!(|device: D| [(5, 1)], |[x]| Ok(gate(x)?.0));
    }

    #[test]
    fn tokens_go_to_the_experts_with_the_highest_scores() {
        let ln = |x: f32| x.ln();
        // The second token has the same score for all experts.
        let logits = vec![ln(1.0), ln(6.0), ln(3.0), 0.5, 0.5, 0.5];
        let of = |scoring| {
            let logits: Matrix<Cpu> = matrix(logits.clone(), (2, 3));
            route(logits, 2, scoring, None).unwrap()
        };
        let close = |found: &[f32], expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        };
        let (weights, routes) = of(Scoring::softmax(false));
        close(&weights.to_vec(), &[0.6, 0.3, 1.0 / 3.0, 1.0 / 3.0]);
        let places: Vec<_> =
            routes.iter().map(|of| (of.expert, of.rows.to_vec(), of.slots.clone())).collect();
        let expected = [(0, vec![1], vec![0]), (1, vec![0, 1], vec![0, 1]), (2, vec![0], vec![1])];
        assert_eq!(places, expected);
        close(&routes[1].weights, &[0.6, 1.0 / 3.0]);
        assert_eq!(routes[1].places(2).collect::<Vec<_>>(), [0, 3]);
        close(&of(Scoring::softmax(true)).0.to_vec(), &[2.0 / 3.0, 1.0 / 3.0, 0.5, 0.5]);
    }

    #[test]
    fn groups_and_correction_choose_and_do_not_weigh() {
        let choose = |correction: Option<&[f32]>, groups| {
            chosen_of(&[0.9, 0.1, 0.6, 0.5, 0.3, 0.8], 2, groups, correction)
        };
        assert_eq!(choose(None, None), [0, 5]);
        // Of the groups the sums are 1.0, 1.1 and 1.1: the first of the highest.
        let groups = Some(Groups { count: 3, active: 1 });
        assert_eq!(choose(None, groups), [2, 3]);
        assert_eq!(choose(Some(&[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), groups), [1, 0]);
        let scoring =
            Scoring { score: Score::Sigmoid, scale: 2.0, groups: None, ..Scoring::softmax(false) };
        let logits: Matrix<Cpu> = matrix(vec![0.0, 3f32.ln(), -9.0], (1, 3));
        let (weights, routes) = route(logits, 1, scoring, Some(&[9.0, 0.0, 0.0])).unwrap();
        assert_eq!((weights.to_vec(), routes[0].expert), (vec![1.0], 0));
    }
}
