//! The command line.

use std::path::PathBuf;

use clap::Parser;

use crate::common::device::DeviceArgs;
use crate::common::program::positive;
use crate::data::SHORTEST;
use crate::tales::MAX_FACTS;

/// Texts, tales and sentences at most: they are made before anything is measured.
const MOST: usize = 10_000;

/// Measure what each format and scale of the KV cache does to a model's predictions.
#[derive(Debug, Parser)]
#[command(name = "accuracy", version, max_term_width = 100)]
pub struct Args {
    /// Model folder: config.json, *.safetensors, tokenizer.json [default: the bundled models/tales-3m]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Text to score and to take scales from; may be given several times [default: tales made on the spot]
    #[arg(long, value_name = "FILE", conflicts_with = "ids_file")]
    pub text: Vec<PathBuf>,

    /// The same as token ids: a JSON list of lists of ids
    #[arg(long, value_name = "FILE")]
    pub ids_file: Option<PathBuf>,

    /// Texts to score, at most
    #[arg(long, value_name = "N", default_value = "32", value_parser = count, allow_negative_numbers = true)]
    pub samples: usize,

    /// Other texts to take scales from, at most
    #[arg(long, value_name = "N", default_value = "32", value_parser = count, allow_negative_numbers = true)]
    pub calibration_samples: usize,

    /// Tokens of a text
    #[arg(long, value_name = "L", default_value = "256", value_parser = length, allow_negative_numbers = true)]
    pub sequence_length: usize,

    /// Tales to ask a question about, for each number of facts [default: 25 with the bundled model, else none]
    #[arg(long, value_name = "N", value_parser = count_or_none, allow_negative_numbers = true)]
    pub tales: Option<usize>,

    /// Numbers of facts of these tales
    #[arg(long, value_name = "LIST", default_value = "4,12", value_delimiter = ',', value_parser = facts, allow_negative_numbers = true)]
    pub facts: Vec<usize>,

    /// Sentences without a fact in each of them
    #[arg(long, value_name = "N", default_value = "20", value_parser = count_or_none, allow_negative_numbers = true)]
    pub fillers: usize,

    /// Greedy tokens after each tale, or after the first half of each text if there are none
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive, allow_negative_numbers = true)]
    pub max_tokens: usize,

    /// Key of the random generator that tells tales
    #[arg(long, value_name = "S", default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,

    /// Rows, separated by commas: all, failures, a cache format, or names as in the JSON output
    #[arg(long, value_name = "LIST", default_value = "all", value_delimiter = ',')]
    pub formats: Vec<String>,

    /// Write accuracy.csv, accuracy.json and accuracy.svg to this folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Print one JSON object instead of the table
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub machine: DeviceArgs,
}

impl Args {
    /// Tales for each number of facts.
    pub fn tales(&self) -> usize {
        self.tales.unwrap_or(if self.model.is_none() { 25 } else { 0 })
    }
}

fn length(text: &str) -> Result<usize, String> {
    match positive(text)? {
        short if short < SHORTEST => Err(format!("it must be at least {SHORTEST}")),
        length => Ok(length),
    }
}

fn count(text: &str) -> Result<usize, String> {
    positive(text).and_then(at_most)
}

fn count_or_none(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "expected a whole number".to_owned()).and_then(at_most)
}

fn at_most(count: usize) -> Result<usize, String> {
    if count > MOST { Err(format!("it must be at most {MOST}")) } else { Ok(count) }
}

fn facts(text: &str) -> Result<usize, String> {
    match positive(text)? {
        many if many > MAX_FACTS => Err(format!("a tale has at most {MAX_FACTS} facts")),
        facts => Ok(facts),
    }
}
