//! Rotary position embedding: from `config.json` to inverse frequencies.
//!
//! Channel `i` and `i + d/2` of a head turn together (the half-split form) by the angle
//! `position * inv_freq[i]`, `inv_freq[i] = theta^(-2i/d)`. The scaling kinds change `inv_freq`
//! and, for YaRN, multiply cos and sin by an attention factor. Formulas: Su et al. 2021
//! (RoPE), Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), the Llama 3.1 model card (llama3).
//!
//! Rounding follows transformers step by step in f32, because at position 100,000 one ulp of an
//! inverse frequency is a visible angle.

use std::f64::consts::PI;

use serde_json::Value;

use super::json::Object;
use crate::error::Result;

/// Rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Channels of a head.
    pub head_dim: usize,
}

/// How inverse frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was trained on.
        original_max_position: f64,
    },
    /// "NTK by parts" with an attention temperature.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Context the model was trained on.
        original_max_position: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a frequency is stretched in full.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outward to whole channels.
        truncate: bool,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

/// Any positive number a file may hold; keeps every quotient finite.
const POSITIVE: std::ops::RangeInclusive<f64> = 1e-6..=1e12;

impl RopeConfig {
    /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`.
    pub(crate) fn parse(root: &Object<'_>, head_dim: usize, max_position: usize) -> Result<RopeConfig> {
        let (field, prefix) = match root.get("rope_parameters") {
            Some(_) => ("rope_parameters", "rope_parameters."),
            None => ("rope_scaling", "rope_scaling."),
        };
        let top_theta = root.f64("rope_theta", POSITIVE)?;
        check_full_rotation(root)?;
        let Some(map) = root.object(field)? else {
            let theta = top_theta.unwrap_or(10_000.0);
            return Ok(RopeConfig { theta, scaling: RopeScaling::None, head_dim });
        };
        let rope = Object { path: root.path, prefix, map };
        check_full_rotation(&rope)?;
        if let Some((name, _)) = map.iter().find(|(_, value)| matches!(value, Value::Object(_))) {
            return Err(root.unsupported(field, name, "one set of parameters for all layers"));
        }
        let theta = rope.f64("rope_theta", POSITIVE)?.or(top_theta).unwrap_or(10_000.0);
        let kind = match rope.str("rope_type")? {
            Some(kind) => kind,
            None => rope.str("type")?.unwrap_or("default"),
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: required(&rope, "factor")? },
            "llama3" => parse_llama3(&rope, max_position)?,
            "yarn" => parse_yarn(&rope, theta, max_position)?,
            other => return Err(rope.unsupported("rope_type", other, "default, linear, llama3, yarn")),
        };
        Ok(RopeConfig { theta, scaling, head_dim })
    }

    /// Inverse frequencies, `[head_dim / 2]`.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        // f32 exponent, pow correctly rounded to f32, f32 reciprocal: what torch computes.
        let powers = (0..self.head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            self.theta.powf(f64::from(exponent)) as f32
        });
        match self.scaling {
            RopeScaling::None => powers.map(|p| 1.0 / p).collect(),
            RopeScaling::Linear { factor } => powers.map(|p| 1.0 / p / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
                let original = original_max_position as f32;
                let stretch = |freq: f32| {
                    let wavelength = 2.0 * PI as f32 / freq;
                    if wavelength < original / high {
                        freq
                    } else if wavelength > original / low {
                        freq / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * freq / factor + smooth * freq
                    }
                };
                powers.map(|p| stretch(1.0 / p)).collect()
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } => {
                let (low, high) = self.yarn_ramp(original_max_position, beta_fast, beta_slow, truncate);
                let blend = |(i, power): (usize, f32)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let (kept, stretched) = (1.0 / power, 1.0 / (factor as f32 * power));
                    let keep = 1.0 - ramp;
                    stretched * (1.0 - keep) + kept * keep
                };
                powers.enumerate().map(blend).collect()
            }
        }
    }

    /// The channels between which YaRN goes from kept to stretched frequencies.
    fn yarn_ramp(&self, original: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> (f64, f64) {
        let dim = self.head_dim as f64;
        let channel = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (channel(beta_fast), channel(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // A ramp of no width would divide by zero.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }

    /// Factor of cos and sin: 1 except for YaRN.
    pub fn attention_scaling(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }
}

fn required(rope: &Object<'_>, field: &str) -> Result<f64> {
    rope.f64(field, POSITIVE)?.ok_or_else(|| rope.invalid(field, "is missing"))
}

fn check_full_rotation(object: &Object<'_>) -> Result<()> {
    match object.f64("partial_rotary_factor", 0.0..=1.0)? {
        Some(part) if part != 1.0 => Err(object.unsupported("partial_rotary_factor", &part.to_string(), "1.0")),
        _ => Ok(()),
    }
}

fn parse_llama3(rope: &Object<'_>, max_position: usize) -> Result<RopeScaling> {
    let (low_freq_factor, high_freq_factor) = (required(rope, "low_freq_factor")?, required(rope, "high_freq_factor")?);
    if high_freq_factor <= low_freq_factor {
        let reason = format!("is {high_freq_factor}; it must be greater than low_freq_factor {low_freq_factor}");
        return Err(rope.invalid("high_freq_factor", reason));
    }
    Ok(RopeScaling::Llama3 {
        factor: required(rope, "factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position: original_max_position(rope, max_position)?,
    })
}

fn parse_yarn(rope: &Object<'_>, theta: f64, max_position: usize) -> Result<RopeScaling> {
    if theta <= 1.0 {
        return Err(rope.invalid("rope_theta", format!("is {theta}; yarn needs more than 1")));
    }
    let factor = required(rope, "factor")?;
    let temperature = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let nonzero = |field| Ok::<_, crate::Error>(rope.f64(field, 0.0..=1e6)?.filter(|x| *x != 0.0));
    let attention_factor =
        match (rope.f64("attention_factor", POSITIVE)?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(given), _, _) => given,
            (None, Some(mscale), Some(all_dim)) => temperature(mscale) / temperature(all_dim),
            (None, _, _) => temperature(1.0),
        };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position: original_max_position(rope, max_position)?,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        truncate: rope.bool("truncate")?.unwrap_or(true),
        attention_factor,
    })
}

fn original_max_position(rope: &Object<'_>, max_position: usize) -> Result<f64> {
    Ok(rope.f64("original_max_position_embeddings", POSITIVE)?.unwrap_or(max_position as f64))
}
