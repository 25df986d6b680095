//! Estimates the remaining time of a run.
//!
//! Phases of the same kind take time in proportion to their work. The dense model's evaluation
//! comes first, and gives the pace of later ones. A kind that has not run yet is assumed to have
//! the mean pace of all phases so far, until its own first step.

use std::time::{Duration, Instant};

use crate::run::ScheduledPhase;

/// The finished, current and scheduled phases of a run.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// Phases that have not begun.
    ahead: Vec<ScheduledPhase>,
    current: Option<Current>,
    /// Kind, work and seconds of finished phases.
    done: Vec<(String, f64, f64)>,
}

/// The current phase.
#[derive(Debug)]
struct Current {
    phase: ScheduledPhase,
    began: Instant,
    /// Fraction that was done before the phase began, in a resumed run.
    from: f64,
    /// Fraction that was done at the last step, at the time `at`.
    fraction: f64,
    at: Instant,
}

/// Seconds after the start of a phase in which steps count as done before.
const SETTLING: f64 = 0.05;
/// Weight of other phases' pace, as a fraction of a phase, against the phase's own steps.
const PRIOR: f64 = 0.05;

impl Clock {
    /// Sets the scheduled phases; the current one continues.
    pub(super) fn expect(&mut self, phases: &[ScheduledPhase]) {
        self.ahead = phases.to_vec();
    }

    /// Begins a phase, and drops the scheduled phases before it.
    pub(super) fn begin(&mut self, name: &str, now: Instant) {
        self.end(now);
        let phase = match self.ahead.iter().position(|phase| phase.name == name) {
            Some(i) => self.ahead.drain(..=i).next_back(),
            None => None,
        };
        let unknown = || ScheduledPhase { name: name.into(), kind: name.into(), work: 0.0 };
        let phase = phase.unwrap_or_else(unknown);
        self.current = Some(Current { phase, began: now, from: 0.0, fraction: 0.0, at: now });
    }

    /// Sets the finished fraction of the current phase; repeated values are ignored.
    pub(super) fn step(&mut self, fraction: f64, now: Instant) {
        if let Some(current) = self.current.as_mut().filter(|current| current.fraction != fraction)
        {
            if seconds(current.began, now) < SETTLING {
                current.from = fraction;
            }
            (current.fraction, current.at) = (fraction, now);
        }
    }

    /// Ends the current phase.
    fn end(&mut self, now: Instant) {
        if let Some(Current { phase, began, from, .. }) = self.current.take()
            && phase.work > 0.0
        {
            self.done.push((phase.kind, (1.0 - from) * phase.work, seconds(began, now)));
        }
    }

    /// The remaining time of all phases; `None` if it cannot be estimated yet.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let mut left = 0.0;
        let mut measured = self.done.clone();
        if let Some(Current { phase, began, from, fraction, at }) = &self.current {
            let (done, spent) = (fraction - from, seconds(*began, *at));
            let whole = match self.pace(&measured, &phase.kind).filter(|_| phase.work > 0.0) {
                // The phase's own steps, blended with the pace of other phases.
                Some(pace) => (spent + PRIOR * pace * phase.work) / (done + PRIOR),
                None if done > 0.0 => spent / done,
                None => return None,
            };
            left += ((1.0 - fraction) * whole - seconds(*at, now)).max(0.0);
            measured.push((phase.kind.clone(), phase.work, whole));
        }
        for phase in &self.ahead {
            left += self.pace(&measured, &phase.kind)? * phase.work;
        }
        Some(Duration::from_secs_f64(left))
    }

    /// Seconds per unit of work of a kind; of all kinds if it has not run yet.
    fn pace(&self, measured: &[(String, f64, f64)], kind: &str) -> Option<f64> {
        let pace = |own: &dyn Fn(&str) -> bool| {
            let own = measured.iter().filter(|(kind, ..)| own(kind));
            let (work, seconds) = own
                .fold((0.0, 0.0), |(work, all), (_, more, seconds)| (work + more, all + seconds));
            (work > 0.0).then_some(seconds / work)
        };
        pace(&|of| of == kind).or_else(|| pace(&|_| true))
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

/// A duration, rounded to the precision of an estimate.
pub(super) fn about(left: Duration) -> String {
    let seconds = left.as_secs_f64();
    match seconds {
        s if s < 10.0 => "a few seconds".into(),
        s if s < 57.5 => format!("{:.0} s", (s / 5.0).round() * 5.0),
        s if s < 3570.0 => format!("{:.0} min", s / 60.0),
        s => {
            // Rounded to ten minutes.
            let tens = (s / 600.0).round() as u64;
            let (hours, minutes) = (tens / 6, tens % 6 * 10);
            match (hours, minutes) {
                (48.., _) => format!("{:.0} days", s / 86_400.0),
                (_, 0) => format!("{hours} h"),
                _ => format!("{hours} h {minutes} min"),
            }
        }
    }
}

/// The forecast of a run's time, in words.
pub(in crate::cli) fn on_this_machine(time: Duration) -> String {
    if time.is_zero() {
        return "as long as copying the weights on this machine".into();
    }
    let time = about(time);
    let about = if time.starts_with(|c: char| c.is_ascii_digit()) { "about " } else { "" };
    format!("{about}{time} on this machine")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(name: &str, kind: &str, work: f64) -> ScheduledPhase {
        ScheduledPhase { name: name.into(), kind: kind.into(), work }
    }

    /// A run whose kinds have these seconds for a unit of work, watched in steps of a tenth: the
    /// estimates and the truth, with the phase that they are made in.
    fn watched(
        phases: &[ScheduledPhase],
        pace: impl Fn(&str) -> f64,
    ) -> Vec<(String, Option<f64>, f64)> {
        let mut clock = Clock::default();
        let start = Instant::now();
        let all: f64 = phases.iter().map(|phase| phase.work * pace(&phase.kind)).sum();
        let (mut passed, mut found) = (0.0, Vec::new());
        clock.expect(phases);
        for phase in phases {
            let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
            clock.begin(&phase.name, at(passed));
            let took = phase.work * pace(&phase.kind);
            for step in 0..10 {
                clock.step(f64::from(step) / 10.0, at(passed + took * f64::from(step) / 10.0));
                // Somewhere before the next step.
                for more in [0.0, 0.09] {
                    let now = passed + took * (f64::from(step) / 10.0 + more);
                    let left = clock.left(at(now)).map(|left| left.as_secs_f64());
                    found.push((phase.name.clone(), left, all - now));
                }
            }
            passed += took;
        }
        clock.end(start + Duration::from_secs_f64(passed));
        assert_eq!(clock.left(start + Duration::from_secs_f64(passed)), Some(Duration::ZERO));
        found
    }

    fn run() -> Vec<ScheduledPhase> {
        vec![
            phase("dense, a", "a", 10.0),
            phase("initial masks", "initial masks", 40.0),
            phase("initial masks, a", "a", 10.0),
            phase("refinement", "refinement", 80.0),
            phase("refined, a", "a", 10.0),
        ]
    }

    #[test]
    fn where_all_work_is_equally_fast_the_estimate_is_exact() {
        let found = watched(&run(), |_| 0.7);
        let (first, rest) = found.split_at(2);
        assert!(first.iter().all(|(_, left, _)| left.is_none()), "{first:?}");
        for (name, left, truth) in rest {
            assert!((left.unwrap() - truth).abs() < 1e-6, "{name}: {left:?} {truth}");
        }
    }

    #[test]
    fn a_slower_kind_is_known_from_its_first_step_on() {
        // The refinement has other work than matrix products.
        let found = watched(&run(), |kind| if kind == "refinement" { 2.0 } else { 1.0 });
        for (name, left, truth) in &found[2..] {
            // Before it, it is thought to be as fast as the rest.
            assert!((left.unwrap() / truth - 1.0).abs() < 0.6, "{name}: {left:?} {truth}");
        }
        let later = found.iter().filter(|(name, ..)| name == "refined, a");
        later.for_each(|(_, left, truth)| assert!((left.unwrap() - truth).abs() < 1e-6));
        let refinement: Vec<_> = found.iter().filter(|(name, ..)| name == "refinement").collect();
        for (from, off) in [(2, 0.2), (6, 0.1)] {
            for (_, left, truth) in &refinement[from..] {
                assert!((left.unwrap() / truth - 1.0).abs() < off, "{left:?} {truth}");
            }
        }
    }

    #[test]
    fn phases_that_do_not_come_are_not_waited_for() {
        let mut clock = Clock::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        clock.begin("download", start);
        assert_eq!(clock.left(at(1)), None);
        clock.step(0.5, at(2));
        assert_eq!(clock.left(at(2)), Some(Duration::from_secs(2)));
        clock.expect(&run());
        clock.begin("initial masks", at(4));
        clock.step(0.5, at(24));
        assert_eq!(clock.left(at(24)), Some(Duration::from_secs(120)));
        clock.begin("refined, a", at(44));
        assert_eq!(clock.left(at(44)), Some(Duration::from_secs(10)));
        // And one that takes longer than it should has no time left, rather than less.
        assert_eq!(clock.left(at(99)), Some(Duration::ZERO));
    }

    #[test]
    fn what_was_done_before_took_no_time() {
        let mut clock = Clock::default();
        let start = Instant::now();
        clock.expect(&[phase("refinement", "refinement", 8.0)]);
        clock.begin("refinement", start);
        clock.step(0.5, start);
        assert_eq!(clock.left(start), None);
        clock.step(0.75, start + Duration::from_secs(10));
        let left = clock.left(start + Duration::from_secs(11));
        assert_eq!(left, Some(Duration::from_secs(9)));
    }

    #[test]
    fn durations_are_as_precise_as_estimates() {
        let shown = [3, 12, 57, 58, 100, 3569, 3599, 4000, 7300, 172_000, 172_800, 1_000_000]
            .map(|s| about(Duration::from_secs(s)));
        let expected = [
            "a few seconds",
            "10 s",
            "55 s",
            "1 min",
            "2 min",
            "59 min",
            "1 h",
            "1 h 10 min",
            "2 h",
            "47 h 50 min",
            "2 days",
            "12 days",
        ];
        assert_eq!(shown, expected);
        let forecast = [0, 3, 840].map(|s| on_this_machine(Duration::from_secs(s)));
        let expected = [
            "as long as copying the weights on this machine",
            "a few seconds on this machine",
            "about 14 min on this machine",
        ];
        assert_eq!(forecast, expected);
    }
}
