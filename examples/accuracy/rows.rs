//! The rows of the table: which cache, with which scales, read how.
//!
//! Rows of the second part are failures that happen in practice, each beside the row that avoids it.

use quantkv::KvFormat;
use quantkv::calibrate::Observer;
use quantkv::scale::Granularity;

/// What the largest key of every layer of the model with large keys is to reach.
pub const LARGE_KEY: f32 = 2048.0;

/// How much too small the scales of the clipped row are.
pub const TOO_SMALL: f32 = 8.0;

/// Which model a row runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The one given.
    AsGiven,
    /// The same with large keys and, inversely, small queries: see `large_keys.rs`.
    LargeKeys,
}

/// Where scales come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales {
    /// The cache is not quantized.
    Unused,
    /// 1.0.
    One,
    /// From the calibration texts.
    Calibrated(Observer, Granularity),
    /// Absmax ones per tensor, divided by this.
    TooSmall(f32),
    /// Each row of each token has its own.
    Dynamic,
    /// vLLM's `calculate_kv_scales`: K/200 and V/100 of the first text.
    FirstBatch,
}

/// The prompt is computed by one device, which writes FNUZ codes, and what follows by another, which
/// takes the same bytes for OCP codes. Scales are per-tensor absmax ones, made for OCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandOver {
    /// The writer doubles the scales, as it must; the reader is given the writer's.
    WritersScales,
    /// Both use the checkpoint's.
    NotDoubled,
    /// The writer doubles the scales, and the reader uses the checkpoint's: right for all codes but the
    /// largest, 0x7f, which is 240 in FNUZ and NaN in OCP. A value beyond the calibrated range has it.
    CheckpointScales,
}

/// What a row is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the others are compared with.
    Reference,
    /// A choice one may make.
    Choice,
    /// A mistake.
    Failure,
    /// What to do instead of the mistakes above it.
    Remedy,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Reference => "reference",
            Kind::Choice => "choice",
            Kind::Failure => "failure",
            Kind::Remedy => "remedy",
        }
    }
}

/// One row.
#[derive(Debug)]
pub struct Row {
    /// What `--formats` and JSON call it.
    pub name: &'static str,
    /// `None` is the model's own dtype.
    pub format: Option<KvFormat>,
    pub scales: Scales,
    pub variant: Variant,
    pub hand_over: Option<HandOver>,
    pub kind: Kind,
    /// The scales in words.
    pub about: &'static str,
}

/// The largest magnitude of the calibration texts becomes the largest code.
pub const ABSMAX: Scales = Scales::Calibrated(Observer::Absmax, Granularity::Tensor);

const CHOICE: Row = Row {
    name: "",
    format: Some(KvFormat::Fp8E4M3),
    scales: Scales::One,
    variant: Variant::AsGiven,
    hand_over: None,
    kind: Kind::Choice,
    about: "",
};
const LARGE_KEYS: Row = Row { variant: Variant::LargeKeys, kind: Kind::Remedy, ..CHOICE };
const HANDED_OVER: Row = Row { format: Some(KvFormat::Fp8E4M3Fnuz), scales: ABSMAX, kind: Kind::Failure, ..CHOICE };

/// Every row, in the order of the table.
pub static ROWS: [Row; 21] = [
    Row { name: "auto", format: None, scales: Scales::Unused, kind: Kind::Reference, about: "none", ..CHOICE },
    Row { name: "f32", format: Some(KvFormat::F32), scales: Scales::Unused, about: "none", ..CHOICE },
    Row { name: "e4m3-one", about: "1.0", ..CHOICE },
    Row { name: "e4m3-tensor", scales: ABSMAX, about: "absmax per tensor", ..CHOICE },
    Row {
        name: "e4m3-head",
        scales: Scales::Calibrated(Observer::Absmax, Granularity::Head),
        about: "absmax per head",
        ..CHOICE
    },
    Row {
        name: "e4m3-channel",
        scales: Scales::Calibrated(Observer::Absmax, Granularity::Channel),
        about: "absmax per channel",
        ..CHOICE
    },
    Row { name: "e4m3-dynamic", scales: Scales::Dynamic, about: "dynamic per (token, head)", ..CHOICE },
    Row { name: "e4m3-first-batch", scales: Scales::FirstBatch, about: "first batch, K/200, V/100", ..CHOICE },
    Row {
        name: "e4m3-ema",
        scales: Scales::Calibrated(Observer::LlmCompressor, Granularity::Tensor),
        about: "LLM Compressor's average",
        ..CHOICE
    },
    Row {
        name: "e4m3-mse",
        scales: Scales::Calibrated(Observer::Mse, Granularity::Tensor),
        about: "least squared error",
        ..CHOICE
    },
    Row {
        name: "e4m3-percentile",
        scales: Scales::Calibrated(Observer::Percentile(99.9), Granularity::Tensor),
        about: "99.9th percentile",
        ..CHOICE
    },
    Row {
        name: "e4m3-fnuz",
        format: Some(KvFormat::Fp8E4M3Fnuz),
        scales: ABSMAX,
        about: "absmax per tensor, doubled",
        ..CHOICE
    },
    Row { name: "e5m2-one", format: Some(KvFormat::Fp8E5M2), about: "1.0", ..CHOICE },
    Row {
        name: "clipped",
        scales: Scales::TooSmall(TOO_SMALL),
        kind: Kind::Failure,
        about: "8 times too small",
        ..CHOICE
    },
    Row { name: "large-keys-one", kind: Kind::Failure, about: "large keys, 1.0", ..LARGE_KEYS },
    Row { name: "large-keys-tensor", scales: ABSMAX, about: "large keys, absmax per tensor", ..LARGE_KEYS },
    Row { name: "large-keys-e5m2", format: Some(KvFormat::Fp8E5M2), about: "large keys, 1.0", ..LARGE_KEYS },
    Row { name: "large-keys-auto", format: None, scales: Scales::Unused, about: "large keys, none", ..LARGE_KEYS },
    Row {
        name: "fnuz-as-ocp",
        hand_over: Some(HandOver::WritersScales),
        about: "FNUZ bytes as OCP, writer's scales",
        ..HANDED_OVER
    },
    Row {
        name: "fnuz-not-doubled",
        hand_over: Some(HandOver::NotDoubled),
        about: "FNUZ bytes as OCP, never doubled",
        ..HANDED_OVER
    },
    Row {
        name: "fnuz-halved",
        hand_over: Some(HandOver::CheckpointScales),
        about: "FNUZ bytes as OCP, scales halved",
        ..HANDED_OVER
    },
];

/// The rows that `--formats` names: a row, a cache format with all its choices, or `failures`. The
/// reference of every model is always among them.
pub fn chosen(names: &[String]) -> Result<Vec<&'static Row>, String> {
    let matches = |name: &str, row: &Row| match name {
        "all" => true,
        "failures" => matches!(row.kind, Kind::Failure | Kind::Remedy),
        _ if row.name == name => true,
        // `fp8` is `fp8_e4m3`, as everywhere.
        _ => {
            let format = if name == "fp8" { "fp8_e4m3" } else { name };
            row.kind == Kind::Choice && row.format.is_some_and(|own| own.name() == format)
        }
    };
    if let Some(name) = names.iter().find(|name| !ROWS.iter().any(|row| matches(name, row))) {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        return Err(format!(
            "--formats {name:?} is none of: all, failures, f32, fp8_e4m3, fp8_e4m3_fnuz, fp8_e5m2, {}",
            known.join(", ")
        ));
    }
    let named = |row: &Row| names.iter().any(|name| matches(name, row));
    let large_keys = ROWS.iter().any(|row| row.variant == Variant::LargeKeys && named(row));
    let wanted = |row: &&Row| {
        named(row) || row.kind == Kind::Reference || row.name == reference_of(Variant::LargeKeys).name && large_keys
    };
    Ok(ROWS.iter().filter(wanted).collect())
}

/// The row that the rows of a model are compared with.
pub fn reference_of(variant: Variant) -> &'static Row {
    let is_reference = |row: &&Row| row.variant == variant && row.scales == Scales::Unused && row.format.is_none();
    ROWS.iter().find(is_reference).unwrap_or(&ROWS[0])
}
