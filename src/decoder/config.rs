//! `config.json` and `generation_config.json`.
//!
//! Every field that changes the result is read and checked here, once; what the decoder does not
//! implement is refused by name. Both spellings are understood: transformers 5 (`rope_parameters`,
//! `dtype`) and transformers 4 (`rope_theta` + `rope_scaling`, `torch_dtype`).

use std::path::Path;

use serde_json::Value;

use super::json::{Object, kind, read_object};
use super::rope::RopeConfig;
use crate::checkpoint::{MAX_HEADS, MAX_LAYERS, MAX_WIDTH};
use crate::error::Result;
use crate::format::DType;
use crate::layout::MAX_HEAD_DIM;

/// The model families the decoder knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2, 3 and everything that copies them.
    Llama,
    /// Llama with sliding-window attention on every layer and no biases.
    Mistral,
    /// Biases on q, k, v; windows from a layer on.
    Qwen2,
    /// RMSNorm over each head of q and k before RoPE.
    Qwen3,
}

impl Architecture {
    /// (architecture, `model_type`, name in `architectures`).
    const TABLE: [(Architecture, &'static str, &'static str); 4] = [
        (Architecture::Llama, "llama", "LlamaForCausalLM"),
        (Architecture::Mistral, "mistral", "MistralForCausalLM"),
        (Architecture::Qwen2, "qwen2", "Qwen2ForCausalLM"),
        (Architecture::Qwen3, "qwen3", "Qwen3ForCausalLM"),
    ];

    /// The `model_type` string.
    pub fn name(self) -> &'static str {
        Self::TABLE.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }
}

// Limits like those of `checkpoint`, far above any model that exists. Weights must exist in the files at
// these sizes anyway.
const MAX_VOCAB: usize = 1 << 26;
const MAX_POSITIONS: usize = i32::MAX as usize;

/// What `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Model family.
    pub architecture: Architecture,
    /// Rows of the embedding and of the logits.
    pub vocab_size: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; a divisor of the query heads.
    pub num_kv_heads: usize,
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Positions the model was made for. Not enforced by the model; an engine should.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// Whether the logits use the embedding matrix; then there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// For each layer the keys a query sees, itself included; `None` for all of them.
    pub sliding_windows: Vec<Option<usize>>,
    /// `dtype` (or `torch_dtype`) if the file names one: the model's own dtype.
    pub dtype: Option<DType>,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence; `generation_config.json` overrides them.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// [`crate::Error::Io`], [`crate::Error::InvalidFile`] naming the field, or
    /// [`crate::Error::UnsupportedModel`] naming what is not implemented.
    pub fn from_dir(dir: &Path) -> Result<Config> {
        Config::from_file(&dir.join("config.json"))
    }

    /// Reads a `config.json` by its path.
    ///
    /// # Errors
    /// As [`Config::from_dir`].
    pub fn from_file(path: &Path) -> Result<Config> {
        let map = read_object(path)?;
        parse(&Object { path, prefix: "", map: &map })
    }

    /// Reads a configuration that is not in a file of its own.
    pub(crate) fn from_object(root: &Object<'_>) -> Result<Config> {
        parse(root)
    }

    /// Weights of the model: matrices, norms and biases. Saturates.
    pub fn num_parameters(&self) -> usize {
        let width = |heads: usize| heads.saturating_mul(self.head_dim);
        let (q, kv) = (width(self.num_heads), width(self.num_kv_heads));
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        // (outputs, inputs, bias) of each linear layer.
        let linear = [
            (q, hidden, self.qkv_bias),
            (kv, hidden, self.qkv_bias),
            (kv, hidden, self.qkv_bias),
            (hidden, q, self.o_bias),
            (inner, hidden, self.mlp_bias),
            (inner, hidden, self.mlp_bias),
            (hidden, inner, self.mlp_bias),
        ];
        let size = |(outputs, inputs, bias): (usize, usize, bool)| {
            outputs.saturating_mul(inputs).saturating_add(if bias { outputs } else { 0 })
        };
        let norms = 2 * hidden + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = linear.into_iter().map(size).fold(norms, usize::saturating_add);
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let embeddings = self.vocab_size.saturating_mul(hidden).saturating_mul(tables);
        layer.saturating_mul(self.num_layers).saturating_add(embeddings).saturating_add(hidden)
    }

    /// Query heads that share a KV head.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

fn parse(root: &Object<'_>) -> Result<Config> {
    let architecture = parse_architecture(root)?;
    check_quantization(root)?;
    let hidden_act = root.str("hidden_act")?.unwrap_or("silu");
    if hidden_act != "silu" {
        return Err(root.unsupported("hidden_act", hidden_act, "silu"));
    }

    let hidden_size = root.required_usize("hidden_size", 1..=MAX_WIDTH)?;
    let num_layers = root.required_usize("num_hidden_layers", 1..=MAX_LAYERS)?;
    let num_heads = root.required_usize("num_attention_heads", 1..=MAX_HEADS)?;
    let num_kv_heads = root.usize("num_key_value_heads", 1..=MAX_HEADS)?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let reason = format!("is {num_kv_heads}, which does not divide num_attention_heads {num_heads}");
        return Err(root.invalid("num_key_value_heads", reason));
    }
    let max_position_embeddings = root.usize("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(2048);
    let head_dim = parse_head_dim(root, architecture, hidden_size, num_heads)?;
    let attention_bias = root.bool("attention_bias")?.unwrap_or(false);
    let mlp_bias = root.bool("mlp_bias")?.unwrap_or(false);
    let (qkv_bias, o_bias) = match architecture {
        Architecture::Llama | Architecture::Qwen3 => (attention_bias, attention_bias),
        Architecture::Qwen2 => (true, false),
        Architecture::Mistral => (false, false),
    };

    Ok(Config {
        architecture,
        vocab_size: root.required_usize("vocab_size", 1..=MAX_VOCAB)?,
        hidden_size,
        intermediate_size: root.required_usize("intermediate_size", 1..=MAX_WIDTH)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings,
        rms_norm_eps: root.f64("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
        rope: RopeConfig::parse(root, head_dim, max_position_embeddings)?,
        qkv_bias,
        o_bias,
        mlp_bias: architecture == Architecture::Llama && mlp_bias,
        qk_norm: architecture == Architecture::Qwen3,
        tie_word_embeddings: root.bool("tie_word_embeddings")?.unwrap_or(false),
        sliding_windows: parse_sliding_windows(root, architecture, num_layers)?,
        dtype: parse_dtype(root)?,
        bos_token_id: root.token_ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
        eos_token_ids: root.token_ids("eos_token_id")?.unwrap_or_default(),
    })
}

fn parse_architecture(root: &Object<'_>) -> Result<Architecture> {
    const SUPPORTED: &str = "llama, mistral, qwen2, qwen3";
    const SUPPORTED_CLASSES: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";
    let mut by_class = None;
    if let Some(first) = root.array("architectures")?.and_then(<[Value]>::first) {
        let Value::String(class) = first else {
            return Err(root.invalid("architectures[0]", format!("is {}, expected a string", kind(first))));
        };
        match Architecture::TABLE.iter().find(|row| row.2 == class) {
            Some(row) => by_class = Some(row.0),
            None => return Err(root.unsupported("architectures", class, SUPPORTED_CLASSES)),
        }
    }
    match root.str("model_type")? {
        Some(model_type) => match Architecture::TABLE.iter().find(|row| row.1 == model_type) {
            Some(row) => Ok(row.0),
            None => Err(root.unsupported("model_type", model_type, SUPPORTED)),
        },
        None => by_class.ok_or_else(|| root.invalid("model_type", "is missing")),
    }
}

/// `head_dim`, or `hidden_size / num_attention_heads`. Qwen3's own default is 128.
fn parse_head_dim(root: &Object<'_>, arch: Architecture, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let head_dim = match root.usize("head_dim", 1..=MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        // A present null means "derive it"; only an absent field takes the class default.
        None if arch == Architecture::Qwen3 && !root.map.contains_key("head_dim") => 128,
        None if !hidden_size.is_multiple_of(num_heads) => {
            let reason =
                format!("is {hidden_size}, no multiple of num_attention_heads {num_heads}, and head_dim is not given");
            return Err(root.invalid("hidden_size", reason));
        }
        None => hidden_size / num_heads,
    };
    if head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) {
        return Err(root.unsupported("head_dim", &head_dim.to_string(), "even numbers from 2 to 512"));
    }
    Ok(head_dim)
}

fn parse_sliding_windows(root: &Object<'_>, arch: Architecture, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = root.usize("sliding_window", 1..=usize::MAX)?;
    if let Some(types) = root.array("layer_types")? {
        return windows_by_layer_type(root, arch, types, window, num_layers);
    }
    Ok(match arch {
        Architecture::Llama => vec![None; num_layers],
        Architecture::Mistral => vec![window; num_layers],
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let used = root.bool("use_sliding_window")?.unwrap_or(false);
            let first = root.usize("max_window_layers", 0..=usize::MAX)?.unwrap_or(28);
            (0..num_layers).map(|layer| window.filter(|_| used && layer >= first)).collect()
        }
    })
}

fn windows_by_layer_type(
    root: &Object<'_>,
    arch: Architecture,
    types: &[Value],
    window: Option<usize>,
    num_layers: usize,
) -> Result<Vec<Option<usize>>> {
    if types.len() != num_layers {
        let reason = format!("has {} entries, num_hidden_layers is {num_layers}", types.len());
        return Err(root.invalid("layer_types", reason));
    }
    // transformers clears sliding_window when use_sliding_window is false (Qwen), and lets no
    // layer type give a window to Llama.
    let qwen = matches!(arch, Architecture::Qwen2 | Architecture::Qwen3);
    let window = if qwen && !root.bool("use_sliding_window")?.unwrap_or(false) { None } else { window };
    types
        .iter()
        .map(|value| match value.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") if arch == Architecture::Llama => {
                Err(root.unsupported("layer_types", "sliding_attention", "full_attention for llama"))
            }
            Some("sliding_attention") => Ok(window),
            Some(other) => Err(root.unsupported("layer_types", other, "full_attention, sliding_attention")),
            None => Err(root.invalid("layer_types", format!("holds {}, expected strings", kind(value)))),
        })
        .collect()
}

fn parse_dtype(root: &Object<'_>) -> Result<Option<DType>> {
    let field = if root.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match root.str(field)? {
        None | Some("auto") => Ok(None),
        Some("float32") => Ok(Some(DType::F32)),
        Some("float16") => Ok(Some(DType::F16)),
        Some("bfloat16") => Ok(Some(DType::BF16)),
        Some(other) => Err(root.unsupported(field, other, "float32, float16, bfloat16")),
    }
}

/// Accepts a `quantization_config` that concerns the KV cache only (`checkpoint` reads that), and refuses
/// one that quantizes weights.
fn check_quantization(root: &Object<'_>) -> Result<()> {
    const SUPPORTED: &str = "unquantized weights (KV cache schemes of compressed-tensors and modelopt are read)";
    let Some(map) = root.object("quantization_config")? else { return Ok(()) };
    let config = Object { path: root.path, prefix: "quantization_config.", map };
    match config.str("quant_method")? {
        _ if map.is_empty() => return Ok(()),
        Some("compressed-tensors" | "modelopt") => {}
        Some(other) => return Err(config.unsupported("quant_method", other, SUPPORTED)),
        None => return Err(config.invalid("quant_method", "is missing")),
    }
    if let Some(algorithm) = config.str("quant_algo")? {
        return Err(config.unsupported("quant_algo", algorithm, SUPPORTED));
    }
    if let Some(groups) = config.object("config_groups")? {
        for (name, group) in groups {
            let Value::Object(map) = group else {
                return Err(config.invalid(&format!("config_groups.{name}"), format!("is {}", kind(group))));
            };
            let prefix = format!("quantization_config.config_groups.{name}.");
            let group = Object { path: root.path, prefix: &prefix, map };
            if group.get("weights").is_some() {
                return Err(group.unsupported("weights", "quantized", SUPPORTED));
            }
        }
    }
    Ok(())
}

/// What `generation_config.json` says; everything is optional.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence, any of them; overrides [`Config::eos_token_ids`].
    pub eos_token_ids: Option<Vec<u32>>,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens with this probability.
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f32>,
    /// Penalty of tokens seen before.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads `dir/generation_config.json`; all `None` if there is no such file.
    ///
    /// # Errors
    /// [`crate::Error::Io`] (other than "not found") and [`crate::Error::InvalidFile`].
    pub fn from_dir(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        if !path.exists() {
            return Ok(GenerationConfig::default());
        }
        let map = read_object(&path)?;
        let root = Object { path: &path, prefix: "", map: &map };
        let first = |ids: Option<Vec<u32>>| ids.and_then(|ids| ids.first().copied());
        let number = |field, max| Ok::<_, crate::Error>(root.f64(field, 0.0..=max)?.map(|x| x as f32));
        // vLLM writes -1 for "off".
        let top_k = match root.get("top_k").and_then(Value::as_i64) {
            Some(-1) => Some(0),
            _ => root.usize("top_k", 0..=usize::MAX)?,
        };
        Ok(GenerationConfig {
            eos_token_ids: root.token_ids("eos_token_id")?,
            bos_token_id: first(root.token_ids("bos_token_id")?),
            pad_token_id: first(root.token_ids("pad_token_id")?),
            do_sample: root.bool("do_sample")?,
            temperature: number("temperature", f64::from(f32::MAX))?,
            top_k,
            top_p: number("top_p", 1.0)?,
            min_p: number("min_p", 1.0)?,
            repetition_penalty: number("repetition_penalty", f64::from(f32::MAX))?,
            max_new_tokens: root.usize("max_new_tokens", 0..=usize::MAX)?,
        })
    }
}
