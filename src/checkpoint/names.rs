//! The names under which tools store KV scales: one table.
//!
//! A name is `<prefix>layers.<N>.<attention module>.<what the table lists>`. The table covers every row of
//! vLLM's remapping of scale names that concerns K, V or Q, and vLLM's own names. Zero points are for
//! symmetric codes all zero, and vLLM reads no `prob_scale`: both are passed over.

use std::fmt;

/// What precedes `layers.`: the language model of a checkpoint. Vision and audio towers have layers
/// too, but no KV cache.
const PREFIXES: [&str; 8] = [
    "",
    "model.",
    "transformer.",
    "backbone.",
    "model.decoder.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
];

/// Attention modules: of nearly every model, of NemotronH, and of others.
const MODULES: [&str; 4] = ["self_attn", "mixer", "attn", "attention"];

/// What a tensor is the scale of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    K,
    V,
    Q,
    /// Of K and V both.
    Kv,
    /// Not a scale: the offset of an affine code, which a scale alone does not decode.
    Offset,
}

/// The ways to name scales; each is one or two tools' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Naming {
    /// `self_attn.{k,v}_scale`: LLM Compressor, AutoFP8, Quark's fp8 mode, this crate.
    Attention,
    /// `self_attn.kv_scale`: AutoFP8 at first, one scale for both.
    Single,
    /// `self_attn.{k,v}_proj.{k,v}_scale`: ModelOpt; `mixer.` in NemotronH.
    Projection,
    /// `self_attn.qkv_proj.{k,v}_scale` and `qkqkv_proj`: the same on fused projections.
    FusedProjection,
    /// `self_attn.{k,v}_proj.output_scale`: Quark.
    Output,
    /// `self_attn.{k,v}_cache.scale`, with `self_attn.q.scale`: HYV3.
    Cache,
    /// `self_attn.attn.{k,v}_scale`: what vLLM names them when loaded.
    Vllm,
}

impl Naming {
    /// The pattern, below the layer.
    pub const fn pattern(self) -> &'static str {
        match self {
            Naming::Attention => "self_attn.{k,v}_scale",
            Naming::Single => "self_attn.kv_scale",
            Naming::Projection => "self_attn.{k,v}_proj.{k,v}_scale",
            Naming::FusedProjection => "self_attn.qkv_proj.{k,v}_scale",
            Naming::Output => "self_attn.{k,v}_proj.output_scale",
            Naming::Cache => "self_attn.{k,v}_cache.scale",
            Naming::Vllm => "self_attn.attn.{k,v}_scale",
        }
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pattern())
    }
}

/// Below the attention module, what it is, whose name it is.
const TABLE: [(&str, Role, Naming); 21] = [
    ("k_scale", Role::K, Naming::Attention),
    ("v_scale", Role::V, Naming::Attention),
    ("q_scale", Role::Q, Naming::Attention),
    ("kv_scale", Role::Kv, Naming::Single),
    ("k_proj.k_scale", Role::K, Naming::Projection),
    ("v_proj.v_scale", Role::V, Naming::Projection),
    ("qkv_proj.k_scale", Role::K, Naming::FusedProjection),
    ("qkv_proj.v_scale", Role::V, Naming::FusedProjection),
    ("qkqkv_proj.k_scale", Role::K, Naming::FusedProjection),
    ("qkqkv_proj.v_scale", Role::V, Naming::FusedProjection),
    ("k_proj.output_scale", Role::K, Naming::Output),
    ("v_proj.output_scale", Role::V, Naming::Output),
    ("q_proj.output_scale", Role::Q, Naming::Output),
    ("k_cache.scale", Role::K, Naming::Cache),
    ("v_cache.scale", Role::V, Naming::Cache),
    ("q.scale", Role::Q, Naming::Cache),
    ("attn.k_scale", Role::K, Naming::Vllm),
    ("attn.v_scale", Role::V, Naming::Vllm),
    ("attn.q_scale", Role::Q, Naming::Vllm),
    ("k_proj.k_bias", Role::Offset, Naming::Projection),
    ("v_proj.v_bias", Role::Offset, Naming::Projection),
];

/// A tensor's name, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScaleName {
    pub layer: usize,
    pub role: Role,
    pub naming: Naming,
}

impl ScaleName {
    pub fn parse(name: &str) -> Option<ScaleName> {
        let at = name.find("layers.")?;
        let (prefix, rest) = (&name[..at], &name[at + "layers.".len()..]);
        let (layer, rest) = rest.split_once('.')?;
        let (module, rest) = rest.split_once('.')?;
        let plain = layer.bytes().all(|b| b.is_ascii_digit()) && (layer == "0" || !layer.starts_with('0'));
        if !PREFIXES.contains(&prefix) || !MODULES.contains(&module) || !plain {
            return None;
        }
        let layer = layer.parse().ok()?;
        let row = TABLE.iter().find(|row| row.0 == rest)?;
        Some(ScaleName { layer, role: row.1, naming: row.2 })
    }
}

/// Whether a name that [`ScaleName::parse`] does not know ends as scales of K or V do.
pub(super) fn looks_like_kv_scale(name: &str) -> bool {
    const ENDS: [&str; 5] = [".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale"];
    const OTHER_CACHES: [&str; 3] = ["vision", "visual", "audio"];
    ENDS.iter().any(|end| name.ends_with(end))
        && ScaleName::parse(name).is_none()
        && !OTHER_CACHES.iter().any(|part| name.contains(part))
}

/// Whether a tensor is a scale of K or V, or named like one.
#[cfg(feature = "decoder")]
pub(crate) fn names_a_kv_scale(name: &str) -> bool {
    let scale = ScaleName::parse(name).is_some_and(|parsed| matches!(parsed.role, Role::K | Role::V | Role::Kv));
    scale || looks_like_kv_scale(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row of vLLM's table for K, V and Q, as a whole name.
    #[test]
    fn names_of_every_tool_are_understood() {
        use Role::{K, Kv, Q, V};
        for (name, layer, role) in [
            ("model.layers.3.self_attn.kv_scale", 3, Kv),
            ("model.layers.0.self_attn.k_proj.k_scale", 0, K),
            ("model.layers.0.self_attn.v_proj.v_scale", 0, V),
            ("model.layers.12.self_attn.qkv_proj.k_scale", 12, K),
            ("model.layers.12.self_attn.qkv_proj.v_scale", 12, V),
            ("model.layers.1.self_attn.qkqkv_proj.k_scale", 1, K),
            ("model.layers.1.self_attn.qkqkv_proj.v_scale", 1, V),
            ("backbone.layers.7.mixer.k_proj.k_scale", 7, K),
            ("backbone.layers.7.mixer.v_proj.v_scale", 7, V),
            ("model.layers.2.self_attn.q.scale", 2, Q),
            ("model.layers.2.self_attn.k_cache.scale", 2, K),
            ("model.layers.2.self_attn.v_cache.scale", 2, V),
            ("model.layers.40.self_attn.q_scale", 40, Q),
            ("model.layers.40.self_attn.k_scale", 40, K),
            ("model.language_model.layers.40.self_attn.v_scale", 40, V),
            ("model.layers.0.self_attn.k_proj.output_scale", 0, K),
            ("language_model.model.layers.0.self_attn.v_proj.output_scale", 0, V),
            ("model.layers.0.self_attn.q_proj.output_scale", 0, Q),
            ("model.layers.5.self_attn.attn.k_scale", 5, K),
        ] {
            let parsed = ScaleName::parse(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!((parsed.layer, parsed.role), (layer, role), "{name}");
            assert!(!looks_like_kv_scale(name));
        }
    }

    #[test]
    fn other_tensors_are_not_scales() {
        for name in [
            "",
            "layers.",
            "model.layers.0.self_attn.k_proj.weight_scale",
            "model.layers.0.self_attn.k_proj.input_scale",
            "model.layers.0.self_attn.k_zero_point",
            "model.layers.0.self_attn.prob_output_scale",
            "model.layers.0.mlp.k_scale_proj.weight",
            "model.layers.00.self_attn.k_scale",
            "model.layers.-1.self_attn.k_scale",
            "model.layers.99999999999999999999999.self_attn.k_scale",
            "model.vision_tower.encoder.layers.0.self_attn.k_scale",
        ] {
            assert_eq!(ScaleName::parse(name), None, "{name}");
        }
        assert!(looks_like_kv_scale("model.blocks.0.self_attn.k_scale"));
        assert!(looks_like_kv_scale("model.layers.0.self_attn.k_proj.v_scale"));
        assert!(!looks_like_kv_scale("vision_tower.layers.0.self_attn.k_scale"));
        assert!(!looks_like_kv_scale("model.layers.0.self_attn.k_proj.weight_scale"));
    }
}
