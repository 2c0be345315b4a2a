//! From logits to the next token, in vLLM's order:
//!
//! ```text
//! repetition penalty   tokens of prompt and output: x > 0 ? x / r : x * r
//! frequency, presence  output only: x -= f * count;  x -= p * [count > 0]
//! greedy               if temperature < 1e-5: the largest logit, the lowest id of equals
//! temperature          x /= t
//! min_p                drop tokens with p < min_p * p_max
//! top_k                drop tokens below the k-th largest logit; its equals stay
//! top_p                from the least likely, drop while the cumulated p <= 1 - top_p; keep one
//! sample               one uniform draw against the cumulated p of what is left, in id order
//! ```
//! (transformers applies min_p last; the two orders keep different tokens when it meets top_p.)
//!
//! Logits are f32 and probabilities f64. Every sequence draws from a ChaCha generator of its own,
//! keyed by its seed and its sample number, so that its tokens do not depend on what else is in
//! the batch, on preemption, or on the platform.

use rand::rngs::ChaCha12Rng;
use rand::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// Below this temperature sampling is greedy.
pub const GREEDY_TEMPERATURE: f32 = 1e-5;
/// Temperatures from [`GREEDY_TEMPERATURE`] up to this one are raised to it, or logits overflow.
const MIN_TEMPERATURE: f32 = 1e-2;

/// How tokens are chosen. [`SamplingParams::default`] is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k largest logits and their equals; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the largest probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen; 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted from a logit for each time its token was generated.
    pub frequency_penalty: f32,
    /// Subtracted from a logit if its token was generated at all.
    pub presence_penalty: f32,
    /// Key of the random generator.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks every number against its range.
    ///
    /// # Errors
    /// [`Error::InvalidNumber`].
    pub fn validate(&self) -> Result<()> {
        let check = |what, value: f32, ok: bool, expected| {
            if ok { Ok(()) } else { Err(Error::InvalidNumber { what, value: value.into(), expected }) }
        };
        let t = self.temperature;
        check("temperature", t, t.is_finite() && t >= 0.0, "finite and at least 0")?;
        let p = self.top_p;
        check("top_p", p, p > 0.0 && p <= 1.0, "greater than 0 and at most 1")?;
        let m = self.min_p;
        check("min_p", m, (0.0..=1.0).contains(&m), "from 0 to 1")?;
        let r = self.repetition_penalty;
        check("repetition_penalty", r, r.is_finite() && r > 0.0, "finite and greater than 0")?;
        for (what, x) in [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)] {
            check(what, x, x.is_finite(), "finite")?;
        }
        Ok(())
    }

    /// Whether the largest logit is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_TEMPERATURE
    }

    /// Whether the token is the largest logit as the model computed it: greedy, and no penalties.
    pub fn is_plain_greedy(&self) -> bool {
        self.is_greedy() && !self.needs_history()
    }

    fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha12Rng,
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// Its logit after penalties and temperature.
    pub logit: f32,
    /// Its probability among the candidates.
    pub probability: f64,
}

impl Sampler {
    /// How it chooses.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// A sampler for sample number `sample` of a request.
    ///
    /// # Errors
    /// [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, sample: u64) -> Result<Self> {
        params.validate()?;
        let mut rng = ChaCha12Rng::seed_from_u64(params.seed);
        rng.set_stream(sample);
        Ok(Sampler { params, rng })
    }

    /// The next token. `logits` are overwritten by the penalties. `history` is the prompt and the
    /// output so far, its first `prompt_len` tokens the prompt; ids past the logits are ignored.
    ///
    /// # Errors
    /// [`Error::InvalidNumber`] if no logit is a number: the model computed NaN or only -inf.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32], prompt_len: usize) -> Result<u32> {
        penalize(&self.params, logits, history, prompt_len);
        if self.params.is_greedy() {
            return largest(logits).ok_or_else(no_logit);
        }
        // Not kept between calls: 16 bytes a token of the vocabulary, for every sequence of an engine.
        let mut candidates = Vec::new();
        filter(&self.params, logits, &mut candidates)?;
        // 53 random bits: a uniform number in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut cumulated = 0.0;
        for candidate in &candidates {
            cumulated += candidate.probability;
            if uniform < cumulated {
                return Ok(candidate.id);
            }
        }
        // Rounding may leave the sum a hair below 1.
        Ok(candidates[candidates.len() - 1].id)
    }
}

/// The tokens that may be drawn and their probabilities, in id order: what [`Sampler::sample`]
/// draws from. Temperature must not be 0.
///
/// # Errors
/// As [`Sampler::sample`]; [`SamplingParams::validate`].
pub fn distribution(
    params: &SamplingParams,
    logits: &[f32],
    history: &[u32],
    prompt_len: usize,
) -> Result<Vec<Candidate>> {
    params.validate()?;
    let mut logits = logits.to_vec();
    penalize(params, &mut logits, history, prompt_len);
    let mut candidates = Vec::new();
    filter(params, &logits, &mut candidates)?;
    Ok(candidates)
}

fn penalize(params: &SamplingParams, logits: &mut [f32], history: &[u32], prompt_len: usize) {
    if !params.needs_history() {
        return;
    }
    let mut seen = history.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for &id in &seen {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
        }
    }
    let mut generated = history.get(prompt_len..).unwrap_or_default().to_vec();
    generated.sort_unstable();
    for run in generated.chunk_by(|a, b| a == b) {
        if let Some(x) = logits.get_mut(run[0] as usize) {
            *x -= params.frequency_penalty * run.len() as f32;
            *x -= params.presence_penalty;
        }
    }
}

/// The lowest id of the largest logit, if one is a number above -inf.
pub(crate) fn largest(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, &x) in logits.iter().enumerate() {
        if x > best.0 {
            best = (x, Some(id as u32));
        }
    }
    best.1
}

/// The model's logits are no numbers.
pub(crate) fn no_logit() -> Error {
    Error::InvalidNumber {
        what: "the largest logit",
        value: f64::NAN,
        expected: "a number (the model's output is broken)",
    }
}

fn filter(params: &SamplingParams, logits: &[f32], candidates: &mut Vec<Candidate>) -> Result<()> {
    let temperature = params.temperature.max(MIN_TEMPERATURE);
    candidates.clear();
    candidates.extend(logits.iter().enumerate().filter_map(|(id, &x)| {
        let logit = x / temperature;
        (logit > f32::NEG_INFINITY).then_some(Candidate { id: id as u32, logit, probability: 0.0 })
    }));
    normalize(candidates)?;
    if params.min_p > 0.0 {
        let largest = candidates.iter().map(|c| c.probability).fold(0.0, f64::max);
        candidates.retain(|c| c.probability >= f64::from(params.min_p) * largest);
    }
    if params.top_k > 0 && params.top_k < candidates.len() {
        let mut order: Vec<f32> = candidates.iter().map(|c| c.logit).collect();
        let (_, kth, _) = order.select_nth_unstable_by(params.top_k - 1, |a, b| b.total_cmp(a));
        let kth = *kth;
        candidates.retain(|c| c.logit >= kth);
    }
    if params.top_p < 1.0 {
        normalize(candidates)?;
        // Least likely first; of equals the lower id is dropped first, as a stable sort leaves them.
        candidates.sort_by(|a, b| a.logit.total_cmp(&b.logit));
        let mut cumulated = 0.0;
        let dropped = candidates
            .iter()
            .take_while(|c| {
                cumulated += c.probability;
                cumulated <= 1.0 - f64::from(params.top_p)
            })
            .count();
        candidates.drain(..dropped.min(candidates.len() - 1));
        candidates.sort_unstable_by_key(|c| c.id);
    }
    normalize(candidates)
}

/// Softmax over the candidates. Infinite logits share the whole probability.
fn normalize(candidates: &mut [Candidate]) -> Result<()> {
    let largest = candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return Err(no_logit());
    }
    let mut sum = 0.0;
    for c in candidates.iter_mut() {
        let distance = if c.logit == largest { 0.0 } else { f64::from(c.logit) - f64::from(largest) };
        c.probability = distance.exp();
        sum += c.probability;
    }
    for c in candidates {
        c.probability /= sum;
    }
    Ok(())
}
