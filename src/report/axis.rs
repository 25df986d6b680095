//! The axis of a chart: linear or logarithmic, with ticks at round numbers.

use std::ops::Range;

use plotters::coord::ranged1d::{
    KeyPointHint, KeyPointWeight, NoDefaultFormatting, Ranged, ValueFormatter,
};

use super::figure;

/// An axis.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    /// Positions and texts of the labels.
    ticks: Vec<(f64, String)>,
}

/// Approximate number of ticks.
const TICKS: f64 = 6.0;

impl Axis {
    /// A linear axis between two finite numbers.
    pub(super) fn linear(low: f64, high: f64, label: impl Fn(f64) -> String) -> Self {
        let (low, high) = spread(low, high);
        let step = round_up((high - low) / TICKS);
        let first = (low / step).ceil();
        let count = ((high / step).floor() - first).max(0.0) as usize;
        let tick = |i: usize| {
            let value = (first + i as f64) * step;
            (value, label(value))
        };
        Self { low, high, logarithmic: false, ticks: (0..=count).map(tick).collect() }
    }

    /// An axis of indices from 0, with room for the drawing of each.
    pub(super) fn numbers(last: usize) -> Self {
        let step = round_up(last as f64 / 8.0).max(1.0) as usize;
        let ticks = (0..=last).step_by(step).map(|i| (i as f64, i.to_string())).collect();
        Self { low: -0.5, high: last as f64 + 0.5, logarithmic: false, ticks }
    }

    /// An axis of names, the first on top.
    pub(super) fn names(names: &[String]) -> Self {
        let last = names.len().saturating_sub(1) as f64;
        let ticks = names.iter().enumerate();
        let ticks = ticks.map(|(i, name)| (last - i as f64, name.clone())).collect();
        Self { low: -0.5, high: last + 0.5, logarithmic: false, ticks }
    }

    /// A logarithmic axis between two positive finite numbers.
    pub(super) fn logarithmic(low: f64, high: f64) -> Self {
        let (low, high) = (low.max(f64::MIN_POSITIVE), high.max(f64::MIN_POSITIVE));
        let (low, high) = if high > low { (low, high) } else { (low / 2.0, low * 2.0) };
        let (first, last) = (low.log10().ceil() as i32, high.log10().floor() as i32);
        let decades = last - first + 1;
        let mut ticks = Vec::new();
        if decades >= 3 {
            let step = (decades as f64 / TICKS).ceil() as usize;
            for exponent in (first..=last).step_by(step) {
                ticks.push((10_f64.powi(exponent), power(exponent)));
            }
        } else {
            // Steps within decades; within one decade, even ones.
            let inside = |value: &f64| (low..=high).contains(value);
            let steps = (first - 1..=last)
                .flat_map(|exponent| [1.0, 2.0, 5.0].map(|factor| factor * 10_f64.powi(exponent)));
            ticks.extend(steps.filter(inside).map(|value| (value, short(value))));
            if ticks.len() < 3 {
                ticks = Self::linear(low, high, short).ticks;
            }
        }
        Self { low, high, logarithmic: true, ticks }
    }

    /// Length of the longest label in characters.
    pub(super) fn label_width(&self) -> usize {
        self.ticks.iter().map(|(_, label)| label.chars().count()).max().unwrap_or(0)
    }

    /// Number of labels.
    pub(super) fn labels(&self) -> usize {
        self.ticks.len()
    }

    /// Position of a value, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| match self.logarithmic {
            true => value.max(f64::MIN_POSITIVE).log10(),
            false => value,
        };
        let (low, high) = (scale(self.low), scale(self.high));
        ((scale(value) - low) / (high - low)).clamp(0.0, 1.0)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (f64::from(to - from) * self.place(*value)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.weight() {
            KeyPointWeight::Bold => self.ticks.iter().map(|(value, _)| *value).collect(),
            KeyPointWeight::Any => Vec::new(),
        }
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        let tick = self.ticks.iter().find(|(tick, _)| tick == value);
        tick.map_or_else(String::new, |(_, label)| label.clone())
    }
}

/// A range that is not empty.
fn spread(low: f64, high: f64) -> (f64, f64) {
    let half = (low.abs() / 2.0).max(0.5);
    if high > low { (low, high) } else { (low - half, low + half) }
}

/// The next of 1, 2, 5, 10, 20, … and their tenths.
fn round_up(step: f64) -> f64 {
    if step.is_nan() || step <= 0.0 {
        return 1.0;
    }
    let unit = 10_f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|of| of * unit).find(|of| *of >= step).unwrap_or(10.0 * unit)
}

/// Formats a power of ten; written out if it is short.
fn power(exponent: i32) -> String {
    match exponent {
        -2..=4 => short(10_f64.powi(exponent)),
        _ => figure::ten_to(&exponent.to_string()),
    }
}

/// Formats a number as short as possible.
pub(super) fn short(value: f64) -> String {
    let rounded = format!("{value:.2e}").parse().unwrap_or(value);
    match (1e-3..1e5).contains(&value.abs()) || value == 0.0 {
        true => format!("{rounded}"),
        false => match format!("{rounded:e}").split_once('e') {
            Some(("1", exponent)) => figure::ten_to(exponent),
            Some((factor, exponent)) => format!("{factor}·{}", figure::ten_to(exponent)),
            None => rounded.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(
            labels(&Axis::linear(0.0, 1.0, |value| format!("{value:.1}"))),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
        assert_eq!(labels(&Axis::logarithmic(2e-4, 3.0)), ["10⁻³", "0.01", "0.1", "1"]);
        assert_eq!(labels(&Axis::logarithmic(0.8, 30.0)), ["1", "2", "5", "10", "20"]);
        assert_eq!(labels(&Axis::logarithmic(2.2, 2.9)), ["2.2", "2.4", "2.6", "2.8"]);
        assert_eq!(labels(&Axis::numbers(2)), ["0", "1", "2"]);
        assert_eq!(labels(&Axis::numbers(31)), ["0", "5", "10", "15", "20", "25", "30"]);
        assert_eq!(labels(&Axis::numbers(0)), ["0"]);
        // One value, so large that half more is the same.
        assert_eq!(Axis::linear(1e16, 1e16, short).map(&1e16, (0, 100)), 50);
    }

    proptest! {
        #[test]
        fn every_range_has_places_and_few_ticks(low in -300..300_i32, more in 0..600_i32) {
            let (low, high) = (10_f64.powi(low), 10_f64.powi((low + more).min(308)));
            for axis in [Axis::logarithmic(low, high), Axis::linear(low, high, short)] {
                prop_assert!(axis.labels() <= 14, "{axis:?}");
                for value in [low, high, 0.0, f64::MAX] {
                    let place = axis.map(&value, (0, 100));
                    prop_assert!((0..=100).contains(&place));
                }
                prop_assert_eq!(axis.map(&axis.low, (0, 100)), 0);
                prop_assert_eq!(axis.map(&axis.high, (0, 100)), 100);
            }
        }
    }
}
