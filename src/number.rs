//! Numbers: in JSON, where what is not finite is `null`, and in percent.

use serde::{Deserialize, Deserializer};

/// A number; not a number where JSON says `null`.
pub(crate) fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// [`or_nan`] of a key that may be left out.
pub(crate) fn some_or_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    or_nan(deserializer).map(Some)
}

/// A ratio in percent, as a headline has it: with the digits that tell it from nothing and from all.
pub(crate) fn rounded(ratio: f64) -> String {
    let percent = 100.0 * ratio;
    let shown = |digits: usize| {
        let shown = format!("{percent:.digits$}");
        if digits == 0 { shown } else { shown.trim_end_matches('0').trim_end_matches('.').into() }
    };
    let tells = |text: &String| ["0", "-0", "100"].iter().all(|end| text != end);
    let exact = percent == 0.0 || percent == 100.0;
    let text = (1..=12).map(shown).find(|text| exact || tells(text));
    format!("{}%", text.unwrap_or_else(|| shown(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_neither_nothing_nor_all() {
        for (ratio, shown) in [
            (0.0, "0%"),
            (1.0, "100%"),
            (0.5, "50%"),
            (0.499_98, "50%"),
            (1.0 / 3.0, "33.3%"),
            (0.999, "99.9%"),
            (0.9996, "99.96%"),
            (0.999_999, "99.9999%"),
            (0.000_01, "0.001%"),
            (0.1, "10%"),
        ] {
            assert_eq!(rounded(ratio), shown);
        }
    }
}
