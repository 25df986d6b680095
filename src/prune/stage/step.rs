//! The steps of stages that work on the whole model, as reports have them.

use serde::{Deserialize, Serialize};

/// A step of a stage over the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The step, from 1; 0 is the state before the first.
    pub step: usize,
    /// The divergence on the samples of the step, before its swaps, in nats per token.
    pub calibration: Option<f64>,
    /// The divergence on the held-out samples after the step, in nats per token, where measured.
    pub held_out: Option<f64>,
    /// The fraction of the fall promised by the swaps of the step before that the samples of this
    /// step show. Below 0, those swaps were undone.
    pub kept: Option<f64>,
    /// Number of swaps of the step.
    pub swaps: usize,
    /// λ after the step; `None` of a stage that changes values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
}

impl Step {
    /// A step that changed values, and makes no swaps.
    pub(super) const fn of_values(
        step: usize,
        calibration: Option<f64>,
        held_out: Option<f64>,
    ) -> Self {
        Self { step, calibration, held_out, kept: None, swaps: 0, lambda: None }
    }

    /// The steps of each stage.
    pub fn by_stage(steps: &[Self]) -> impl Iterator<Item = &[Self]> {
        steps.chunk_by(|_, next| next.step > 0)
    }

    /// Whether the steps of a stage make swaps, and do not change values.
    pub fn are_swaps(steps: &[Self]) -> bool {
        steps.iter().any(|step| step.lambda.is_some())
    }

    /// Number of swaps that the masks have in the end, those with the lowest divergence of each stage.
    pub fn lasting(steps: &[Self]) -> usize {
        Self::by_stage(steps).map(Self::lasting_of_stage).sum()
    }

    fn lasting_of_stage(steps: &[Self]) -> usize {
        let measured = steps.iter().filter_map(|step| Some((step.held_out?, step.step)));
        let best = measured.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |(_, step)| step);
        let (mut lasting, mut last) = (0, 0);
        for Step { kept, swaps, .. } in steps.iter().filter(|step| step.step <= best) {
            // A step says whether the swaps of the one before were undone.
            if kept.is_some_and(|kept| kept < 0.0) {
                lasting -= last;
            }
            lasting += swaps;
            last = *swaps;
        }
        lasting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swaps_that_are_undone_or_come_after_the_best_masks_do_not_last() {
        let step = |step, held_out, kept, swaps| Step {
            step,
            calibration: None,
            held_out,
            kept,
            swaps,
            lambda: Some(1.0),
        };
        let mut steps = vec![
            step(0, Some(0.9), None, 0),
            step(1, None, None, 70),
            step(2, None, Some(-0.5), 50),
            step(3, Some(0.7), Some(0.5), 30),
            step(4, None, Some(-0.1), 20),
            step(5, Some(0.8), None, 10),
        ];
        assert_eq!(Step::lasting(&steps), 80);
        assert_eq!(Step::lasting(&[steps.clone(), steps.clone()].concat()), 160);
        steps[0].held_out = Some(0.6);
        assert_eq!(Step::lasting(&steps), 0);
        assert_eq!(Step::lasting(&[]), 0);
    }
}
