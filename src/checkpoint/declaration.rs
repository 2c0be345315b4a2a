//! What a checkpoint's configuration says of its KV scales: who made them, and that they are static
//! scales of FP8 E4M3 codes. Anything else it may say is refused: such scales would decode to
//! something, and nobody would notice.
//!
//! ```text
//! quantization_config.quant_method    kv_cache_scheme                           tool
//! compressed-tensors                  { type float, num_bits 8, strategy, .. }  LLM Compressor
//! modelopt, modelopt_*                { type float, num_bits 8 } or "FP8"       ModelOpt
//! quark                               kv_cache_quant_config.*.output_tensors    Quark
//! fp8                                 "static"                                  AutoFP8; Quark if there is `export`
//!
//! hf_quant_config.json: quantization.kv_cache_quant_algo "FP8"                  ModelOpt
//! ```

use std::path::Path;

use serde_json::{Map, Value};

use super::origin::{KeyRange, Origin, Statistic, Tool};
use crate::error::Result;
use crate::json::{Object, kind, read_object};
use crate::scale::Granularity;

/// compressed-tensors' constant where `observer_kwargs` names none.
const AVERAGING_CONSTANT: f64 = 0.01;
/// What the configuration must declare, in words.
const SUPPORTED: &str = "static symmetric scales of 8-bit floats (FP8 E4M3)";

/// A configuration's word on KV scales.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Declaration {
    pub origin: Origin,
    /// Whether it declares an FP8 KV cache at all.
    pub declared: bool,
    /// `strategy`, where there is one.
    pub granularity: Option<Granularity>,
}

impl Declaration {
    pub fn none() -> Declaration {
        Declaration { origin: Origin::unknown(), declared: false, granularity: None }
    }

    fn of(tool: Tool, version: Option<&str>, key_range: KeyRange, statistic: Statistic) -> Declaration {
        let version = version.map(str::to_owned);
        let origin = Origin { tool, version, key_range, statistic, ..Origin::unknown() };
        Declaration { origin, declared: false, granularity: None }
    }

    /// Reads `config.json` and `hf_quant_config.json` of a folder; neither need be there.
    pub fn from_dir(dir: &Path) -> Result<Declaration> {
        let path = dir.join("config.json");
        let declaration = match path.exists() {
            true => Declaration::parse(&Object { path: &path, prefix: "", map: &read_object(&path)? })?,
            false => Declaration::none(),
        };
        declaration.with_hf_quant_config(dir)
    }

    /// Reads `quantization_config` of a `config.json`.
    pub fn parse(root: &Object<'_>) -> Result<Declaration> {
        // compressed-tensors' first name for it.
        let old = root.get("quantization_config").is_none() && root.get("compression_config").is_some();
        let (field, prefix) = match old {
            true => ("compression_config", "compression_config."),
            false => ("quantization_config", "quantization_config."),
        };
        let Some(map) = root.object(field)? else { return Ok(Declaration::none()) };
        let config = Object { path: root.path, prefix, map };
        match config.str("quant_method")? {
            Some("compressed-tensors") => compressed_tensors(&config),
            None if old => compressed_tensors(&config),
            Some(method) if method.starts_with("modelopt") => modelopt(&config),
            Some("quark") => quark(&config),
            Some("fp8") => fp8(&config),
            None if config.object("export")?.is_some() => quark(&config),
            _ => Ok(Declaration::none()),
        }
    }

    /// ModelOpt's own file, which older versions write instead of `quantization_config`.
    pub fn with_hf_quant_config(self, dir: &Path) -> Result<Declaration> {
        let path = dir.join("hf_quant_config.json");
        if !path.exists() {
            return Ok(self);
        }
        let map = read_object(&path)?;
        let root = Object { path: &path, prefix: "", map: &map };
        let producer = root.object("producer")?;
        let version = producer.and_then(|map| map.get("version")).and_then(Value::as_str);
        let Some(map) = root.object("quantization")? else { return Ok(self) };
        let quantization = Object { path: &path, prefix: "quantization.", map };
        let Some(algorithm) = quantization.str("kv_cache_quant_algo")? else { return Ok(self) };
        if !algorithm.eq_ignore_ascii_case("fp8") {
            return Err(quantization.unsupported("kv_cache_quant_algo", algorithm, "FP8"));
        }
        Ok(match self.origin.tool {
            Tool::Unknown => Declaration { declared: true, ..modelopt_declaration(version) },
            _ => Declaration { declared: true, ..self },
        })
    }
}

fn compressed_tensors(config: &Object<'_>) -> Result<Declaration> {
    let version = config.str("version")?;
    let Some(map) = config.object("kv_cache_scheme")? else {
        return Ok(Declaration::of(Tool::CompressedTensors, version, KeyRange::PostRope, Statistic::Unknown));
    };
    let prefix = format!("{}kv_cache_scheme.", config.prefix);
    let scheme = Object { path: config.path, prefix: &prefix, map };
    let granularity = fp8_scheme(&scheme)?;
    let constant = match scheme.object("observer_kwargs")? {
        Some(map) => {
            let prefix = format!("{prefix}observer_kwargs.");
            Object { path: config.path, prefix: &prefix, map }.f64("averaging_constant", 0.0..=1.0)?
        }
        None => None,
    };
    // LLM Compressor resolves no observer to its default, "minmax".
    let statistic = match scheme.str("observer")?.unwrap_or("minmax") {
        "minmax" => Statistic::MovingAverage { constant: constant.unwrap_or(AVERAGING_CONSTANT) },
        "static_minmax" | "absmax" => Statistic::Absmax,
        other => Statistic::Observer(other.to_owned()),
    };
    let declaration = Declaration::of(Tool::CompressedTensors, version, KeyRange::PostRope, statistic);
    Ok(Declaration { declared: true, granularity, ..declaration })
}

/// A scheme as compressed-tensors spells it; gives its `strategy`. Fields that do not change what a scale
/// means are not looked at.
fn fp8_scheme(scheme: &Object<'_>) -> Result<Option<Granularity>> {
    match scheme.str("type")? {
        Some("float") => {}
        Some(other) => return Err(scheme.unsupported("type", other, SUPPORTED)),
        // Absent means an integer there, and an integer's scale is not a float's.
        None => return Err(scheme.invalid("type", "is missing")),
    }
    match scheme.usize("num_bits", 1..=64)? {
        Some(8) => {}
        Some(other) => return Err(scheme.unsupported("num_bits", &other.to_string(), SUPPORTED)),
        None => return Err(scheme.invalid("num_bits", "is missing")),
    }
    // `dynamic` may be a word ("local"); anything but false is dynamic.
    match scheme.get("dynamic") {
        None | Some(Value::Bool(false)) => {}
        Some(Value::Bool(true)) => return Err(scheme.unsupported("dynamic", "true", SUPPORTED)),
        Some(other) => return Err(scheme.unsupported("dynamic", &kind(other), SUPPORTED)),
    }
    if scheme.bool("symmetric")? == Some(false) {
        return Err(scheme.unsupported("symmetric", "false", SUPPORTED));
    }
    match scheme.str("strategy")? {
        None => Ok(None),
        Some("tensor") => Ok(Some(Granularity::Tensor)),
        Some("attn_head") => Ok(Some(Granularity::Head)),
        Some("channel") => Ok(Some(Granularity::Channel)),
        Some(other) => Err(scheme.unsupported("strategy", other, "tensor, attn_head, channel")),
    }
}

fn modelopt_declaration(version: Option<&str>) -> Declaration {
    Declaration::of(Tool::ModelOpt, version, KeyRange::PostRope, Statistic::Absmax)
}

fn modelopt(config: &Object<'_>) -> Result<Declaration> {
    let producer = config.object("producer")?;
    let declaration = modelopt_declaration(producer.and_then(|map| map.get("version")).and_then(Value::as_str));
    let granularity = match config.get("kv_cache_scheme") {
        None => return Ok(declaration),
        Some(Value::Object(map)) => {
            let prefix = format!("{}kv_cache_scheme.", config.prefix);
            fp8_scheme(&Object { path: config.path, prefix: &prefix, map })?
        }
        // The name of an algorithm that has no scheme of its own.
        Some(Value::String(algorithm)) if algorithm.eq_ignore_ascii_case("fp8") => None,
        Some(Value::String(algorithm)) => return Err(config.unsupported("kv_cache_scheme", algorithm, "FP8")),
        Some(other) => {
            let reason = format!("is {}, expected an object or a string", kind(other));
            return Err(config.invalid("kv_cache_scheme", reason));
        }
    };
    Ok(Declaration { declared: true, granularity, ..declaration })
}

fn quark(config: &Object<'_>) -> Result<Declaration> {
    let key_range = match config.bool("kv_cache_post_rope")? {
        Some(true) => KeyRange::PostRope,
        // Quark's default, and what it did before it had the option.
        Some(false) | None => KeyRange::PreRope,
    };
    let mut declaration = Declaration::of(Tool::Quark, config.str("version")?, key_range, Statistic::Unknown);
    // Patterns of projections: those of the KV cache alone, or, in older versions, of any layer.
    let field =
        if config.get("kv_cache_quant_config").is_some() { "kv_cache_quant_config" } else { "layer_quant_config" };
    let Some(patterns) = config.object(field)? else { return Ok(declaration) };
    for (pattern, value) in patterns.iter().filter(|(pattern, _)| is_kv_projection(pattern)) {
        let prefix = format!("{}{field}.{}.", config.prefix, crate::json::shorten(pattern));
        let Value::Object(map) = value else { continue };
        let Some(map) = (Object { path: config.path, prefix: &prefix, map }).object("output_tensors")? else {
            continue;
        };
        let prefix = format!("{prefix}output_tensors.");
        declaration.origin.statistic = quark_output(&Object { path: config.path, prefix: &prefix, map })?;
        declaration.declared = true;
    }
    Ok(declaration)
}

fn is_kv_projection(pattern: &str) -> bool {
    ["k_proj", "v_proj", "kv_proj", "qkv_proj"].iter().any(|end| pattern.ends_with(end))
}

/// How Quark quantizes what a projection puts out.
fn quark_output(output: &Object<'_>) -> Result<Statistic> {
    for (field, expected) in [("dtype", "fp8_e4m3"), ("qscheme", "per_tensor")] {
        match output.str(field)? {
            None => return Err(output.invalid(field, "is missing")),
            Some(value) if value == expected => {}
            Some(value) => return Err(output.unsupported(field, value, expected)),
        }
    }
    if output.bool("is_dynamic")? == Some(true) {
        return Err(output.unsupported("is_dynamic", "true", SUPPORTED));
    }
    if output.bool("symmetric")? == Some(false) {
        return Err(output.unsupported("symmetric", "false", SUPPORTED));
    }
    Ok(match output.str("observer_cls")? {
        None => Statistic::Unknown,
        Some("PerTensorMinMaxObserver") => Statistic::Absmax,
        Some(other) => Statistic::Observer(other.to_owned()),
    })
}

/// AutoFP8's configuration, which Quark's fp8 mode imitates.
fn fp8(config: &Object<'_>) -> Result<Declaration> {
    let mut declaration = match config.object("export")? {
        // This mode records neither the range it measured nor the observer.
        Some(_) => Declaration::of(Tool::Quark, None, quark_fp8_range(config.map), Statistic::Unknown),
        None => Declaration::of(Tool::AutoFp8, None, KeyRange::PreRope, Statistic::Absmax),
    };
    match config.get("kv_cache_scheme") {
        None => return Ok(declaration),
        Some(Value::String(word)) if word == "static" => {}
        Some(Value::String(word)) => return Err(config.unsupported("kv_cache_scheme", word, "static")),
        Some(Value::Object(map)) => {
            let prefix = format!("{}kv_cache_scheme.", config.prefix);
            declaration.granularity = fp8_scheme(&Object { path: config.path, prefix: &prefix, map })?;
        }
        Some(other) => {
            return Err(config.invalid("kv_cache_scheme", format!("is {}, expected \"static\"", kind(other))));
        }
    }
    declaration.declared = true;
    Ok(declaration)
}

fn quark_fp8_range(map: &Map<String, Value>) -> KeyRange {
    match map.get("kv_cache_post_rope").and_then(Value::as_bool) {
        Some(true) => KeyRange::PostRope,
        Some(false) => KeyRange::PreRope,
        None => KeyRange::Unknown,
    }
}
