//! `N:M`: N of every M consecutive inputs of a row are kept, 0 < N < M.

use super::{Kind, Numbers, ParsePatternError, Tile};

pub(super) static N_OF_M: Kind = Kind {
    form: "N:M, such as `2:4`",
    help: "so that N of every M consecutive inputs of a row are kept",
    examples: &["2:4", "4:8"],
    regex: Some("^0*[1-9][0-9]*:0*[1-9][0-9]*$"),
    read: |text| text.split_once(':').map(|parts| read(text, parts)),
    write: |[n, m], f| write!(f, "{n}:{m}"),
    tile: |[n, m], _| Some(Tile { n, m }),
    ratio: |[n, m]| Some(1.0 - n as f64 / m as f64),
};

fn read(text: &str, (n, m): (&str, &str)) -> Numbers {
    let number = |part: &str| {
        // `parse` would allow a sign.
        let digits = part.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten().ok_or_else(|| {
            ParsePatternError(format!("`{part}` in the pattern `{text}` is not a whole number"))
        })
    };
    let (n, m) = (number(n)?, number(m)?);
    if !(0 < n && n < m) {
        return Err(ParsePatternError(format!(
            "`{n}:{m}` keeps {n} of {m} weights: a pattern N:M needs 0 < N < M"
        )));
    }
    Ok([n, m])
}
