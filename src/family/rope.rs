//! Rotary position embedding and its scaling variants.
//!
//! The numbers are those of transformers 5 (`modeling_rope_utils`), computed in f32 step by step
//! where it uses f32: positions run into the thousands, and multiply the rounding errors of
//! frequencies.

use std::f64::consts::TAU;

use super::config::{Error, MOST, Object};

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
///
/// A head of `head_dim` channels is rotated as `head_dim / 2` planes, plane i by the angle
/// position · θ^(−2i/head_dim), changed by [`Scaling`]. The planes are channels i and
/// i + head_dim / 2, or 2i and 2i + 1 if they are interleaved.
///
/// ```
/// use llm_barber::family::rope::{Rope, Scaling};
///
/// let rope = Rope {
///     head_dim: 4, theta: 100.0, max_positions: 8, scaling: Scaling::Default, interleaved: false,
///     query_scaling: None,
/// };
/// assert_eq!(rope.frequencies(8), (vec![1.0, 0.1], 1.0));
/// let (cos, sin) = rope.tables(2);
/// assert_eq!(cos, [1.0, 1.0, 1f32.cos(), 0.1f32.cos()]);
/// assert_eq!(sin, [0.0, 0.0, 1f32.sin(), 0.1f32.sin()]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Number of rotated channels, the first ones of a head, which is also the width in the
    /// frequencies' exponents. If it is odd, the next channel is rotated, too.
    pub head_dim: usize,
    /// The base θ of the frequencies.
    pub theta: f64,
    /// The sequence length that the model is made for, `max_position_embeddings`.
    pub max_positions: usize,
    /// The scaling of the frequencies for longer contexts.
    pub scaling: Scaling,
    /// Whether the channels of a plane are neighbours.
    pub interleaved: bool,
    /// The factor of queries, if it depends on their position.
    pub query_scaling: Option<QueryScaling>,
}

/// A factor of queries that grows with their position: 1 + β ln(1 + ⌊position / original⌋).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// β.
    pub beta: f64,
    /// The context of the first training, within which the factor is 1.
    pub original_max_positions: usize,
}

impl QueryScaling {
    /// The factor of a query at this position.
    pub fn factor(self, position: usize) -> f32 {
        let passed = (position / self.original_max_positions) as f64;
        self.beta.mul_add(passed.ln_1p(), 1.0) as f32
    }
}

/// The scaling of a [`Rope`]'s frequencies for contexts longer than the original training's.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// No scaling.
    Default,
    /// Position interpolation (arXiv 2306.15595): all frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware scaling: sequences longer than `max_positions` get a larger θ.
    Dynamic {
        /// Factor by which the context is longer.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): low frequencies divided by `factor`, high ones kept, a ramp
    /// between.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// The context of the first training.
        original_max_positions: usize,
        /// Number of rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Number of rotations over the original context below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole channels.
        truncate: bool,
        /// Factor of cosine and sine.
        attention_factor: f64,
    },
    /// LLaMA 3.1: frequencies with wavelengths beyond the original context divided by `factor`,
    /// those with short wavelengths kept, interpolated between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// The context of the first training.
        original_max_positions: usize,
        /// Number of rotations over the original context below which a frequency is divided.
        low_frequency_factor: f64,
        /// Number of rotations over the original context above which a frequency is kept.
        high_frequency_factor: f64,
    },
    /// All frequencies divided by `factor`, those of the last planes zero. The exponents use the
    /// width of the whole head.
    Proportional {
        /// The divisor.
        factor: f64,
        /// Number of planes that are rotated, the first ones.
        rotated: usize,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency.
    LongRope {
        /// The context of the first training.
        original_max_positions: usize,
        /// The divisors for sequences within that context.
        short: Vec<f64>,
        /// The divisors for longer sequences.
        long: Vec<f64>,
        /// Factor of cosine and sine.
        attention_factor: f64,
    },
}

impl Rope {
    /// Number of planes of a head that are rotated, each of two channels.
    pub const fn planes(&self) -> usize {
        self.head_dim.div_ceil(2)
    }

    /// The longest sequence, in tokens, that the model is made for: `max_position_embeddings`,
    /// times the scaling's factor, except for LongRoPE and LLaMA 3, which include it.
    pub fn longest(&self) -> usize {
        let stretched = match &self.scaling {
            Scaling::Linear { factor } | Scaling::Dynamic { factor } => {
                self.max_positions as f64 * factor
            }
            Scaling::Yarn { factor, original_max_positions, .. } => {
                *original_max_positions as f64 * factor
            }
            Scaling::Default
            | Scaling::Proportional { .. }
            | Scaling::Llama3 { .. }
            | Scaling::LongRope { .. } => 0.0,
        };
        self.max_positions.max(stretched as usize)
    }

    /// The inverse frequencies, one for each plane, and the attention factor that multiplies
    /// cosine and sine, for a sequence of the given length.
    pub fn frequencies(&self, sequence_length: usize) -> (Vec<f32>, f32) {
        match &self.scaling {
            Scaling::Default => (self.inverse(self.theta as f32), 1.0),
            Scaling::Linear { factor } => {
                let mut inverse = self.inverse(self.theta as f32);
                inverse.iter_mut().for_each(|f| *f /= *factor as f32);
                (inverse, 1.0)
            }
            Scaling::Dynamic { factor } => {
                (self.inverse(self.dynamic(sequence_length, *factor)), 1.0)
            }
            Scaling::Yarn {
                factor,
                original_max_positions,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } => {
                let (low, high) =
                    self.ramp(*original_max_positions, *beta_fast, *beta_slow, *truncate);
                let blend = |(i, power): (usize, f32)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    let divided = 1.0 / (*factor as f32 * power);
                    divided * (1.0 - kept) + 1.0 / power * kept
                };
                let powers = self.powers(self.theta as f32);
                (powers.enumerate().map(blend).collect(), *attention_factor as f32)
            }
            Scaling::Llama3 {
                factor,
                original_max_positions,
                low_frequency_factor,
                high_frequency_factor,
            } => {
                let original = *original_max_positions as f64;
                let longest = (original / low_frequency_factor) as f32;
                let shortest = (original / high_frequency_factor) as f32;
                let width = (high_frequency_factor - low_frequency_factor) as f32;
                let factor = *factor as f32;
                let mut inverse = self.inverse(self.theta as f32);
                for f in &mut inverse {
                    let wavelength = TAU as f32 / *f;
                    if wavelength > longest {
                        *f /= factor;
                    } else if wavelength >= shortest {
                        let rotations = original as f32 / wavelength;
                        let smooth = (rotations - *low_frequency_factor as f32) / width;
                        *f = (1.0 - smooth) * *f / factor + smooth * *f;
                    }
                }
                (inverse, 1.0)
            }
            Scaling::Proportional { factor, rotated } => {
                let mut inverse = self.inverse(self.theta as f32);
                inverse.iter_mut().for_each(|f| *f /= *factor as f32);
                inverse[*rotated..].fill(0.0);
                (inverse, 1.0)
            }
            Scaling::LongRope { original_max_positions, short, long, attention_factor } => {
                let divisors = if sequence_length > *original_max_positions { long } else { short };
                let powers = self.powers(self.theta as f32).zip(divisors);
                let inverse = powers.map(|(power, divisor)| 1.0 / (*divisor as f32 * power));
                (inverse.collect(), *attention_factor as f32)
            }
        }
    }

    /// The cosines and sines of every position's angles, each [sequence_length, planes] and
    /// row-major, times the attention factor.
    pub fn tables(&self, sequence_length: usize) -> (Vec<f32>, Vec<f32>) {
        let (inverse, attention_factor) = self.frequencies(sequence_length);
        let angles = (0..sequence_length)
            .flat_map(|position| inverse.iter().map(move |f| f64::from(position as f32 * f)));
        // Computed in f64 and rounded, so within half a unit in the last place of any f32 cosine.
        let scaled = |value: f64| value as f32 * attention_factor;
        angles.map(|angle| (scaled(angle.cos()), scaled(angle.sin()))).unzip()
    }

    /// θ^(2i/head_dim), for each plane i.
    fn powers(&self, theta: f32) -> impl Iterator<Item = f32> {
        let width = self.head_dim as f32;
        (0..self.head_dim)
            .step_by(2)
            .map(move |channel| power(theta, f64::from(channel as f32 / width)))
    }

    fn inverse(&self, theta: f32) -> Vec<f32> {
        self.powers(theta).map(|power| 1.0 / power).collect()
    }

    /// θ for a sequence length under [`Scaling::Dynamic`].
    fn dynamic(&self, sequence_length: usize, factor: f64) -> f32 {
        let theta = self.theta as f32;
        if sequence_length <= self.max_positions {
            return theta;
        }
        let stretch = factor as f32 * sequence_length as f32 / self.max_positions as f32;
        let exponent = self.head_dim as f64 / (self.head_dim as f64 - 2.0);
        theta * power(stretch - (factor - 1.0) as f32, exponent)
    }

    /// The planes between which [`Scaling::Yarn`] interpolates from kept to divided.
    fn ramp(&self, original: usize, beta_fast: f64, beta_slow: f64, truncate: bool) -> (f64, f64) {
        let width = self.head_dim as f64;
        let plane = |rotations: f64| {
            width * (original as f64 / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (low, high) = (plane(beta_fast), plane(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(width - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// xʸ rounded to the nearest f32; f32 functions of libraries differ in the last place.
fn power(x: f32, y: f64) -> f32 {
    f64::from(x).powf(y) as f32
}

/// A type of scaling in a `config.json`.
#[derive(Clone, Copy, Debug)]
struct Type {
    name: &'static str,
    read: fn(&Section<'_>) -> Result<Scaling, Error>,
}

static TYPES: &[Type] = &[
    Type { name: "default", read: |_| Ok(Scaling::Default) },
    Type { name: "dynamic", read: dynamic },
    Type { name: "linear", read: |section| Ok(Scaling::Linear { factor: section.factor()? }) },
    Type { name: "llama3", read: llama3 },
    Type { name: "longrope", read: longrope },
    Type { name: "proportional", read: proportional },
    Type { name: "yarn", read: yarn },
];

/// A family's settings for reading its position code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    /// The default of `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// The default of the top-level `original_max_position_embeddings`, which overrides the one in
    /// `rope_scaling`; `None` to use that one, or else `max_position_embeddings`.
    pub(super) original_max_positions: Option<usize>,
    /// Whether the last channels of a head may be unrotated (`partial_rotary_factor`).
    pub(super) partial: bool,
    /// Older names of scaling types, with the current ones.
    pub(super) renamed: &'static [(&'static str, &'static str)],
    /// The key of the rotated fraction of a head, beside the one inside `rope_scaling`, and its
    /// default.
    pub(super) fraction: (&'static str, f64),
    /// Whether the channels of a plane are neighbours.
    pub(super) interleaved: bool,
    /// Whether queries may have a factor that depends on their position (`llama_4_scaling_beta`).
    pub(super) scaled_queries: bool,
    /// The key of θ, beside the one inside `rope_scaling`, and its default.
    pub(super) theta: (&'static str, f64),
    /// The key, if there is one, and the default of θ in layers with a sliding window, if these have
    /// a position code of their own.
    pub(super) sliding_theta: Option<(Option<&'static str>, f64)>,
    /// The scaling of a configuration that has neither `rope_scaling` nor `rope_parameters`.
    pub(super) unsaid: &'static Scaling,
}

impl Style {
    /// The style of LLaMA.
    pub(super) const fn llama() -> Self {
        Self {
            max_positions: 2048,
            original_max_positions: None,
            partial: false,
            renamed: &[],
            fraction: ("partial_rotary_factor", 1.0),
            interleaved: false,
            scaled_queries: false,
            theta: ("rope_theta", 10_000.0),
            sliding_theta: None,
            unsaid: &Scaling::Default,
        }
    }
}

/// The keys of a `config.json` that describe the position code.
struct Section<'a> {
    /// `rope_scaling`, or transformers 5's `rope_parameters`, which includes θ.
    keys: &'a Object<'a>,
    /// Number of rotated channels of a head.
    rotated: usize,
    max_positions: usize,
    original_max_positions: usize,
}

impl Section<'_> {
    fn required(&self, key: &str) -> Result<f64, Error> {
        self.keys.above(key, 0.0)?.ok_or_else(|| self.keys.missing(key))
    }

    fn factor(&self) -> Result<f64, Error> {
        self.required("factor")
    }

    /// `factor`, or the ratio of the model's context to the original one.
    fn factor_or_ratio(&self) -> Result<f64, Error> {
        let ratio = self.max_positions as f64 / self.original_max_positions as f64;
        Ok(self.keys.above("factor", 0.0)?.unwrap_or(ratio))
    }

    /// A number; transformers uses the default for 0, too.
    fn beta(&self, key: &str, default: f64) -> Result<f64, Error> {
        let beta = self.keys.number(key)?.filter(|beta| *beta != 0.0).unwrap_or(default);
        if beta < 0.0 {
            return Err(self.keys.invalid(key, beta, "it must not be negative"));
        }
        Ok(beta)
    }

    fn divisors(&self, key: &str) -> Result<Vec<f64>, Error> {
        let divisors = self.keys.numbers(key)?.ok_or_else(|| self.keys.missing(key))?;
        let planes = self.rotated.div_ceil(2);
        if divisors.len() != planes {
            let found = format!("a list of {}", divisors.len());
            return Err(self.keys.invalid(key, found, format!("a head needs {planes}")));
        }
        match divisors.iter().find(|divisor| **divisor <= 0.0) {
            Some(divisor) => Err(self.keys.invalid(
                key,
                format!("a list with {divisor}"),
                "all of it must be above 0",
            )),
            None => Ok(divisors),
        }
    }
}

fn dynamic(section: &Section<'_>) -> Result<Scaling, Error> {
    let factor = section.factor()?;
    if section.rotated == 2 {
        return Err(section.keys.invalid("rope_type", "dynamic", "`head_dim` is only 2"));
    }
    Ok(Scaling::Dynamic { factor })
}

fn proportional(section: &Section<'_>) -> Result<Scaling, Error> {
    let factor = section.keys.above("factor", 0.0)?.unwrap_or(1.0);
    Ok(Scaling::Proportional { factor, rotated: section.rotated / 2 })
}

fn llama3(section: &Section<'_>) -> Result<Scaling, Error> {
    let factor = section.factor()?;
    let low_frequency_factor = section.required("low_freq_factor")?;
    let high_frequency_factor = section.required("high_freq_factor")?;
    if high_frequency_factor <= low_frequency_factor {
        return Err(section.keys.invalid(
            "high_freq_factor",
            high_frequency_factor,
            format!("it must be above `low_freq_factor`, {low_frequency_factor}"),
        ));
    }
    Ok(Scaling::Llama3 {
        factor,
        original_max_positions: section.original_max_positions,
        low_frequency_factor,
        high_frequency_factor,
    })
}

fn longrope(section: &Section<'_>) -> Result<Scaling, Error> {
    let factor = section.factor_or_ratio()?;
    let original_max_positions = section.original_max_positions;
    let attention_factor = match section.keys.number("attention_factor")? {
        Some(attention_factor) => attention_factor,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original_max_positions as f64).ln()).sqrt(),
    };
    Ok(Scaling::LongRope {
        original_max_positions,
        short: section.divisors("short_factor")?,
        long: section.divisors("long_factor")?,
        attention_factor,
    })
}

fn yarn(section: &Section<'_>) -> Result<Scaling, Error> {
    let keys = section.keys;
    // An explicit null asks for the ratio of the contexts; a missing key is an error.
    if !keys.has("factor") {
        return Err(keys.missing("factor"));
    }
    let factor = section.factor_or_ratio()?;
    let scale = |mscale: f64| yarn_scale(factor, mscale);
    let mscale = keys.number("mscale")?.filter(|mscale| *mscale != 0.0);
    let mscale_all_dim = keys.number("mscale_all_dim")?.filter(|mscale| *mscale != 0.0);
    let attention_factor = match (keys.number("attention_factor")?, mscale, mscale_all_dim) {
        (Some(attention_factor), _, _) => attention_factor,
        (None, Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
        (None, _, _) => scale(1.0),
    };
    Ok(Scaling::Yarn {
        factor,
        original_max_positions: section.original_max_positions,
        beta_fast: section.beta("beta_fast", 32.0)?,
        beta_slow: section.beta("beta_slow", 1.0)?,
        truncate: keys.boolean("truncate")?.unwrap_or(!keys.has("truncate")),
        attention_factor,
    })
}

/// The types of layers that have a position code each, by their names in `rope_parameters`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The position codes that a `config.json` describes: `rope_theta` and `rope_scaling`, or
/// transformers 5's `rope_parameters`. If layers with a sliding window have a code of their own, it
/// is the second.
pub(super) fn read(
    config: &Object<'_>,
    style: &Style,
    head_dim: usize,
) -> Result<Vec<Rope>, Error> {
    let nothing = serde_json::Map::new();
    let nothing = || Object::empty(&nothing);
    let scaling = config.object("rope_scaling")?.filter(|keys| !keys.is_empty());
    let parameters = config.object("rope_parameters")?.unwrap_or_else(nothing);
    let theta = style.theta;
    let Some(sliding_theta) = style.sliding_theta else {
        let keys = scaling.unwrap_or(parameters);
        return Ok(vec![code(config, keys, style, head_dim, (Some(theta.0), theta.1))?]);
    };
    let of = |kind| Ok::<_, Error>(parameters.object(kind)?.unwrap_or_else(nothing));
    let full = scaling.map_or_else(|| of(FULL), Ok)?;
    Ok(vec![
        code(config, full, style, head_dim, (Some(theta.0), theta.1))?,
        code(config, of(SLIDING)?, style, head_dim, sliding_theta)?,
    ])
}

/// The square of YaRN's scale for `mscale_all_dim`, by which DeepSeek multiplies the scores of
/// attention (arXiv 2309.00071, section 3.4).
pub(super) fn score_factor(config: &Object<'_>) -> Result<f64, Error> {
    let scaling = config.object("rope_scaling")?.filter(|keys| !keys.is_empty());
    let Some(keys) = scaling.or(config.object("rope_parameters")?) else { return Ok(1.0) };
    let kind = keys.string("rope_type")?.or(keys.string("type")?).unwrap_or("default");
    let all_dim = keys.number("mscale_all_dim")?.filter(|_| kind != "default");
    let factor = keys.above("factor", 0.0)?.unwrap_or(1.0);
    Ok(all_dim.map_or(1.0, |all_dim| yarn_scale(factor, all_dim).powi(2)))
}

/// The factor of cosine and sine that YaRN has for a factor of the context; 1 for an `mscale` of 0.
fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The position code of some layers, which `keys` describe. If they have no `rope_theta`, θ is the
/// configuration's value of a key, or a default.
fn code(
    config: &Object<'_>,
    keys: Object<'_>,
    style: &Style,
    head_dim: usize,
    (theta_key, default_theta): (Option<&str>, f64),
) -> Result<Rope, Error> {
    if let Some(key) = keys.nested() {
        let problem = "a position code for each type of layer is not supported";
        return Err(keys.invalid(key, "an object", problem));
    }
    let max_positions = config.size("max_position_embeddings")?.unwrap_or(style.max_positions);
    let original = "original_max_position_embeddings";
    let original = match config.size(original)?.or(style.original_max_positions) {
        Some(outside) => Some(outside),
        None => keys.size(original)?,
    };
    let theta = match keys.above("rope_theta", 0.0)? {
        Some(inside) => Some(inside),
        None => theta_key.map(|key| config.above(key, 0.0)).transpose()?.flatten(),
    };
    let (key, found) = match keys.string("rope_type")? {
        Some(name) => ("rope_type", name),
        None => ("type", keys.string("type")?.unwrap_or("default")),
    };
    let renamed = style.renamed.iter().find(|(older, _)| *older == found);
    let name = renamed.map_or(found, |(_, name)| *name);
    let Some(kind) = TYPES.iter().find(|kind| kind.name == name) else {
        return Err(keys.unknown(key, found, TYPES.iter().map(|kind| kind.name).collect()));
    };
    let partial = "partial_rotary_factor";
    let (place, partial, fraction) = match keys.number(partial)? {
        Some(inside) => (&keys, partial, inside),
        None => {
            let (partial, default) = style.fraction;
            (config, partial, config.number(partial)?.unwrap_or(default))
        }
    };
    // In families without this key, only scalings read it.
    let counts = style.partial || name != "default";
    let rotated = if counts { (head_dim as f64 * fraction) as usize } else { head_dim };
    let wrong = |problem: &str| {
        let problem = format!("it rotates {rotated} of a head's {head_dim} channels; {problem}");
        Err(place.invalid(partial, fraction, problem))
    };
    if rotated == 0 || rotated > head_dim {
        return wrong("it must be at least one, and at most all");
    }
    let original_max_positions = original.unwrap_or(max_positions);
    let section = Section { keys: &keys, rotated, max_positions, original_max_positions };
    let scaling = match keys.is_empty() {
        true => style.unsaid.clone(),
        false => (kind.read)(&section)?,
    };
    let width = match scaling {
        Scaling::Proportional { .. } => head_dim,
        _ => rotated,
    };
    if !style.partial && width.next_multiple_of(2) != head_dim {
        return wrong("this family rotates all");
    }
    let theta = theta.unwrap_or(default_theta);
    let query_scaling = if style.scaled_queries {
        let beta = keys.number("llama_4_scaling_beta")?;
        beta.map(|beta| QueryScaling { beta, original_max_positions })
    } else {
        None
    };
    let interleaved = style.interleaved;
    let rope = Rope { head_dim: width, theta, max_positions, scaling, interleaved, query_scaling };
    // Valid numbers can still overflow f32 in combination, or at a late position.
    let finite = |length| {
        let (inverse, attention_factor) = rope.frequencies(length);
        let furthest = inverse.into_iter().map(|f| f * MOST as f32);
        let factor = query_scaling.map_or(1.0, |scaling| scaling.factor(MOST));
        furthest.chain([attention_factor, factor]).all(f32::is_finite)
    };
    if !finite(1) || !finite(usize::MAX) {
        return Err(keys.invalid(key, found, "with these numbers its frequencies are not finite"));
    }
    Ok(rope)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    const STYLE: Style = Style::llama();

    fn read_one(config: &Value, style: &Style, head_dim: usize) -> Result<Rope, Error> {
        let mut ropes = read(&Object::top(config).unwrap(), style, head_dim)?;
        assert_eq!(ropes.len(), 1);
        Ok(ropes.remove(0))
    }

    fn config(keys: Value) -> Result<Rope, Error> {
        read_one(&keys, &STYLE, 16)
    }

    fn error(scaling: Value) -> String {
        config(json!({ "rope_scaling": scaling })).unwrap_err().to_string()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
    }

    fn assert_close(what: &str, ours: &[f32], theirs: &[f32], within: impl Fn(f32) -> f32) {
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            let apart = (ours - theirs).abs();
            assert!(apart <= within(*theirs), "{what}[{i}]: {ours} for {theirs}");
        }
    }

    #[test]
    fn agrees_with_transformers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rope");
        let mut files = 0;
        for file in fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let fixture: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let object = &fixture["config"];
            let head_dim = object["head_dim"].as_u64().unwrap_or(64) as usize;
            let rope = read_one(object, &STYLE, head_dim).unwrap();
            for expected in fixture["expected"].as_array().unwrap() {
                let length = expected["sequence_length"].as_u64().unwrap() as usize;
                let what = format!("{name} at {length}");
                let (inverse, attention_factor) = rope.frequencies(length);
                let frequencies = floats(&expected["inverse_frequencies"]);
                assert_close(&what, &inverse, &frequencies, |theirs| 1e-6 * theirs);
                let factor = expected["attention_factor"].as_f64().unwrap() as f32;
                assert_close(&what, &[attention_factor], &[factor], |theirs| 1e-6 * theirs);
                let (cos, sin) = rope.tables(length);
                assert_eq!(cos.len(), length * head_dim / 2);
                let last = cos.len() - head_dim / 2;
                // Where a frequency is off in its last place, so is the angle, times the position.
                let within = |_: f32| 1e-6 + 1.2e-7 * length as f32;
                assert_close(&what, &cos[last..], &floats(&expected["last_cos"]), within);
                assert_close(&what, &sin[last..], &floats(&expected["last_sin"]), within);
            }
            files += 1;
        }
        assert_eq!(files, 28);
    }

    #[test]
    fn errors_name_the_key() {
        for (scaling, message) in [
            (
                json!({"rope_type": "cubic"}),
                "unknown `rope_scaling.rope_type` \"cubic\", known: default, dynamic, linear, llama3, longrope, proportional, yarn",
            ),
            (
                json!({"type": "su"}),
                "unknown `rope_scaling.type` \"su\", known: default, dynamic, linear, llama3, longrope, proportional, yarn",
            ),
            (json!({"type": "linear"}), "missing key `rope_scaling.factor`"),
            (json!({"type": "yarn"}), "missing key `rope_scaling.factor`"),
            (
                json!({"type": "linear", "factor": "2"}),
                "`rope_scaling.factor` must be a number, found the string \"2\"",
            ),
            (
                json!({"type": "linear", "factor": 0}),
                "`rope_scaling.factor` is 0, but it must be above 0",
            ),
            (json!({"type": 3}), "`rope_scaling.type` must be a string, found 3"),
            (
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}),
                "missing key `rope_scaling.high_freq_factor`",
            ),
            (
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
                "`rope_scaling.high_freq_factor` is 1, but it must be above `low_freq_factor`, 4",
            ),
            (
                json!({"rope_type": "longrope", "short_factor": [1.0]}),
                "`rope_scaling.short_factor` is a list of 1, but a head needs 8",
            ),
            (
                json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1, 1, 1, 1, 0]}),
                "`rope_scaling.short_factor` is a list with 0, but all of it must be above 0",
            ),
            (
                json!({"rope_type": "longrope", "short_factor": ["1"]}),
                "`rope_scaling.short_factor` must be a list of numbers, found a list",
            ),
            (
                json!({"rope_type": "yarn", "factor": 2, "beta_slow": -1}),
                "`rope_scaling.beta_slow` is -1, but it must not be negative",
            ),
            (
                json!({"rope_type": "yarn", "factor": 2, "attention_factor": 1e300}),
                "`rope_scaling.rope_type` is yarn, but with these numbers its frequencies are not finite",
            ),
            (
                json!({"rope_type": "linear", "factor": 1e-38}),
                "`rope_scaling.rope_type` is linear, but with these numbers its frequencies are not finite",
            ),
            (
                json!({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}),
                "`rope_scaling.partial_rotary_factor` is 0.5, but it rotates 8 of a head's 16 channels; this family rotates all",
            ),
            (
                json!({"full_attention": {"rope_type": "default"}}),
                "`rope_scaling.full_attention` is an object, but a position code for each type of layer is not supported",
            ),
        ] {
            assert_eq!(error(scaling), format!("config.json: {message}"));
        }
        let outside = config(json!({"rope_theta": 0})).unwrap_err().to_string();
        assert_eq!(outside, "config.json: `rope_theta` is 0, but it must be above 0");
    }

    #[test]
    fn only_some_families_rotate_a_part_of_a_head() {
        let rotated = |fraction: f64, partial| {
            let keys = json!({ "partial_rotary_factor": fraction });
            let rope = read_one(&keys, &Style { partial, ..STYLE }, 16);
            rope.map(|rope| rope.planes())
        };
        assert_eq!(rotated(0.5, false), Ok(8));
        assert_eq!(rotated(1.5, false), Ok(8));
        assert_eq!(rotated(0.5, true), Ok(4));
        assert_eq!(rotated(0.45, true), Ok(4));
        for fraction in [-1.0, 0.0, 1.5] {
            let error = rotated(fraction, true).unwrap_err().to_string();
            assert!(error.contains("at least one, and at most all"), "{error}");
        }
    }

    #[test]
    fn scalings_stretch_what_the_model_is_made_for() {
        let longest = |scaling: Value| {
            config(json!({"max_position_embeddings": 64, "rope_scaling": scaling}))
                .unwrap()
                .longest()
        };
        let lists =
            json!({"type": "longrope", "short_factor": vec![1.0; 8], "long_factor": vec![4.0; 8]});
        for (scaling, tokens) in [
            (json!({}), 64),
            (json!({"type": "linear", "factor": 2}), 128),
            (json!({"type": "linear", "factor": 0.5}), 64),
            (json!({"type": "dynamic", "factor": 2.5}), 160),
            (json!({"type": "yarn", "factor": 4}), 256),
            (json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}), 64),
            (json!({"type": "linear", "factor": 1e30}), usize::MAX),
            (lists, 64),
        ] {
            let what = scaling.to_string();
            assert_eq!(longest(scaling), tokens, "{what}");
        }
    }

    #[test]
    fn only_dynamic_and_longrope_depend_on_the_length() {
        let dynamic = config(json!({
            "max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0},
        }))
        .unwrap();
        assert_eq!(dynamic.frequencies(1), dynamic.frequencies(64));
        assert_ne!(dynamic.frequencies(64), dynamic.frequencies(65));
        let linear = config(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(linear.frequencies(1), linear.frequencies(100_000));
    }

    /// Values that a hostile or broken file could hold.
    fn odd_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (0..200_i64).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0.0..50.0).prop_map(Value::from),
            prop::collection::vec(0.0..3.0, 8).prop_map(Value::from),
            prop::sample::select(TYPES).prop_map(|kind| Value::from(kind.name)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_gives_finite_tables(
            kind in prop::sample::select(TYPES),
            outside in prop::collection::btree_map(prop::sample::select(KEYS), odd_value(), 0..3),
            inside in prop::collection::btree_map(prop::sample::select(KEYS), odd_value(), 0..12),
            length in 0..300_usize,
        ) {
            let object = |keys: BTreeMap<&str, Value>| {
                keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
            };
            let mut keys: Map<String, Value> = object(outside);
            let mut scaling: Map<String, Value> = object(inside);
            scaling.insert("rope_type".to_owned(), kind.name.into());
            keys.insert("rope_scaling".to_owned(), scaling.into());
            if let Ok(rope) = config(keys.into()) {
                let (cos, sin) = rope.tables(length);
                prop_assert_eq!((cos.len(), sin.len()), (length * 8, length * 8));
                prop_assert!(cos.iter().chain(&sin).all(|value| value.is_finite()));
            }
        }
    }

    const KEYS: &[&str] = &[
        "rope_theta",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "partial_rotary_factor",
        "truncate",
        "short_factor",
        "long_factor",
    ];
}
