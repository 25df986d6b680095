//! Indices of structures as ranges: a model has hundreds of thousands of channels.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Indices in ascending order, held and written as ranges: `0-3, 7`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Indices(
    /// The first and the last index of each range.
    Vec<[usize; 2]>,
);

impl Indices {
    /// The indices below `end`. A text from outside may have any others.
    pub fn below(&self, end: usize) -> impl Iterator<Item = usize> {
        self.0.iter().flat_map(move |[first, last]| *first..end.min(last.saturating_add(1)))
    }
}

impl FromIterator<usize> for Indices {
    /// Indices in ascending order.
    fn from_iter<I: IntoIterator<Item = usize>>(indices: I) -> Self {
        let mut ranges: Vec<[usize; 2]> = Vec::new();
        for index in indices {
            match ranges.last_mut() {
                Some([_, last]) if *last + 1 == index => *last = index,
                _ => ranges.push([index; 2]),
            }
        }
        Self(ranges)
    }
}

impl fmt::Display for Indices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, [first, last]) in self.0.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Indices {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut ranges: Vec<[usize; 2]> = Vec::new();
        for range in text.split(',').map(str::trim).filter(|_| !text.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.parse::<usize>().ok();
            let found = number(first).zip(number(last)).filter(|(first, last)| {
                first <= last && ranges.last().is_none_or(|[_, before]| before < first)
            });
            let (first, last) = found
                .ok_or_else(|| format!("`{range}` is no number or range, such as 0-3, in order"))?;
            ranges.push([first, last]);
        }
        Ok(Self(ranges))
    }
}

impl TryFrom<String> for Indices {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Indices> for String {
    fn from(indices: Indices) -> Self {
        indices.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn indices_are_read_as_they_are_written(
            all in prop::collection::btree_set(0_usize..40, 0..30),
        ) {
            let indices: Indices = all.iter().copied().collect();
            prop_assert!(indices.below(40).eq(all.iter().copied()));
            prop_assert!(indices.below(7).eq(all.into_iter().filter(|i| *i < 7)));
            prop_assert_eq!(indices.to_string().parse(), Ok(indices));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9, -]{0,12}") {
            let read = text.parse::<Indices>();
            prop_assert!(read.is_err() || read.is_ok_and(|of| of.below(1000).is_sorted()));
        }
    }

    #[test]
    fn ranges_are_short() {
        let indices: Indices = [0, 1, 2, 5, 7, 8].into_iter().collect();
        assert_eq!(indices.to_string(), "0-2, 5, 7-8");
        assert_eq!(Indices::default().to_string(), "");
        let all = format!("0-{}", usize::MAX).parse::<Indices>().unwrap();
        assert!(all.below(3).eq(0..3));
        for wrong in ["3-1", "1, 1", "2, 1", "x", "0-99999999999999999999", "1-", ","] {
            assert!(wrong.parse::<Indices>().is_err(), "{wrong}");
        }
    }
}
