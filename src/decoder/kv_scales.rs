//! Which scales the KV cache of a model gets, and what the user should know about it.
//!
//! ```text
//! format      source        scales
//! auto        any           1.0, unused; a hint if the checkpoint carries some
//! e4m3        checkpoint    the checkpoint's, else 1.0 and a warning
//! e4m3        file          one scale a layer (or head, if made for several ranks), for K and V
//! e4m3 FNUZ   the same      e4m3's doubled (`docs/numerics.md`): the same codes, but for what clips
//! e5m2        the same      1.0: scales are made for e4m3; a warning if there were some
//! any fp8     first batch   K/200, V/100 of the first forward pass; 1.0 until then
//! any fp8     running       follow the largest values of the first tokens (`warm_up.rs`); then frozen
//! any fp8     dynamic       a scale for each (token, head) of its own; static ones are 1.0
//! ```
//! Unlike vLLM, `auto` never turns into FP8 because a checkpoint has scales: it is the model's own
//! dtype always.
//!
//! How many values share a scale (*granularity*) is the source's to say, and one a layer for scales that
//! are computed here. A granularity that is asked for changes both:
//!
//! ```text
//! source                  asked for coarser                       asked for finer
//! checkpoint, file        the largest of those replaced, and a    each repeated: the same codes
//!                         warning: none may clip
//! first batch, running    one maximum for each scale wanted
//! dynamic                 no effect, and a warning: a row's scale is its own
//! ```
//! `channel` is K's and V's alike: attention folds K's into the query and V's into the output.

use std::path::Path;

use super::config::Config;
use super::warm_up::RunningScales;
use super::weights::Weights;
use crate::checkpoint::{self, CheckpointScales, MissingScales, Origin, ReadOptions};
use crate::error::{Error, Result};
use crate::format::KvFormat;
use crate::layout::{CacheSpec, DynamicScales};
use crate::scale::{Granularity, LayerScales};

/// Where to take scales from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleSource<'a> {
    /// The model's own tensors, where it has some.
    Checkpoint,
    /// A `kv_cache_scales.json` as vLLM's `quantization_param_path` and SGLang read it.
    File(&'a Path),
    /// The first forward pass.
    FirstBatch,
    /// The first tokens, however many steps they take.
    Running,
    /// Each token's own keys and values.
    Dynamic,
}

impl ScaleSource<'_> {
    /// `checkpoint`, `file`, `first_batch`, `running` or `dynamic`.
    pub fn name(self) -> &'static str {
        match self {
            ScaleSource::Checkpoint => "checkpoint",
            ScaleSource::File(_) => "file",
            ScaleSource::FirstBatch => "first_batch",
            ScaleSource::Running => "running",
            ScaleSource::Dynamic => "dynamic",
        }
    }
}

/// What the largest magnitudes of the first forward pass are divided by to give scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divisors {
    /// For K.
    pub k: f32,
    /// For V.
    pub v: f32,
}

impl Default for Divisors {
    /// vLLM's `K_SCALE_CONSTANT` and `V_SCALE_CONSTANT`.
    fn default() -> Self {
        Divisors { k: 200.0, v: 100.0 }
    }
}

impl Divisors {
    /// Checks both.
    ///
    /// # Errors
    /// [`Error::InvalidNumber`] unless they are finite and at least 1.
    pub fn validate(&self) -> Result<()> {
        for (what, value) in [("the divisor of K scales", self.k), ("the divisor of V scales", self.v)] {
            if !(value.is_finite() && value >= 1.0) {
                let expected = "finite and at least 1";
                return Err(Error::InvalidNumber { what, value: value.into(), expected });
            }
        }
        Ok(())
    }
}

/// Everything that may be asked for. A [`ScaleSource`] alone is one with the defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleOptions<'a> {
    /// Where to take scales from.
    pub source: ScaleSource<'a>,
    /// How many values share one; as the source has it if `None`.
    pub granularity: Option<Granularity>,
    /// For [`ScaleSource::FirstBatch`].
    pub divisors: Divisors,
    /// For [`ScaleSource::Running`].
    pub running: RunningScales,
    /// What to do where a checkpoint or file has scales for some layers only.
    pub missing: MissingScales,
}

impl<'a> From<ScaleSource<'a>> for ScaleOptions<'a> {
    fn from(source: ScaleSource<'a>) -> Self {
        let (divisors, running) = (Divisors::default(), RunningScales::default());
        ScaleOptions { source, granularity: None, divisors, running, missing: MissingScales::default() }
    }
}

/// Static scales that are computed from what is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OnTheFly {
    /// From the first forward pass.
    FirstBatch(Divisors),
    /// From the first tokens.
    Running(RunningScales),
}

/// Scales for every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct KvScales {
    /// One entry a layer.
    pub layers: Vec<LayerScales>,
    /// What replaces them, if anything does.
    pub on_the_fly: Option<OnTheFly>,
    /// Whether every (token, head) has a scale of its own beside them.
    pub dynamic: DynamicScales,
    /// Where they come from, if from a checkpoint or a file.
    pub origin: Option<Origin>,
    /// One line each, for the user.
    pub warnings: Vec<String>,
}

impl KvScales {
    /// The cache that these scales are for.
    ///
    /// # Errors
    /// [`CacheSpec::with_dynamic_scales`].
    pub fn cache_spec(&self, spec: CacheSpec) -> Result<CacheSpec> {
        match self.dynamic {
            DynamicScales::Off => Ok(spec),
            DynamicScales::PerSlotHead => spec.with_dynamic_scales(),
        }
    }
}

/// Decides the scales of a cache in `format` for the model of `config` and `weights`.
///
/// # Errors
/// What [`checkpoint::scales_in`] and [`checkpoint::read_scales_file`] refuse, if they are asked;
/// [`Divisors::validate`]; [`RunningScales::validate`].
pub fn resolve<'a>(
    config: &Config,
    weights: &Weights,
    format: KvFormat,
    options: impl Into<ScaleOptions<'a>>,
) -> Result<KvScales> {
    let ScaleOptions { source, granularity, divisors, running, missing } = options.into();
    divisors.validate()?;
    running.validate()?;
    let mut scales = KvScales {
        layers: vec![LayerScales::one(); config.num_layers],
        on_the_fly: None,
        dynamic: DynamicScales::Off,
        origin: None,
        warnings: Vec::new(),
    };
    let options = ReadOptions { missing, shard: None };
    let mut warn = |text: String| scales.warnings.push(text);
    let carried = weights.names().filter(|name| checkpoint::names_a_kv_scale(name)).min();
    match (source, format, carried) {
        (ScaleSource::Checkpoint, format, Some(_)) if !format.is_quantized() => warn(format!(
            "the checkpoint carries KV scales; they are for an fp8 cache, an unquantized one ({format}) does not use them"
        )),
        (ScaleSource::Checkpoint, format, None) if !format.is_quantized() => {}
        (_, format, _) if !format.is_quantized() => {
            warn(format!("the cache is not quantized ({format}) and uses no scales"));
        }
        (ScaleSource::FirstBatch, ..) => scales.on_the_fly = Some(OnTheFly::FirstBatch(divisors)),
        (ScaleSource::Running, ..) => scales.on_the_fly = Some(OnTheFly::Running(running)),
        (ScaleSource::Dynamic, ..) => scales.dynamic = DynamicScales::PerSlotHead,
        (ScaleSource::Checkpoint, KvFormat::Fp8E5M2, None) => {}
        (ScaleSource::Checkpoint, KvFormat::Fp8E5M2, Some(_)) => {
            warn("the checkpoint's KV scales are made for fp8_e4m3; fp8_e5m2 ignores them and uses 1.0".into());
        }
        (ScaleSource::File(_), KvFormat::Fp8E5M2, _) => {
            warn("a scales file is made for fp8_e4m3; fp8_e5m2 ignores it and uses 1.0".into());
        }
        (ScaleSource::File(path), ..) => {
            scales.take(checkpoint::read_scales_file(path, &config.into(), &options)?);
        }
        (ScaleSource::Checkpoint, ..) => match checkpoint::scales_in(weights, &config.into(), &options)? {
            Some(found) => scales.take(found),
            None => {
                // See below.
                let one = if format == KvFormat::Fp8E4M3Fnuz { 2.0 } else { 1.0 };
                let (why, most) = (checkpoint::why_none(weights)?, one * format.max_finite());
                warn(format!("{why}; {format} uses {one:.1} and cuts what lies beyond ±{most}"));
            }
        },
    }
    let from_elsewhere = scales.on_the_fly.is_none() && scales.dynamic == DynamicScales::Off;
    if format == KvFormat::Fp8E4M3Fnuz && from_elsewhere {
        for (layer, pair) in scales.layers.iter_mut().enumerate() {
            pair.k = pair.k.doubled_for_fnuz(&format!("layer {layer} k_scale"))?;
            pair.v = pair.v.doubled_for_fnuz(&format!("layer {layer} v_scale"))?;
        }
    }
    match granularity {
        Some(granularity) if scales.dynamic == DynamicScales::PerSlotHead => scales
            .warnings
            .push(format!("dynamic scales are per token and head; a scale per {} has no effect", granularity.name())),
        Some(granularity) if format.is_quantized() => scales.set_granularity(config, granularity)?,
        _ => {}
    }
    Ok(scales)
}

impl KvScales {
    /// Gives all layers scales of `granularity`, see the module's second table.
    fn set_granularity(&mut self, config: &Config, granularity: Granularity) -> Result<()> {
        let (heads, channels) = (config.num_kv_heads, config.head_dim);
        let wanted = granularity.len(heads, channels);
        let mut coarser = None;
        for pair in &mut self.layers {
            for scale in [&mut pair.k, &mut pair.v] {
                let new = scale.with_granularity(granularity, heads, channels)?;
                if scale.values().len() > wanted
                    && new.with_granularity(scale.granularity(), heads, channels)? != *scale
                {
                    coarser = Some(scale.granularity());
                }
                *scale = new;
            }
        }
        if let Some(finer) = coarser {
            let (finer, coarser) = (finer.name(), granularity.name());
            self.warnings.push(format!(
                "the scales given are per {finer}; as scales per {coarser} were asked for, each is the largest of those it replaces"
            ));
        }
        Ok(())
    }

    fn take(&mut self, found: CheckpointScales) {
        self.layers = found.scales.into_layers();
        self.origin = Some(found.origin);
        self.warnings.extend(found.warnings);
    }
}
