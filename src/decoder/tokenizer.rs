//! Text to token ids and back, by the `tokenizers` crate.
//!
//! A calibrated checkpoint can carry the truncation and padding its calibration used, in
//! `tokenizer.json` itself; prompts would then be cut silently. Both are cleared on load.
//!
//! `tokenizers` trusts its files: some broken ones make it panic. Its calls are fenced, so that a
//! panic in it is an error of ours.
//!
//! Generated text is made token by token, and byte-level tokens split UTF-8 sequences:
//! [`Detokenizer`] holds back the bytes of an unfinished character.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The largest `tokenizer.json` read; the largest in use have some 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The tokenizer of a model folder.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::InvalidFile`] saying what `tokenizers` objects to.
    pub fn from_model_dir(dir: &Path) -> Result<Self> {
        Self::from_file(&dir.join("tokenizer.json"))
    }

    /// Reads one `tokenizer.json`, and clears its truncation and padding.
    ///
    /// # Errors
    /// As [`Tokenizer::from_model_dir`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path, MAX_FILE_BYTES)?;
        let invalid = |reason: String| Error::InvalidFile { path: path.to_owned(), reason: one_line(&reason) };
        // Syntax first: what follows panics on some files that are no JSON.
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|e| invalid(format!("is not JSON: {e}")))?;
        let mut inner = fenced(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(invalid)?;
        inner.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
        inner.with_padding(None);
        Ok(Tokenizer { inner, path: path.to_owned() })
    }

    /// Token ids of `text`. With `add_special_tokens` the file's post-processor adds its own, BOS
    /// usually; rendered chat templates print theirs and are encoded without.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the tokenizer cannot encode the text (a word outside its
    /// vocabulary and no unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        fenced(|| self.inner.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|reason| self.invalid(format!("cannot encode the text: {reason}")))
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the file's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        fenced(|| self.inner.decode(ids, skip_special_tokens))
            .map_err(|reason| self.invalid(format!("cannot decode: {reason}")))
    }

    /// The id of a token, special tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    fn invalid(&self, reason: String) -> Error {
        Error::InvalidFile { path: self.path.clone(), reason: one_line(&reason) }
    }
}

/// Runs a call into `tokenizers`; its error, or its panic, as text. What it leaves half done is
/// thrown away (loading) or was only read (encoding, decoding).
fn fenced<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(format!("the tokenizers library panicked: {}", text.unwrap_or_default()))
        }
    }
}

/// Turns a growing list of token ids into text that never needs to be taken back.
///
/// ```text
/// window   the last finished piece (context: decoders may join words) + tokens not finished yet
/// emitted  how much of the window's text has been handed out
/// ```
/// Text is finished when it does not end in U+FFFD; at most the last three of these can be bytes
/// of a character still to come.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    window: Vec<u32>,
    context: usize,
    emitted: String,
}

/// Bytes of the longest unfinished UTF-8 sequence, each decoded as one U+FFFD at most.
const MAX_UNFINISHED: usize = 3;
/// A window this long whose end is still no UTF-8 is garbage, not an unfinished character.
const MAX_WINDOW: usize = 64;

impl Detokenizer {
    /// The text that `id` finishes, possibly empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window, true)?;
        let finished = if self.window.len() < MAX_WINDOW { finished_prefix(&text) } else { &text };
        let new = self.take_new(finished);
        if finished.len() == text.len() {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.emitted = tokenizer.decode(&self.window, true)?;
        }
        Ok(new)
    }

    /// The text held back so far, at the end of generation.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.window, true)?;
        let rest = self.take_new(&text);
        *self = Detokenizer::default();
        Ok(rest)
    }

    /// What `text` has beyond the text emitted, which becomes `text`.
    fn take_new(&mut self, text: &str) -> String {
        if text.len() <= self.emitted.len() {
            return String::new();
        }
        // A decoder that rewrites what it said before is not incremental; keep what agrees.
        let mut start = self.emitted.len();
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let new = text[start..].to_owned();
        self.emitted = text.to_owned();
        new
    }
}

/// `text` without the trailing U+FFFD that may still become a character.
fn finished_prefix(text: &str) -> &str {
    let mut finished = text;
    for _ in 0..MAX_UNFINISHED {
        match finished.strip_suffix('\u{FFFD}') {
            Some(shorter) => finished = shorter,
            None => break,
        }
    }
    finished
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    use std::io::Read;
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(Error::InvalidFile { path: path.to_owned(), reason: format!("is larger than {limit} bytes") });
    }
    Ok(bytes)
}

/// Errors of other libraries may span lines; ours do not.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
