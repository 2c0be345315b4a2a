//! The few sizes of a model that its scales are checked against.

use std::path::Path;

use crate::error::{Error, Result};
use crate::json::{Object, read_object};
use crate::layout::MAX_HEAD_DIM;

// Limits far above any model that exists; they keep every product below 2^63 and every loop over
// a hostile number short.
pub(crate) const MAX_LAYERS: usize = 4096;
pub(crate) const MAX_WIDTH: usize = 1 << 22;
pub(crate) const MAX_HEADS: usize = 1 << 14;

/// What scales are checked against. An engine fills it in, or reads it from a `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// `model_type`, for scales files that name one.
    pub model_type: Option<String>,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; a divisor of the query heads.
    pub num_kv_heads: usize,
    /// Channels of a head, if known: scales per channel must be as many.
    pub head_dim: Option<usize>,
}

impl ModelShape {
    /// Reads `dir/config.json`: of a model of any architecture, its weights quantized or not, that names its
    /// sizes as Hugging Face models do, on the first level or in `text_config`.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; [`crate::Error::InvalidFile`] naming the field.
    pub fn from_dir(dir: &Path) -> Result<ModelShape> {
        let path = dir.join("config.json");
        ModelShape::parse(&Object { path: &path, prefix: "", map: &read_object(&path)? })
    }

    /// Checks what a caller filled in; a parsed one is within these limits.
    pub(super) fn check(&self) -> Result<()> {
        for (what, value, most, supported) in [
            ("the number of layers", self.num_layers, MAX_LAYERS, "1 to 4096"),
            ("the number of query heads", self.num_heads, MAX_HEADS, "1 to 16384"),
            ("the number of KV heads", self.num_kv_heads, MAX_HEADS, "1 to 16384"),
            ("the head dim", self.head_dim.unwrap_or(1), MAX_HEAD_DIM, "1 to 512"),
        ] {
            if !(1..=most).contains(&value) {
                return Err(Error::Unsupported { what, value, supported });
            }
        }
        match self.num_heads.is_multiple_of(self.num_kv_heads) {
            true => Ok(()),
            false => Err(Error::HeadsNotDivisible { num_heads: self.num_heads, num_kv_heads: self.num_kv_heads }),
        }
    }

    pub(super) fn parse(root: &Object<'_>) -> Result<ModelShape> {
        let model_type = root.str("model_type")?.map(str::to_owned);
        let sizes = match root.object("text_config")? {
            Some(map) if root.get("num_hidden_layers").is_none() => {
                Object { path: root.path, prefix: "text_config.", map }
            }
            _ => *root,
        };
        let num_layers = sizes.required_usize("num_hidden_layers", 1..=MAX_LAYERS)?;
        let num_heads = sizes.required_usize("num_attention_heads", 1..=MAX_HEADS)?;
        let num_kv_heads = sizes.usize("num_key_value_heads", 1..=MAX_HEADS)?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let reason = format!("is {num_kv_heads}, which does not divide num_attention_heads {num_heads}");
            return Err(sizes.invalid("num_key_value_heads", reason));
        }
        let head_dim = match sizes.usize("head_dim", 1..=MAX_HEAD_DIM)? {
            Some(head_dim) => Some(head_dim),
            None => {
                let hidden = sizes.usize("hidden_size", 1..=MAX_WIDTH)?;
                hidden.filter(|hidden| hidden.is_multiple_of(num_heads)).map(|hidden| hidden / num_heads)
            }
        };
        Ok(ModelShape { model_type, num_layers, num_heads, num_kv_heads, head_dim })
    }
}

#[cfg(feature = "decoder")]
impl From<&crate::decoder::Config> for ModelShape {
    fn from(config: &crate::decoder::Config) -> ModelShape {
        ModelShape {
            model_type: Some(config.architecture.name().to_owned()),
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: Some(config.head_dim),
        }
    }
}
