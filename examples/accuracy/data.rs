//! What is measured on: texts to score, texts to calibrate on, prompts to continue.
//!
//! Texts that are scored give no scales, and the other way round. A file is cut into windows, and these
//! are dealt to both; tales are told from a stream of their own each.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use quantkv::decoder::Config;
use quantkv::decoder::tokenizer::Tokenizer;

use crate::args::Args;
use crate::common::program::Failure;
use crate::tales::Teller;

const MAX_FILE_BYTES: u64 = 256 << 20;

/// A window shorter than this says little, and has no two halves.
pub const SHORTEST: usize = 8;

/// Tokens that a fact with its question and answer takes in a tale, about.
const TOKENS_A_FACT: usize = 40;

/// Streams of a seed.
const EVALUATION: u64 = 0;
const CALIBRATION: u64 = 1;
const RECALL: u64 = 2;

/// A prompt, and if it is a tale's question the answer.
pub struct Prompt {
    pub ids: Vec<u32>,
    pub answer: Option<String>,
}

/// All that is run.
pub struct Data {
    pub calibration: Vec<Vec<u32>>,
    pub evaluation: Vec<Vec<u32>>,
    pub prompts: Vec<Prompt>,
    /// Where the texts come from.
    pub source: String,
}

impl Data {
    pub fn load(args: &Args, config: &Config, tokenizer: Option<&Tokenizer>) -> Result<Data, Failure> {
        if args.sequence_length > config.max_position_embeddings {
            let (length, positions) = (args.sequence_length, config.max_position_embeddings);
            return Err(Failure::User(format!("--sequence-length {length}: the model has {positions} positions")));
        }
        let (evaluation, calibration, source) = match (&args.ids_file, tokenizer) {
            (Some(path), _) => from_windows(args, read_ids(path, config.vocab_size, args.sequence_length)?, path)?,
            (None, None) => {
                return Err(Failure::User("the model has no tokenizer.json: give --ids-file FILE".into()));
            }
            (None, Some(tokenizer)) if args.text.is_empty() => {
                let texts = |stream, count| tales(args, config, tokenizer, stream, count);
                let source = format!("tales of seed {}", args.seed);
                (texts(EVALUATION, args.samples)?, texts(CALIBRATION, args.calibration_samples)?, source)
            }
            (None, Some(tokenizer)) => {
                let mut windows = Vec::new();
                for path in &args.text {
                    windows.extend(read_text(path, tokenizer, args.sequence_length)?);
                }
                from_windows(args, windows, &args.text[0])?
            }
        };
        let prompts = match args.tales() {
            0 => beginnings(&evaluation),
            count => recall_prompts(args, count, tokenizer)?,
        };
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        if longest.saturating_add(args.max_tokens) > config.max_position_embeddings {
            let (tokens, positions) = (args.max_tokens, config.max_position_embeddings);
            return Err(Failure::User(format!(
                "a prompt of {longest} tokens and {tokens} more (--max-tokens) exceed the model's {positions} positions"
            )));
        }
        Ok(Data { calibration, evaluation, prompts, source })
    }
}

type Dealt = (Vec<Vec<u32>>, Vec<Vec<u32>>, String);

/// Deals windows to both sets in turn, and what one has no use for to the other.
fn from_windows(args: &Args, windows: Vec<Vec<u32>>, path: &Path) -> Result<Dealt, Failure> {
    let name = path.display();
    if windows.len() < 2 {
        let (have, length) = (windows.len(), args.sequence_length);
        return Err(Failure::User(format!(
            "{name} has {have} windows of up to {length} tokens; at least 2 are needed, one to score and one for the \
             scales (see --sequence-length)"
        )));
    }
    let (mut evaluation, mut calibration) = (Vec::new(), Vec::new());
    for (number, window) in windows.into_iter().enumerate() {
        let calibrate = calibration.len() < args.calibration_samples;
        let score = evaluation.len() < args.samples;
        match (number % 2, score, calibrate) {
            (0, true, _) | (_, true, false) => evaluation.push(window),
            (_, _, true) => calibration.push(window),
            (_, false, false) => break,
        }
    }
    let more = if args.text.len() > 1 { format!(" and {} more", args.text.len() - 1) } else { String::new() };
    Ok((evaluation, calibration, format!("{name}{more}")))
}

fn read_file(path: &Path) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::User(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Failure::User(format!("{} is larger than {MAX_FILE_BYTES} bytes", path.display())));
    }
    Ok(text)
}

/// Windows of a text, each begun as the tokenizer begins a text.
fn read_text(path: &Path, tokenizer: &Tokenizer, length: usize) -> Result<Vec<Vec<u32>>, Failure> {
    let ids = tokenizer.encode(&read_file(path)?, false)?;
    let begin = tokenizer.encode("", true)?;
    let body = length.saturating_sub(begin.len()).max(1);
    let windows = ids.chunks(body).map(|chunk| [&begin, chunk].concat());
    Ok(windows.filter(|window| window.len() >= SHORTEST).collect())
}

/// Windows of a JSON list of token-id lists.
fn read_ids(path: &Path, vocab_size: usize, length: usize) -> Result<Vec<Vec<u32>>, Failure> {
    let invalid = |what: String| Failure::User(format!("{}: {what}", path.display()));
    let lists: Vec<Vec<u32>> = serde_json::from_str(&read_file(path)?)
        .map_err(|error| invalid(format!("expected a JSON list of lists of token ids: {error}")))?;
    if let Some(id) = lists.iter().flatten().find(|id| **id as usize >= vocab_size) {
        return Err(invalid(format!("token id {id} is outside the vocabulary of {vocab_size}")));
    }
    let windows = lists.iter().flat_map(|ids| ids.chunks(length)).map(<[u32]>::to_vec);
    Ok(windows.filter(|window| window.len() >= SHORTEST).collect())
}

/// Texts of `--sequence-length` tokens: tales with their questions and answers, one after the other.
fn tales(
    args: &Args,
    config: &Config,
    tokenizer: &Tokenizer,
    stream: u64,
    count: usize,
) -> Result<Vec<Vec<u32>>, Failure> {
    let mut teller = Teller::new(args.seed, stream);
    let length = args.sequence_length;
    let facts = (length / TOKENS_A_FACT).clamp(1, crate::tales::MAX_FACTS);
    let mut text = || {
        let mut ids: Vec<u32> = Vec::new();
        while ids.len() < length {
            if !ids.is_empty() {
                ids.extend(config.eos_token_ids.first());
            }
            ids.extend(tokenizer.encode(&teller.tale(facts, facts).document(), true)?);
        }
        ids.truncate(length);
        Ok(ids)
    };
    (0..count).map(|_| text()).collect()
}

/// `count` tales for each number of facts.
fn recall_prompts(args: &Args, count: usize, tokenizer: Option<&Tokenizer>) -> Result<Vec<Prompt>, Failure> {
    let Some(tokenizer) = tokenizer else {
        return Err(Failure::User("--tales needs a tokenizer.json in the model's folder".into()));
    };
    let mut teller = Teller::new(args.seed, RECALL);
    let mut prompts = Vec::new();
    for &facts in &args.facts {
        for _ in 0..count {
            let tale = teller.tale(facts, args.fillers);
            let (text, answer) = tale.recall_case();
            prompts.push(Prompt { ids: tokenizer.encode(&text, true)?, answer: Some(answer.to_owned()) });
        }
    }
    Ok(prompts)
}

/// The first half of each text.
fn beginnings(texts: &[Vec<u32>]) -> Vec<Prompt> {
    texts.iter().map(|ids| Prompt { ids: ids[..ids.len() / 2].to_vec(), answer: None }).collect()
}
