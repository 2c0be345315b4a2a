//! From the user's files to samples of token ids.
//!
//! ```text
//! --text       special tokens (BOS) + the next L tokens of the text; samples from several files in turn
//! --jsonl      one sample a line, cut to L tokens
//! --ids-file   one sample a list, cut to L tokens
//! ```
//! No more is read than the samples asked for can take.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use quantkv::decoder::Config;
use quantkv::decoder::chat::{ChatTemplate, Message};
use quantkv::decoder::tokenizer::Tokenizer;
use serde_json::Value;

use crate::args::Args;
use crate::common::program::Failure;

const DEFAULT_LENGTH: usize = 2048;
/// More than a token has on average in any language.
const BYTES_A_TOKEN: u64 = 16;
const MAX_LINE_BYTES: u64 = 64 << 20;
const MAX_IDS_BYTES: u64 = 1 << 30;

/// Reads the samples, checked against the model's vocabulary: at least one, none empty.
pub fn read(args: &Args, config: &Config) -> Result<Vec<Vec<u32>>, Failure> {
    let positions = config.max_position_embeddings;
    let length = args.sequence_length.unwrap_or(DEFAULT_LENGTH.min(positions));
    if length > positions {
        return Err(Failure::User(format!("--sequence-length {length}: the model has {positions} positions")));
    }
    let (source, mut samples) = match (&args.jsonl, &args.ids_file) {
        (Some(path), _) => (path, lines(args, path)?),
        (_, Some(path)) => (path, ids(path)?),
        _ => (&args.text[0], texts(args, length)?),
    };
    samples.truncate(args.samples);
    if samples.is_empty() {
        return Err(user(source, "holds no sample"));
    }
    for (number, sample) in samples.iter_mut().enumerate() {
        sample.truncate(length);
        let vocab_size = config.vocab_size;
        let problem = match sample.iter().find(|id| **id as usize >= vocab_size) {
            Some(id) => format!("token id {id} of sample {} is outside the vocabulary of {vocab_size}", number + 1),
            None if sample.is_empty() => format!("sample {} has no tokens", number + 1),
            None => continue,
        };
        return Err(user(source, &problem));
    }
    Ok(samples)
}

fn user(path: &Path, problem: &str) -> Failure {
    Failure::User(format!("{}: {problem}", path.display()))
}

fn open(path: &Path) -> Result<File, Failure> {
    let file = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = file.map_err(|error| user(path, &error.to_string()))?;
    if metadata.is_dir() { Err(user(path, "is a folder")) } else { Ok(file) }
}

/// Pieces of `length` tokens of each file of `--text`, one from each in turn.
fn texts(args: &Args, length: usize) -> Result<Vec<Vec<u32>>, Failure> {
    let tokenizer = Tokenizer::from_model_dir(&args.model)?;
    let special = tokenizer.encode("", true)?;
    let room = length.saturating_sub(special.len()).max(1);
    let mut files = Vec::new();
    for path in &args.text {
        let limit = (args.samples as u64).saturating_mul(room as u64).saturating_mul(BYTES_A_TOKEN);
        let ids = tokenizer.encode(&text(path, limit.max(1 << 16))?, false)?;
        let pieces = ids.chunks(room).map(|piece| [&special[..], piece].concat());
        files.push(pieces.collect::<Vec<_>>().into_iter());
    }
    let mut samples = Vec::new();
    while samples.len() < args.samples {
        let before = samples.len();
        samples.extend(files.iter_mut().filter_map(Iterator::next));
        if samples.len() == before {
            break;
        }
    }
    Ok(samples)
}

/// The beginning of a text, at most `limit` bytes.
fn text(path: &Path, limit: u64) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    open(path)?.take(limit).read_to_end(&mut bytes).map_err(|error| user(path, &error.to_string()))?;
    let whole = (bytes.len() as u64) < limit;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        // The limit may lie inside a character.
        Err(error) if !whole && error.utf8_error().error_len().is_none() => {
            let end = error.utf8_error().valid_up_to();
            String::from_utf8_lossy(&error.as_bytes()[..end]).into_owned()
        }
        Err(error) => return Err(user(path, &format!("is not UTF-8 text: {}", error.utf8_error()))),
    };
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The samples of `--jsonl`.
fn lines(args: &Args, path: &Path) -> Result<Vec<Vec<u32>>, Failure> {
    let tokenizer = Tokenizer::from_model_dir(&args.model)?;
    let template = if args.chat { ChatTemplate::from_model_dir(&args.model)? } else { None };
    if args.chat && template.is_none() {
        let why = "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)";
        return Err(user(&args.model, why));
    }
    let mut reader = BufReader::new(open(path)?);
    let (mut samples, mut number) = (Vec::new(), 0);
    while samples.len() < args.samples {
        let mut line = String::new();
        number += 1;
        let wrong = |problem: String| user(path, &format!("line {number}: {problem}"));
        let read = reader.by_ref().take(MAX_LINE_BYTES).read_line(&mut line).map_err(|e| wrong(e.to_string()))?;
        match line.trim() {
            _ if read == 0 => break,
            _ if read as u64 == MAX_LINE_BYTES => return Err(wrong(format!("is longer than {MAX_LINE_BYTES} bytes"))),
            "" => continue,
            line => {
                let object: Value = serde_json::from_str(line).map_err(|e| wrong(format!("is not JSON: {e}")))?;
                let ids = match &template {
                    // The template prints its special tokens.
                    Some(template) => {
                        let messages = messages(&object).map_err(wrong)?;
                        tokenizer.encode(&template.render(&messages, false)?, false)?
                    }
                    None => {
                        let text = object.get("text").and_then(Value::as_str);
                        let text = text.ok_or_else(|| wrong("has no \"text\" that is a string".into()))?;
                        tokenizer.encode(text, true)?
                    }
                };
                samples.push(ids);
            }
        }
    }
    Ok(samples)
}

/// `{"messages": [{"role": .., "content": ..}]}`
fn messages(object: &Value) -> Result<Vec<Message>, String> {
    let list = object.get("messages").and_then(Value::as_array).ok_or("has no \"messages\" that are a list")?;
    let message = |message: &Value| {
        let field = |name| message.get(name).and_then(Value::as_str);
        Some(Message::new(field("role")?, field("content")?))
    };
    list.iter()
        .map(|m| message(m).ok_or("has a message without a \"role\" and a \"content\" that are strings".into()))
        .collect()
}

/// The samples of `--ids-file`.
fn ids(path: &Path) -> Result<Vec<Vec<u32>>, Failure> {
    let mut bytes = Vec::new();
    open(path)?.take(MAX_IDS_BYTES).read_to_end(&mut bytes).map_err(|error| user(path, &error.to_string()))?;
    if bytes.len() as u64 == MAX_IDS_BYTES {
        return Err(user(path, &format!("is larger than {MAX_IDS_BYTES} bytes")));
    }
    serde_json::from_slice(&bytes).map_err(|e| user(path, &format!("is not a JSON list of lists of token ids: {e}")))
}
