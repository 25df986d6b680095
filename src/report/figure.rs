//! Formats numbers for readers.

use bytesize::ByteSize;

/// A number with four significant digits; very large and very small ones with a power of ten.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "not a number".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "infinite".into() } else { "−infinite".into() };
    }
    let size = value.abs();
    let text = if size == 0.0 {
        "0".into()
    } else if !(1e-3..1e5).contains(&size) {
        power(value)
    } else {
        let decimals = (3.0 - size.log10().floor()).max(0.0) as usize;
        format!("{value:.decimals$}")
    };
    text.replace('-', "−")
}

/// A number with its standard error, where that is known, to as many decimals.
pub(super) fn uncertain(value: f64, error: Option<f64>) -> String {
    let shown = number(value);
    let Some(error) = error else { return shown };
    let decimals = match shown.split_once('.') {
        _ if shown.contains('×') => return format!("{shown} ± {}", number(error)),
        Some((_, decimals)) => decimals.len(),
        None => 0,
    };
    format!("{shown} ± {error:.decimals$}")
}

/// Formats a number as a factor and a power of ten, `1.25 × 10⁻⁷`.
fn power(value: f64) -> String {
    let text = format!("{value:.2e}");
    let Some((factor, exponent)) = text.split_once('e') else { return text };
    format!("{factor} × {}", ten_to(exponent))
}

/// A power of ten, `10⁻⁷`.
pub(super) fn ten_to(exponent: &str) -> String {
    let raised = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        _ => c.to_digit(10).and_then(|d| char::from_u32('⁰' as u32 + d)).unwrap_or(c),
    };
    format!("10{}", exponent.chars().map(raised).collect::<String>())
}

/// A fraction in percent.
pub(super) fn percent(fraction: f64) -> String {
    match fraction.is_finite() {
        true => format!("{:.2}%", 100.0 * fraction),
        false => number(fraction),
    }
}

/// Relative change of a value in percent, with its sign.
pub(super) fn change(before: f64, after: f64) -> String {
    let change = after / before - 1.0;
    match change.is_finite() {
        true => format!("{:+.1}%", 100.0 * change).replace('-', "−"),
        false => "–".into(),
    }
}

/// Formats a factor.
pub(super) fn times(factor: f64) -> String {
    match factor.is_finite() {
        true => format!("{factor:.2}"),
        false => "–".into(),
    }
}

/// Formats a count with digits in groups of three.
pub(super) fn count(count: impl TryInto<u64>) -> String {
    let digits = count.try_into().unwrap_or(u64::MAX).to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes, in units of powers of 1000.
pub(super) fn bytes(bytes: u64) -> String {
    ByteSize(bytes).display().si().to_string()
}

/// Formats a duration.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return number(seconds);
    }
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{:.1} s", seconds.max(0.0)),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// Formats a large number of operations.
pub(super) fn operations(number: f64) -> String {
    match number {
        n if n < 1e12 => format!("{:.1} GFLOP", n / 1e9),
        n if n < 1e15 => format!("{:.1} TFLOP", n / 1e12),
        n => format!("{:.1} PFLOP", n / 1e15),
    }
}

/// Formats a ratio in percent, with enough digits to tell it from 0% and from 100%.
pub(crate) fn headline(ratio: f64) -> String {
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
    fn numbers_have_four_digits() {
        for (value, expected) in [
            (24.9412, "24.94"),
            (477.34, "477.3"),
            (12_345.6, "12346"),
            (0.012_345, "0.01235"),
            (-0.5, "−0.5000"),
            (0.0, "0"),
            (1.253e-7, "1.25 × 10⁻⁷"),
            (2.5e12, "2.50 × 10¹²"),
            (f64::NAN, "not a number"),
            (f64::INFINITY, "infinite"),
        ] {
            assert_eq!(number(value), expected);
        }
    }

    #[test]
    fn errors_have_the_decimals_of_their_values() {
        for (value, of, expected) in [
            (24.9412, 0.312, "24.94 ± 0.31"),
            (24.9412, 0.0001, "24.94 ± 0.00"),
            (477.34, 12.34, "477.3 ± 12.3"),
            (12_345.6, 99.6, "12346 ± 100"),
            (1.253e-7, 1e-8, "1.25 × 10⁻⁷ ± 1.00 × 10⁻⁸"),
        ] {
            assert_eq!(uncertain(value, Some(of)), expected);
        }
        assert_eq!(uncertain(24.9412, None), "24.94");
    }

    #[test]
    fn the_rest_is_readable() {
        assert_eq!(count(1_234_567_usize), "1,234,567");
        assert_eq!(count(123_usize), "123");
        assert_eq!(duration(3.0517), "3.1 s");
        assert_eq!(duration(59.97), "1 min 0 s");
        assert_eq!(duration(11_550.0), "3 h 12 min");
        assert_eq!(change(2.0, 1.0), "−50.0%");
        assert_eq!(change(0.0, 0.0), "–");
        assert_eq!(times(f64::INFINITY), "–");
        assert_eq!(percent(0.5), "50.00%");
        assert_eq!(operations(2.5e13), "25.0 TFLOP");
    }

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
            assert_eq!(headline(ratio), shown);
        }
    }
}
