//! How far one model's next-token distributions are from another's, and what many of them come to.
//!
//! ```text
//! for each position:   kl = sum over tokens of p (ln p - ln q),  p the reference's, q the other's
//!                      nll = -ln q[the token that follows]
//! perplexity = exp(mean nll);  p99 = the smallest kl that at least 99 % of all do not exceed
//! ```
//! Everything is in nats and in f64, from f32 logits. A position where `q` is not a distribution (a NaN
//! or +inf among its logits) counts as infinitely far and as a disagreement: it must not vanish from a
//! mean.

/// Logits of one position with the logarithm of the sum of their exponentials.
#[derive(Clone, Copy)]
pub struct Distribution<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> Distribution<'a> {
    pub fn new(logits: &'a [f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - f64::from(max)).exp()).sum();
        Distribution { logits, log_sum: f64::from(max) + sum.ln() }
    }

    /// Whether every token has a probability.
    pub fn is_valid(&self) -> bool {
        self.log_sum.is_finite()
    }

    pub fn log_prob(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// The likeliest token, the lowest of equals; `None` where no logit is a number above -inf.
    pub fn greedy(&self) -> Option<u32> {
        greedy(self.logits)
    }
}

/// The index of the largest logit, the lowest of equals; NaN is passed over.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best = (None, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (Some(token as u32), *logit);
        }
    }
    best.0
}

/// One position of a text under a model, against the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// Divergence from the reference; infinite where there is no distribution.
    pub kl: f64,
    /// Of the token that follows, under the model and under the reference.
    pub nll: f64,
    pub reference_nll: f64,
    /// Whether both have the same likeliest token.
    pub agrees: bool,
    /// Whether the model computes a distribution at all.
    pub is_valid: bool,
}

impl Position {
    pub fn new(reference: Distribution<'_>, other: Distribution<'_>, next: usize) -> Self {
        let reference_nll = -reference.log_prob(next);
        if !other.is_valid() {
            return Position { kl: f64::INFINITY, nll: f64::INFINITY, reference_nll, agrees: false, is_valid: false };
        }
        let term = |token: usize| match reference.log_prob(token) {
            // p ln p goes to 0 with p.
            log_p if log_p.exp() == 0.0 => 0.0,
            log_p => log_p.exp() * (log_p - other.log_prob(token)),
        };
        Position {
            // Not negative but for rounding.
            kl: (0..reference.logits.len()).map(term).sum::<f64>().max(0.0),
            nll: -other.log_prob(next),
            reference_nll,
            agrees: other.greedy() == reference.greedy(),
            is_valid: true,
        }
    }
}

/// What the positions of all texts come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub positions: usize,
    /// Positions without a distribution.
    pub invalid: usize,
    pub perplexity: f64,
    /// The reference's at the same positions.
    pub reference_perplexity: f64,
    pub mean_kl: f64,
    /// Standard error of `mean_kl`, from the means of the texts: positions of one text are not independent.
    pub kl_error: f64,
    pub p99_kl: f64,
    pub max_kl: f64,
    /// Share of positions with the same likeliest token.
    pub top1: f64,
}

impl Summary {
    /// Of the positions of each text. There is at least one position.
    pub fn new(texts: &[Vec<Position>]) -> Self {
        let all = || texts.iter().flatten();
        let mut kl: Vec<f64> = all().map(|position| position.kl).collect();
        kl.sort_unstable_by(f64::total_cmp);
        let means: Vec<f64> =
            texts.iter().filter(|text| !text.is_empty()).map(|text| mean(text.iter().map(|p| p.kl))).collect();
        Summary {
            positions: kl.len(),
            invalid: all().filter(|position| !position.is_valid).count(),
            perplexity: mean(all().map(|position| position.nll)).exp(),
            reference_perplexity: mean(all().map(|position| position.reference_nll)).exp(),
            mean_kl: mean(kl.iter().copied()),
            kl_error: standard_error(&means),
            p99_kl: quantile(&kl, 0.99),
            max_kl: quantile(&kl, 1.0),
            top1: mean(all().map(|position| f64::from(u8::from(position.agrees)))),
        }
    }
}

pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// Standard deviation of the mean of independent `values`; NaN for one alone.
pub fn standard_error(values: &[f64]) -> f64 {
    let (count, center) = (values.len() as f64, mean(values.iter().copied()));
    let squares: f64 = values.iter().map(|value| (value - center).powi(2)).sum();
    (squares / (count - 1.0) / count).sqrt()
}

/// The smallest of `sorted` that at least this share of them does not exceed (nearest rank).
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    // A product such as 0.99 * 100 may come out above the whole number it stands for.
    let rank = (share * sorted.len() as f64 - 1e-9).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Tokens that `a` and `b` have in common at their start, or `None` if they are the same.
pub fn first_divergence(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    (common < a.len().max(b.len())).then_some(common)
}
