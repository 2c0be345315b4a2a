//! The command line.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};
use quantkv::calibrate::Observer;
use quantkv::scale::Granularity;

use crate::common::device::DeviceArgs;
use crate::common::program::positive;

/// Compute the FP8 scales of a model's KV cache from data, and write a checkpoint that has them.
#[derive(Debug, Parser)]
#[command(name = "calibrate", version, max_term_width = 100)]
#[command(group = ArgGroup::new("data").args(["text", "jsonl", "ids_file"]).required(true))]
pub struct Args {
    /// Model folder: config.json, *.safetensors, tokenizer.json; unquantized, without KV scales
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,

    /// Folder to make: the model with its scales. It must not exist, or be empty
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,

    /// Text to cut into samples; may be given several times: samples are then taken from the files in turn
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,

    /// File with a JSON object a line: {"text": ".."} is a sample; with --chat, {"messages": [..]}
    #[arg(long, value_name = "FILE")]
    pub jsonl: Option<PathBuf>,

    /// Render the messages of --jsonl with the model's chat template
    #[arg(long, requires = "jsonl")]
    pub chat: bool,

    /// JSON file with a list of lists of token ids, each a sample
    #[arg(long, value_name = "FILE")]
    pub ids_file: Option<PathBuf>,

    /// Samples to take at most
    #[arg(long, value_name = "N", default_value = "512", value_parser = positive, allow_negative_numbers = true)]
    pub samples: usize,

    /// Tokens of a sample at most [default: 2048, or what the model's positions allow]
    #[arg(long, value_name = "L", value_parser = positive, allow_negative_numbers = true)]
    pub sequence_length: Option<usize>,

    /// What becomes a scale: absmax (the largest magnitude), llmcompressor (its moving average, to the
    /// bit), mse (the least squared error) or percentile[=P] (P % of the values; 99.99)
    #[arg(long, value_name = "OBSERVER", default_value = "absmax", value_parser = observer)]
    pub observer: Observer,

    /// What shares a scale: all of K or V of a layer, a KV head of it, or a channel of a KV head
    #[arg(long, value_name = "STRATEGY", default_value = "tensor")]
    pub strategy: Strategy,

    #[command(flatten)]
    pub machine: DeviceArgs,

    /// Write nothing: show the scales, and what they would do to the data
    #[arg(long)]
    pub dry_run: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `--strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    Tensor,
    Head,
    Channel,
}

impl Strategy {
    pub fn granularity(self) -> Granularity {
        match self {
            Strategy::Tensor => Granularity::Tensor,
            Strategy::Head => Granularity::Head,
            Strategy::Channel => Granularity::Channel,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Strategy::Tensor => "tensor",
            Strategy::Head => "head",
            Strategy::Channel => "channel",
        }
    }
}

fn observer(text: &str) -> Result<Observer, String> {
    text.parse().map_err(|error: quantkv::Error| error.to_string())
}
