//! The look of series: each has a colour for light pages, one for dark pages, a dash and a marker,
//! so that it can be told apart without colour.
//!
//! Charts are drawn in the light colours; the style sheet says what each becomes on a dark page.

use std::fmt::Write;

use plotters::style::RGBColor;

/// The marker of a series' points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marker {
    Circle,
    Triangle,
    Square,
    Diamond,
    Cross,
}

/// The look of a series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Look {
    pub(super) colour: RGBColor,
    pub(super) dark: RGBColor,
    /// The value of `stroke-dasharray`.
    pub(super) dash: &'static str,
    pub(super) marker: Marker,
}

const fn look(colour: [u8; 3], dark: [u8; 3], dash: &'static str, marker: Marker) -> Look {
    let ([r, g, b], [x, y, z]) = (colour, dark);
    Look { colour: RGBColor(r, g, b), dark: RGBColor(x, y, z), dash, marker }
}

/// The looks, in the order in which series take them.
pub(super) const LOOKS: [Look; 8] = [
    look([0x00, 0x63, 0xa6], [0x6c, 0xb6, 0xff], "10 7", Marker::Circle),
    look([0xc4, 0x4e, 0x00], [0xff, 0x9e, 0x57], "none", Marker::Triangle),
    look([0x00, 0x79, 0x5a], [0x4f, 0xd1, 0xa5], "3 6", Marker::Square),
    look([0xa0, 0x3c, 0x8c], [0xe7, 0x9a, 0xd8], "18 6 4 6", Marker::Diamond),
    look([0x6b, 0x52, 0x00], [0xe0, 0xc0, 0x6c], "24 8", Marker::Cross),
    look([0x55, 0x55, 0x5e], [0xb8, 0xb8, 0xc4], "10 7 3 7", Marker::Circle),
    look([0x00, 0x77, 0x8f], [0x5f, 0xd0, 0xe5], "5 4", Marker::Triangle),
    look([0xb0, 0x12, 0x3b], [0xff, 0x8f, 0xa3], "14 4", Marker::Square),
];

/// Text and axes.
pub(super) const INK: Look = look([0x3a, 0x3f, 0x47], [0xc4, 0xca, 0xd4], "none", Marker::Circle);

/// Grid lines.
pub(super) const GRID: Look = look([0xdf, 0xe2, 0xe7], [0x36, 0x3b, 0x44], "none", Marker::Circle);

/// Colours of heatmap cells, from small to large values: darker on a light page, lighter on a dark
/// one.
pub(super) const HEAT: [Look; 6] = [
    look([0xd3, 0xe6, 0xf5], [0x22, 0x38, 0x4e], "none", Marker::Square),
    look([0xa6, 0xcb, 0xe8], [0x2f, 0x54, 0x76], "none", Marker::Square),
    look([0x6f, 0xa9, 0xd6], [0x41, 0x74, 0xa0], "none", Marker::Square),
    look([0x3b, 0x82, 0xbf], [0x5e, 0x98, 0xc8], "none", Marker::Square),
    look([0x15, 0x5a, 0x96], [0x8b, 0xbd, 0xe6], "none", Marker::Square),
    look([0x08, 0x30, 0x5e], [0xc9, 0xe4, 0xfb], "none", Marker::Square),
];

fn hex(RGBColor(r, g, b): RGBColor) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// The style rules of the series.
pub(super) fn css() -> String {
    let (mut dashes, mut dark) = (String::new(), String::new());
    for look in LOOKS.iter().chain([&INK, &GRID]).chain(&HEAT) {
        let (colour, on_dark) = (hex(look.colour), hex(look.dark));
        if look.dash != "none" {
            let dash = look.dash;
            let _ = write!(dashes, "polyline[stroke=\"{colour}\"]{{stroke-dasharray:{dash}}}");
        }
        for attribute in ["stroke", "fill"] {
            let _ = write!(dark, "svg [{attribute}=\"{colour}\"]{{{attribute}:{on_dark}}}");
        }
    }
    format!("{dashes}\n@media screen and (prefers-color-scheme:dark){{{dark}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contrast of two colours, as WCAG 2 defines it.
    fn contrast(one: RGBColor, other: RGBColor) -> f64 {
        let luminance = |RGBColor(r, g, b): RGBColor| {
            let linear = |c: u8| match f64::from(c) / 255.0 {
                c if c <= 0.04045 => c / 12.92,
                c => ((c + 0.055) / 1.055).powf(2.4),
            };
            0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
        };
        let (one, other) = (luminance(one), luminance(other));
        (one.max(other) + 0.05) / (one.min(other) + 0.05)
    }

    #[test]
    fn series_stand_out_and_differ_without_colour() {
        let (white, black) = (RGBColor(0xff, 0xff, 0xff), RGBColor(0x1d, 0x20, 0x26));
        for (i, look) in LOOKS.iter().enumerate() {
            assert!(contrast(look.colour, white) >= 4.5, "{look:?}");
            assert!(contrast(look.dark, black) >= 4.5, "{look:?}");
            for other in &LOOKS[..i] {
                assert!(look.dash != other.dash, "{look:?} {other:?}");
                assert!(look.colour != other.colour && look.dark != other.dark);
            }
        }
        // Each step is seen without its hue, and what is not blank on either page.
        for (i, look) in HEAT.iter().enumerate() {
            assert!(contrast(look.colour, white) >= 1.2 && contrast(look.dark, black) >= 1.2);
            for other in &HEAT[..i] {
                assert!(contrast(look.colour, other.colour) >= 1.25, "{look:?} {other:?}");
                assert!(contrast(look.dark, other.dark) >= 1.25, "{look:?} {other:?}");
            }
        }
        assert!(contrast(INK.colour, white) >= 7.0 && contrast(INK.dark, black) >= 7.0);
    }
}
