//! [`Observer`]: from what a group has seen to the magnitude its scale covers.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::LARGEST_CODE;
use super::group::Group;
use super::mse::SquaredErrorSearch;
use crate::error::{Error, Result};
use crate::format::DType;

/// The percentile of `percentile` without a number.
const DEFAULT_PERCENTILE: f64 = 99.99;

/// How a scale is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
#[non_exhaustive]
pub enum Observer {
    /// The largest magnitude seen / 448.
    #[default]
    Absmax,
    /// LLM Compressor's default, to the bit: [`super::MovingRange`].
    LlmCompressor,
    /// The smallest squared round-trip error: [`SquaredErrorSearch`].
    Mse,
    /// This percentage of the values is covered: [`super::Histogram::percentile`] / 448.
    Percentile(f64),
}

impl Observer {
    /// `absmax`, `llmcompressor`, `mse`, `percentile`.
    pub fn name(&self) -> &'static str {
        match self {
            Observer::Absmax => "absmax",
            Observer::LlmCompressor => "llmcompressor",
            Observer::Mse => "mse",
            Observer::Percentile(_) => "percentile",
        }
    }

    /// `observer` and `observer_kwargs` of the `kv_cache_scheme` in a checkpoint, in LLM Compressor's words
    /// where it has some; `None` is its default.
    pub fn scheme(&self) -> Option<(&'static str, Value)> {
        let search = SquaredErrorSearch::default();
        match self {
            Observer::Absmax => Some(("static_minmax", json!({}))),
            Observer::LlmCompressor => None,
            Observer::Mse => Some(("mse", json!({ "norm": 2.0, "maxshrink": search.max_shrink, "grid": search.grid }))),
            Observer::Percentile(percent) => Some(("percentile", json!({ "percentile": percent }))),
        }
    }

    /// The scale of a group: finite and above zero. Of zeros alone it is 1.0, and the dtype's epsilon for
    /// LLM Compressor, as there.
    pub(super) fn scale(&self, group: &Group, dtype: DType) -> f32 {
        let absmax = group.absmax;
        let covered = match self {
            Observer::LlmCompressor => return group.moving.scale(dtype),
            _ if absmax == 0.0 => return 1.0,
            Observer::Absmax => absmax,
            Observer::Mse => SquaredErrorSearch::default().range(&group.histogram, absmax),
            Observer::Percentile(percent) => group.histogram.percentile(*percent).min(absmax),
        };
        (covered / LARGEST_CODE).max(f32::MIN_POSITIVE)
    }
}

impl FromStr for Observer {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self> {
        match given.split_once('=') {
            None => match given {
                "absmax" => return Ok(Observer::Absmax),
                "llmcompressor" => return Ok(Observer::LlmCompressor),
                "mse" => return Ok(Observer::Mse),
                "percentile" => return Ok(Observer::Percentile(DEFAULT_PERCENTILE)),
                _ => {}
            },
            Some(("percentile", percent)) => {
                let value = percent.parse().ok().filter(|p| (f64::MIN_POSITIVE..=100.0).contains(p));
                return value.map(Observer::Percentile).ok_or_else(|| {
                    Error::InvalidRequest(format!("percentile={percent}: expected a number above 0 and up to 100"))
                });
            }
            Some(_) => {}
        }
        let known = "absmax, llmcompressor, mse, percentile, percentile=P";
        Err(Error::InvalidRequest(format!("observer {given:?} is not known; known: {known}")))
    }
}

impl fmt::Display for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Observer::Percentile(percent) => write!(f, "percentile={percent}"),
            other => f.write_str(other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::Granularity;

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for name in ["absmax", "llmcompressor", "mse", "percentile=99.9"] {
            assert_eq!(name.parse::<Observer>().unwrap().to_string(), name);
        }
        assert_eq!("percentile".parse::<Observer>().unwrap(), Observer::Percentile(99.99));
        for name in ["", "max", "mse=2", "percentile=", "percentile=0", "percentile=101", "percentile=nan"] {
            assert!(name.parse::<Observer>().is_err(), "{name}");
        }
    }

    #[test]
    fn every_observer_gives_a_scale_that_is_one() {
        let observers = [Observer::Absmax, Observer::LlmCompressor, Observer::Mse, Observer::Percentile(50.0)];
        for values in [&[][..], &[0.0], &[1e-45], &[3e38, -3e38], &[0.0, 0.0, 0.0, 2.0]] {
            let mut group = Group::new(Granularity::Tensor);
            values.iter().for_each(|x| group.record(*x));
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let mut group = group.clone();
                group.end_sample(dtype);
                for observer in observers {
                    let scale = observer.scale(&group, dtype);
                    let infinite_in_f16 = dtype == DType::F16 && observer == Observer::LlmCompressor;
                    let valid = scale.is_finite() && scale > 0.0;
                    assert!(valid || infinite_in_f16 && values.contains(&3e38), "{observer} {values:?} {scale}");
                }
            }
        }
    }
}
