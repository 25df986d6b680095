//! Output errors of groups, relative to the errors before a stage.

use serde::{Deserialize, Serialize};

use crate::{
    executor::Loss,
    executor::or_nan,
    prune::{GroupReport, StageReport, place},
};

/// Output errors of groups after a stage, each relative to the group's error before it. Raw errors
/// differ between layers by orders of magnitude, so a sum of them would show only the largest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    /// Mean ratio over the groups.
    #[serde(deserialize_with = "or_nan")]
    pub mean: f64,
    /// Largest ratio.
    #[serde(deserialize_with = "or_nan")]
    pub worst: f64,
    /// Decoder layer of the group with the largest ratio.
    pub layer: usize,
    /// Name of the group with the largest ratio.
    pub group: String,
    /// Mean ratio on the held-out samples, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
}

impl OutputError {
    /// Errors after all stages, relative to the initial mask.
    pub fn of(groups: &[GroupReport]) -> Option<Self> {
        Self::between(groups.iter().filter_map(|group| Some((group, group.errors()?))))
    }

    /// Errors after one stage, relative to the errors before it.
    pub fn of_stage(groups: &[GroupReport], stage: usize) -> Option<Self> {
        let of = |group: &GroupReport| {
            let StageReport { before, after, .. } = group.stages.get(stage)?;
            Some([*before, *after])
        };
        Self::between(groups.iter().filter_map(|group| Some((group, of(group)?))))
    }

    /// Place of the largest ratio, such as `layer 3's mlp`.
    pub fn worst_place(&self) -> String {
        place(self.layer, &self.group)
    }

    /// `None` if no group had an error before.
    fn between<'a>(groups: impl Iterator<Item = (&'a GroupReport, [Loss; 2])>) -> Option<Self> {
        let (mut quotients, mut held_out) = (Vec::new(), Vec::new());
        for (group, [before, after]) in groups {
            let quotient = |before: f64, after: f64| {
                (before != after || before != 0.0).then(|| after / before)
            };
            quotients.extend(quotient(before.calibration, after.calibration).map(|of| (of, group)));
            let both = before.held_out.zip(after.held_out);
            held_out.extend(both.and_then(|(before, after)| quotient(before, after)));
        }
        let (worst, group) = quotients.iter().max_by(|(a, _), (b, _)| a.total_cmp(b))?;
        let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
        Some(Self {
            mean: mean(&quotients.iter().map(|(of, _)| *of).collect::<Vec<_>>()),
            worst: *worst,
            layer: group.layer,
            group: group.group.clone(),
            held_out: (!held_out.is_empty()).then(|| mean(&held_out)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn groups(errors: &[(f64, f64)]) -> Vec<GroupReport> {
        let loss = |calibration| Loss { calibration, held_out: Some(2.0 * calibration) };
        let group = |(layer, (before, after)): (usize, &(f64, f64))| GroupReport {
            layer,
            group: "mlp".into(),
            stages: vec![StageReport {
                stage: "swap".into(),
                before: loss(*before),
                after: loss(*after),
                accepted: true,
                matrices: Vec::new(),
                scores: None,
            }],
        };
        errors.iter().enumerate().map(group).collect()
    }

    #[test]
    fn a_large_group_does_not_decide() {
        // The sum of the errors falls by 78%, and most groups get worse.
        let groups = groups(&[(1000.0, 200.0), (1.0, 1.5), (10.0, 11.0), (0.0, 0.0)]);
        let found = OutputError::of(&groups).unwrap();
        assert!((found.mean - (0.2 + 1.5 + 1.1) / 3.0).abs() < 1e-12);
        assert_eq!((found.worst, found.layer, &*found.group), (1.5, 1, "mlp"));
        assert!((found.held_out.unwrap() - found.mean).abs() < 1e-12);
        assert_eq!(OutputError::of_stage(&groups, 0), Some(found));
        assert_eq!(OutputError::of_stage(&groups, 1), None);
        assert_eq!(OutputError::of(&[]), None);
        assert_eq!(OutputError::of(&self::groups(&[(0.0, 0.0)])), None);
        assert_eq!(OutputError::of(&self::groups(&[(0.0, 1.0)])).unwrap().worst, f64::INFINITY);
    }

    proptest! {
        #[test]
        fn the_scale_of_a_group_does_not_matter(
            errors in prop::collection::vec((1e-3..1e3, 1e-3..1e3), 1..9),
            at in 0..9_usize,
        ) {
            let errors: Vec<(f64, f64)> = errors;
            let mut scaled = errors.clone();
            let at = at % errors.len();
            scaled[at] = (1024.0 * errors[at].0, 1024.0 * errors[at].1);
            let [found, scaled] =
                [errors, scaled].map(|errors| OutputError::of(&groups(&errors)).unwrap());
            prop_assert_eq!(found.mean, scaled.mean);
            prop_assert_eq!((found.worst, found.layer), (scaled.worst, scaled.layer));
        }
    }
}
