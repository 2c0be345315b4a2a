//! The command line: flags and sizes.

use std::path::PathBuf;

use clap::{ArgGroup, Parser};
use quantkv::checkpoint::MissingScales;
use quantkv::decoder::kv_scales::Divisors;

use crate::common::device::DeviceArgs;
use crate::common::program::positive;
use crate::scales::{KvScalesFlag, divisors, headroom, kv_scales};

/// Generate text with a Hugging Face model through a quantized paged KV cache.
#[derive(Debug, Parser)]
#[command(name = "generate", version, max_term_width = 100)]
#[command(group = ArgGroup::new("prompts").args(["prompt", "prompt_ids", "prompts_file", "prompt_length"]))]
#[command(group = ArgGroup::new("scales").args(["calculate_kv_scales", "scales_file"]))]
#[command(group = ArgGroup::new("pool").args(["num_blocks", "kv_memory"]))]
pub struct Args {
    /// Model folder: config.json, *.safetensors, tokenizer.json [default: the bundled models/tales-3m]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Make up the weights of a model of this shape, to measure steps: llama-3.1-8b, qwen3-8b, ..., or
    /// a folder with a config.json
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "prompt", "prompts_file", "chat", "scales_file", "stop"])]
    pub random_weights: Option<String>,

    /// Prompt text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Vec<String>,

    /// Prompt as token ids, such as 0,349,342; may be given several times
    #[arg(long, value_name = "IDS", value_parser = token_ids, allow_negative_numbers = true)]
    pub prompt_ids: Vec<TokenIds>,

    /// File with one prompt a line; empty lines are skipped
    #[arg(long, value_name = "FILE")]
    pub prompts_file: Option<PathBuf>,

    /// Prompts of this many random tokens, without end-of-sequence tokens to stop at
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    pub prompt_length: Option<usize>,

    /// How many prompts of --prompt-length
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive, requires = "prompt_length", allow_negative_numbers = true)]
    pub batch: usize,

    /// Treat each prompt as a user's message and render it with the model's chat template
    #[arg(long, conflicts_with_all = ["prompt_ids", "prompt_length"])]
    pub chat: bool,

    /// Tokens to generate at most [default: generation_config.json's max_new_tokens, else 128]
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    pub max_tokens: Option<usize>,

    /// Softmax temperature; 0 is greedy [default: the model's, if it samples, else 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,

    /// Keep the smallest set of tokens with this probability [default: the model's, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,

    /// Keep the K most likely tokens; 0 keeps all [default: the model's, else 0]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,

    /// Keep tokens at least this share as likely as the likeliest [default: the model's, else 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,

    /// Penalty of tokens in prompt and output; 1 is none [default: the model's, else 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,

    /// Penalty of a generated token for each time it was generated
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,

    /// Penalty of tokens that were generated
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,

    /// Key of the random generator; the same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,

    /// Samples per prompt; they share the prompt's blocks
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive, allow_negative_numbers = true)]
    pub n: usize,

    /// End a sample at this text, which is not printed; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,

    /// Do not end a sample at the model's end-of-sequence tokens
    #[arg(long)]
    pub ignore_eos: bool,

    /// How keys and values are stored; auto is the model's own dtype, fp8 is fp8_e4m3. fp8_e4m3_fnuz is gfx942's own
    /// E4M3: given scales are doubled for it
    #[arg(long, value_name = "DTYPE", default_value = "fp8", value_parser = ["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_fnuz"])]
    pub kv_cache_dtype: String,

    /// Take the scales from the first forward pass: the largest K / 200, the largest V / 100
    #[arg(long)]
    pub calculate_kv_scales: bool,

    /// Take the scales from a kv_cache_scales.json
    #[arg(long, value_name = "FILE")]
    pub scales_file: Option<PathBuf>,

    /// Where scales come from, how many values share one, or both with a comma between: checkpoint (the
    /// default), first-batch (as --calculate-kv-scales), running or running:TOKENS (follow the largest
    /// values of the first TOKENS, 512, then stay), dynamic (one for each token and KV head); tensor,
    /// head, channel
    #[arg(long, value_name = "HOW", value_parser = kv_scales)]
    pub kv_scales: Option<KvScalesFlag>,

    /// What --calculate-kv-scales divides the largest K and the largest V by [default: 200,100]
    #[arg(long, value_name = "K,V", value_parser = divisors, allow_hyphen_values = true)]
    pub kv_scale_divisors: Option<Divisors>,

    /// How far above the largest value seen --kv-scales running stays [default: 1.25]
    #[arg(long, value_name = "FACTOR", value_parser = headroom, allow_negative_numbers = true)]
    pub kv_scale_headroom: Option<f32>,

    /// What to do where the checkpoint or file has scales for some layers only: stop, or take 1.0 for the rest
    #[arg(long, value_name = "WHAT", default_value = "error")]
    pub missing_kv_scales: MissingKvScales,

    #[command(flatten)]
    pub machine: DeviceArgs,

    /// Do not record and replay decode steps as CUDA graphs
    #[arg(long)]
    pub no_graphs: bool,

    /// Tokens in a block of the cache: a power of two from 8 to 256
    #[arg(long, value_name = "B", default_value_t = 16, allow_negative_numbers = true)]
    pub block_size: usize,

    /// Blocks in the cache
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    pub num_blocks: Option<usize>,

    /// Memory for the cache, such as 64MiB, 1GiB, 500MB or bytes [default: 64MiB, or what --prompt-length
    /// needs]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true)]
    pub kv_memory: Option<usize>,

    /// Blocks in host memory for preempted sequences [default: 64MiB of them, at most the cache's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub swap_blocks: Option<usize>,

    /// Do not share the blocks of common prompt beginnings
    #[arg(long)]
    pub no_prefix_sharing: bool,

    /// Prompt tokens computed in one step
    #[arg(long, value_name = "N", default_value = "512", value_parser = positive, allow_negative_numbers = true)]
    pub max_prefill_tokens: usize,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,

    /// Run the prompts under auto, fp8_e4m3 and fp8_e5m2 and print them side by side
    #[arg(long)]
    pub compare: bool,
}

/// `--missing-kv-scales`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MissingKvScales {
    Error,
    One,
}

impl From<MissingKvScales> for MissingScales {
    fn from(given: MissingKvScales) -> Self {
        match given {
            MissingKvScales::Error => MissingScales::Error,
            MissingKvScales::One => MissingScales::One,
        }
    }
}

/// Ids of one prompt. (A newtype: clap would take a `Vec` for repeated values.)
#[derive(Clone, Debug)]
pub struct TokenIds(pub Vec<u32>);

fn token_ids(text: &str) -> Result<TokenIds, String> {
    let parse = |part: &str| part.trim().parse().map_err(|_| format!("{part:?} is not a token id"));
    text.split(',').map(parse).collect::<Result<_, _>>().map(TokenIds)
}

/// `64MiB`, `1GiB`, `500MB`, `1.5GB`, `4096`: powers of 1024 with an i, of 1000 without.
pub fn size(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, f64); 9] = [
        ("KIB", 1024.0),
        ("MIB", 1_048_576.0),
        ("GIB", 1_073_741_824.0),
        ("TIB", 1_099_511_627_776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let expected = || "expected a size such as 64MiB, 1GiB, 500MB or a number of bytes".to_owned();
    let upper = text.trim().to_ascii_uppercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| upper.strip_suffix(name).map(|number| (number.trim_end(), *unit)))
        .unwrap_or((&upper, 1.0));
    if let (Ok(bytes), true) = (number.parse::<usize>(), unit == 1.0) {
        return if bytes == 0 { Err("it must not be zero".into()) } else { Ok(bytes) };
    }
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let bytes = number.parse::<f64>().ok().filter(|_| plain).ok_or_else(expected)? * unit;
    match bytes {
        b if b < 1.0 => Err("it must not be zero".into()),
        b if b >= usize::MAX as f64 => Err("it exceeds the address space".into()),
        b => Ok(b as usize),
    }
}
