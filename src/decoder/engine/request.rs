//! What an engine is asked, and what it answers.

use crate::decoder::sampling::SamplingParams;

/// One prompt and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt's tokens, BOS included where the model wants one.
    pub prompt: Vec<u32>,
    /// Samples to make of it; they share the prompt's blocks.
    pub n: usize,
    /// How tokens are chosen. Sample `i` draws from stream `i` of the seed.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; the model's positions are a limit as well.
    pub max_tokens: usize,
    /// Texts that end a sample; they are not part of its text.
    pub stop: Vec<String>,
    /// Tokens that end a sample; the one met is part of its tokens, not of its text.
    pub eos_token_ids: Vec<u32>,
}

impl Request {
    /// One greedy sample without stops.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        let sampling = SamplingParams::default();
        Request { prompt, n: 1, sampling, max_tokens, stop: Vec::new(), eos_token_ids: Vec::new() }
    }
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// The limit of tokens, or of the model's positions.
    Length,
}

impl FinishReason {
    /// `stop` or `length`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// One sample so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Tokens generated.
    pub token_ids: Vec<u32>,
    /// Their text up to a stop string, special tokens left out; empty without a tokenizer.
    pub text: String,
    /// Why it ended; `None` while it runs.
    pub finish_reason: Option<FinishReason>,
}

/// A token was generated.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// The request, as [`super::Engine::add_request`] numbered it.
    pub request: usize,
    /// The sample of the request.
    pub sample: usize,
    /// The token.
    pub token: u32,
    /// Text that is now certain. Over all events of a sample it adds up to [`Output::text`].
    pub text: &'a str,
    /// Set on a sample's last event.
    pub finish_reason: Option<FinishReason>,
}

/// One step of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LastStep {
    /// Prompt tokens computed.
    pub prefill_tokens: usize,
    /// Sequences that got one token more.
    pub decode_tokens: usize,
    /// Tokens in the cache of all sequences of the step: what attention read in each layer.
    pub cached_tokens: usize,
    /// Seconds from the decision what to compute to the last token sampled.
    pub seconds: f64,
}

/// Counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Prompt tokens computed; tokens of shared blocks are not among them.
    pub prefill_tokens: usize,
    /// Seconds spent on them. A step that mixes both is divided by its rows.
    pub prefill_seconds: f64,
    /// Tokens computed one at a time after a prompt.
    pub decode_tokens: usize,
    /// Seconds spent on them.
    pub decode_seconds: f64,
    /// Prompt tokens not computed because their blocks were there.
    pub shared_tokens: usize,
    /// The most blocks in use at once.
    pub blocks_peak: usize,
    /// Blocks copied because two samples wrote to the same one.
    pub blocks_copied: usize,
    /// Blocks moved to host memory.
    pub blocks_swapped_out: usize,
    /// Blocks moved back.
    pub blocks_swapped_in: usize,
    /// Sequences preempted by dropping their blocks, because host memory was full.
    pub recomputed: usize,
    /// Steps taken.
    pub steps: usize,
    /// Tokens that scales computed on the fly have been computed from.
    pub scale_tokens: usize,
    /// Whether scales are what they will be: always, but before the first step and during a warm-up.
    pub scales_frozen: bool,
    /// Times that the running scales of a layer changed, the first time included; what its blocks held was
    /// requantized.
    pub scale_changes: usize,
}
