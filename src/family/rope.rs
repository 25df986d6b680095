//! Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways in which `config.json`
//! scales it to longer sequences.

use std::f64::consts::PI;

use serde::Deserialize;
use serde_json::Value;

use super::Error;

/// A rotary position code.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    head_dim: usize,
    theta: f64,
    max_positions: usize,
    scaling: Scaling,
}

/// How the frequencies are scaled; the field names are those of `config.json`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
enum Scaling {
    Default,
    /// Positions divided by the factor.
    Linear {
        factor: f64,
    },
    /// NTK-aware: the base grows with the sequence beyond the trained length.
    Dynamic {
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        factor: f64,
        original_max_position_embeddings: Option<usize>,
        attention_factor: Option<f64>,
        beta_fast: Option<f64>,
        beta_slow: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: Option<bool>,
    },
    /// Low frequencies divided by the factor, high ones kept, a ramp between (LLaMA 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// A factor per frequency, of two sets by length (LongRoPE, arXiv 2402.13753).
    Longrope {
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        factor: Option<f64>,
        original_max_position_embeddings: Option<usize>,
        attention_factor: Option<f64>,
    },
}

const KNOWN: &str = "default, linear, dynamic, yarn, llama3, longrope";

impl Rope {
    /// The position code that `config.json` describes, in `rope_theta` and `rope_scaling` or in
    /// the newer `rope_parameters`.
    pub(super) fn read(
        config: &Value,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self, Error> {
        let object = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|key| config.get(key).filter(|value| !value.is_null()).map(|v| (key, v)));
        let number = |value: Option<&Value>, key: &str| match value {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| Error::Key {
                key: key.into(),
                problem: format!("must be a number, not {value}"),
            }),
        };
        let mut theta = number(config.get("rope_theta"), "rope_theta")?;
        let mut partial = number(config.get("partial_rotary_factor"), "partial_rotary_factor")?;
        let mut scaling = Scaling::Default;
        if let Some((key, value)) = object {
            let bad = |problem: String| Error::Key { key: key.into(), problem };
            let mut fields =
                value.as_object().ok_or_else(|| bad("must be an object".into()))?.clone();
            theta = number(fields.get("rope_theta"), "rope_parameters.rope_theta")?.or(theta);
            partial = number(fields.get("partial_rotary_factor"), key)?.or(partial);
            let kind = fields.remove("rope_type").or_else(|| fields.remove("type"));
            let kind = match kind {
                None | Some(Value::Null) => "default".to_owned(),
                Some(Value::String(kind)) => kind,
                Some(other) => return Err(bad(format!("rope_type must be text, not {other}"))),
            };
            if !KNOWN.split(", ").any(|known| known == kind) {
                return Err(bad(format!("rope_type `{kind}` is unknown; known: {KNOWN}")));
            }
            fields.insert("rope_type".into(), kind.into());
            // Some checkpoints give the trained length beside the object, not in it.
            if let Some(original) = config.get("original_max_position_embeddings") {
                fields
                    .entry("original_max_position_embeddings")
                    .or_insert_with(|| original.clone());
            }
            scaling =
                Scaling::deserialize(Value::Object(fields)).map_err(|e| bad(e.to_string()))?;
        }
        if partial.is_some_and(|factor| factor != 1.0) {
            return Err(Error::Key {
                key: "partial_rotary_factor".into(),
                problem: "rotating a part of the head is not supported".into(),
            });
        }
        let theta = theta.unwrap_or(10_000.0);
        let rope = Self { head_dim, theta, max_positions, scaling };
        let (frequencies, attention_factor) = rope.frequencies(max_positions.max(1));
        if frequencies.len() != head_dim / 2
            || !frequencies.iter().all(|f| f.is_finite())
            || !attention_factor.is_finite()
        {
            return Err(Error::Key {
                key: "rope_scaling".into(),
                problem: format!(
                    "must give {} finite frequencies, one per pair of a head's channels",
                    head_dim / 2
                ),
            });
        }
        Ok(rope)
    }

    fn base_frequencies(&self, theta: f64) -> Vec<f64> {
        let width = self.head_dim as f64;
        (0..self.head_dim / 2).map(|i| theta.powf(-(2.0 * i as f64) / width)).collect()
    }

    /// The inverse frequencies for a sequence of this length, [head_dim / 2], and the attention
    /// factor that multiplies cosines and sines.
    pub fn frequencies(&self, sequence_length: usize) -> (Vec<f32>, f32) {
        let base = self.base_frequencies(self.theta);
        let (frequencies, attention_factor): (Vec<f64>, f64) = match &self.scaling {
            Scaling::Default => (base, 1.0),
            Scaling::Linear { factor } => (base.into_iter().map(|f| f / factor).collect(), 1.0),
            Scaling::Dynamic { factor } => {
                let trained = self.max_positions as f64;
                let length = (sequence_length as f64).max(trained);
                let width = self.head_dim as f64;
                let growth = factor * length / trained - (factor - 1.0);
                (self.base_frequencies(self.theta * growth.powf(width / (width - 2.0))), 1.0)
            }
            Scaling::Yarn { .. } => self.yarn(&base),
            Scaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => {
                let original = *original as f64;
                let scale = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let ramp = (original / wavelength - low) / (high - low);
                        (1.0 - ramp) * f / factor + ramp * f
                    }
                };
                (base.into_iter().map(scale).collect(), 1.0)
            }
            Scaling::Longrope {
                short_factor,
                long_factor,
                factor,
                original_max_position_embeddings: original,
                attention_factor,
            } => {
                let max = self.max_positions as f64;
                let original = original.map_or(max, |n| n as f64);
                let factor = factor.unwrap_or(max / original);
                let divisors =
                    if sequence_length as f64 > original { long_factor } else { short_factor };
                let attention = attention_factor.unwrap_or(if factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + factor.ln() / original.ln()).sqrt()
                });
                (base.iter().zip(divisors).map(|(f, d)| f / d).collect(), attention)
            }
        };
        (frequencies.into_iter().map(|f| f as f32).collect(), attention_factor as f32)
    }

    fn yarn(&self, base: &[f64]) -> (Vec<f64>, f64) {
        let Scaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            truncate,
        } = &self.scaling
        else {
            return (base.to_vec(), 1.0);
        };
        let mscale_of = |scale: f64, mscale: f64| {
            if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
        };
        let attention = attention_factor.unwrap_or(match (mscale, mscale_all_dim) {
            (Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => {
                mscale_of(*factor, *m) / mscale_of(*factor, *all)
            }
            _ => mscale_of(*factor, 1.0),
        });
        // The channel pair that turns this often within the trained length.
        let width = self.head_dim as f64;
        let trained = original.unwrap_or(self.max_positions) as f64;
        let pair =
            |turns: f64| width * (trained / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair(beta_fast.unwrap_or(32.0)), pair(beta_slow.unwrap_or(1.0)));
        if truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        if low == high {
            high += 0.001;
        }
        let frequencies = base.iter().enumerate().map(|(i, f)| {
            let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * interpolated + f * (1.0 - interpolated)
        });
        (frequencies.collect(), attention)
    }

    /// The cosines and sines of each position's angles, [sequence_length, head_dim / 2] each, with
    /// the attention factor.
    pub fn tables(&self, sequence_length: usize) -> (Vec<f32>, Vec<f32>) {
        let (frequencies, factor) = self.frequencies(sequence_length);
        let angles = (0..sequence_length)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        angles.map(|angle| (angle.cos() * factor, angle.sin() * factor)).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn frequencies_fall_from_one() {
        let rope = Rope::read(&json!({"rope_theta": 100.0}), 4, 32).unwrap();
        let (frequencies, factor) = rope.frequencies(32);
        assert_eq!((frequencies[0], factor), (1.0, 1.0));
        assert!((frequencies[1] - 0.1).abs() < 1e-7);
        let (cos, sin) = rope.tables(2);
        assert_eq!((cos[0], sin[1]), (1.0, 0.0));
        assert!((sin[3] - 0.1f32.sin()).abs() < 1e-7);
    }

    #[test]
    fn an_unknown_type_lists_the_known_ones() {
        let config = json!({"rope_scaling": {"type": "warp", "factor": 2.0}});
        let error = Rope::read(&config, 4, 32).unwrap_err().to_string();
        assert!(error.contains("warp") && error.contains("llama3"), "{error}");
        let config = json!({"rope_scaling": {"rope_type": "linear"}});
        let error = Rope::read(&config, 4, 32).unwrap_err().to_string();
        assert!(error.contains("factor"), "{error}");
    }
}
