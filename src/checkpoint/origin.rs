//! Where scales come from, as far as their files say.

use std::fmt;

use super::names::Naming;

/// Who made the scales of a checkpoint, from what, and how.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Origin {
    /// The tool, or the format if several tools write it.
    pub tool: Tool,
    /// The tool's version, where the configuration names one.
    pub version: Option<String>,
    /// Which keys were measured.
    pub key_range: KeyRange,
    /// What the scale was made from.
    pub statistic: Statistic,
    /// Whether K and V of a layer were given one common scale.
    pub shared: bool,
    /// How the tensors are named; `None` for a scales file.
    pub naming: Option<Naming>,
}

impl Origin {
    /// Nothing is known.
    pub(super) fn unknown() -> Origin {
        Origin {
            tool: Tool::Unknown,
            version: None,
            key_range: KeyRange::Unknown,
            statistic: Statistic::Unknown,
            shared: false,
            naming: None,
        }
    }
}

/// A calibration tool or its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tool {
    /// compressed-tensors: LLM Compressor, and others that write its format.
    CompressedTensors,
    /// NVIDIA ModelOpt.
    ModelOpt,
    /// AMD Quark, also in its fp8 mode.
    Quark,
    /// AutoFP8.
    AutoFp8,
    /// A `kv_cache_scales.json`, whoever wrote it.
    ScalesFile,
    /// The files do not say, or contradict each other.
    Unknown,
}

impl Tool {
    /// The name for users and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Tool::CompressedTensors => "compressed-tensors",
            Tool::ModelOpt => "modelopt",
            Tool::Quark => "quark",
            Tool::AutoFp8 => "autofp8",
            Tool::ScalesFile => "scales_file",
            Tool::Unknown => "unknown",
        }
    }

    /// Whether this tool names its scales so, or another program may have renamed them so.
    pub(super) fn writes(self, naming: Naming) -> bool {
        match self {
            _ if matches!(naming, Naming::Cache | Naming::Vllm) => true,
            Tool::CompressedTensors => matches!(naming, Naming::Attention),
            Tool::ModelOpt => matches!(naming, Naming::Projection | Naming::FusedProjection),
            Tool::Quark => matches!(naming, Naming::Output | Naming::Attention),
            Tool::AutoFp8 => matches!(naming, Naming::Attention | Naming::Single),
            Tool::ScalesFile => false,
            Tool::Unknown => true,
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which keys a K scale was measured on. The cache holds keys after RoPE: a rotation mixes two channels,
/// so that a range from before it may be exceeded by up to the square root of 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyRange {
    /// Rotated keys, as the cache holds them.
    PostRope,
    /// The projection's output.
    PreRope,
    /// The files do not say.
    Unknown,
}

impl KeyRange {
    /// The name for users and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            KeyRange::PostRope => "post_rope",
            KeyRange::PreRope => "pre_rope",
            KeyRange::Unknown => "unknown",
        }
    }
}

/// What of the calibration data a scale was made from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Statistic {
    /// The largest magnitude of all data.
    Absmax,
    /// A moving average of each sample's minimum and maximum; later data moves it by this share.
    /// Data beyond it is cut off.
    MovingAverage {
        /// compressed-tensors' `averaging_constant`.
        constant: f64,
    },
    /// The observer of this name.
    Observer(String),
    /// The files do not say.
    Unknown,
}

impl fmt::Display for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Statistic::Absmax => f.write_str("absmax"),
            Statistic::MovingAverage { constant } => write!(f, "moving_average({constant})"),
            Statistic::Observer(name) => f.write_str(name),
            Statistic::Unknown => f.write_str("unknown"),
        }
    }
}
