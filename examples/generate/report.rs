//! What a run did, and the same as JSON.

use quantkv::checkpoint::Origin;
use quantkv::decoder::engine::{LastStep, Output, Stats};
use quantkv::decoder::{Compute, Engine};
use quantkv::{Element, KvCacheDtype, KvFormat};
use serde_json::{Value, json};

use crate::scales::ScaleReport;
use crate::setup::{Plan, Session};

/// Everything a run leaves behind.
pub struct RunReport {
    pub dtype: KvCacheDtype,
    pub format: KvFormat,
    /// Samples of each prompt.
    pub outputs: Vec<Vec<Output>>,
    pub stats: Stats,
    /// Of steps that only decoded, those with the most sequences.
    pub decode_steps: Option<DecodeSteps>,
    pub num_blocks: usize,
    pub block_size: usize,
    pub cache_bytes: usize,
    pub bytes_per_token: usize,
    pub bytes_per_token_auto: usize,
    /// Scales of each layer, in the order of KV heads (one for all, usually).
    k_scale: Vec<Vec<f32>>,
    v_scale: Vec<Vec<f32>>,
    pub scales: ScaleReport,
    scales_origin: Option<Origin>,
}

/// Steps of decoding alone, all of them with as many sequences.
pub struct DecodeSteps {
    pub count: usize,
    /// Sequences in each.
    pub batch: usize,
    /// Cached tokens of a sequence, on average, in the first and the last of these steps.
    pub first_context: f64,
    pub last_context: f64,
    /// Of one step. On CUDA the first two of a batch size are slow: they load kernels and record a graph.
    pub median_seconds: f64,
    pub fastest_seconds: f64,
    pub slowest_seconds: f64,
    /// Bytes of keys and values that all layers read in a step, on average.
    pub kv_bytes: f64,
}

impl DecodeSteps {
    fn of(steps: &[LastStep], bytes_per_token: usize) -> Option<DecodeSteps> {
        let decodes = || steps.iter().filter(|step| step.prefill_tokens == 0 && step.decode_tokens > 0);
        let batch = decodes().map(|step| step.decode_tokens).max()?;
        let chosen: Vec<&LastStep> = decodes().filter(|step| step.decode_tokens == batch).collect();
        let mut seconds: Vec<f64> = chosen.iter().map(|step| step.seconds).collect();
        seconds.sort_unstable_by(f64::total_cmp);
        let context = |step: &LastStep| step.cached_tokens as f64 / batch as f64;
        let tokens: f64 = chosen.iter().map(|step| step.cached_tokens as f64).sum();
        Some(DecodeSteps {
            count: chosen.len(),
            batch,
            first_context: context(chosen[0]),
            last_context: context(chosen[chosen.len() - 1]),
            median_seconds: seconds[seconds.len() / 2],
            fastest_seconds: seconds[0],
            slowest_seconds: seconds[seconds.len() - 1],
            kv_bytes: tokens / chosen.len() as f64 * bytes_per_token as f64,
        })
    }

    pub fn tokens_per_second(&self) -> f64 {
        self.batch as f64 / self.median_seconds
    }

    fn json(&self) -> Value {
        json!({
            "count": self.count,
            "batch": self.batch,
            "first_context": self.first_context,
            "last_context": self.last_context,
            "median_ms": self.median_seconds * 1e3,
            "fastest_ms": self.fastest_seconds * 1e3,
            "slowest_ms": self.slowest_seconds * 1e3,
            "tokens_per_second": self.tokens_per_second(),
            "kv_bytes": self.kv_bytes,
        })
    }
}

impl RunReport {
    pub fn new<B: Compute<A>, A: Element>(
        engine: &Engine<'_, B, A>,
        dtype: KvCacheDtype,
        plan: &Plan,
        num_prompts: usize,
        steps: &[LastStep],
    ) -> quantkv::Result<Self> {
        let scales = (0..engine.cache().num_layers())
            .map(|layer| engine.cache().scales(layer))
            .collect::<quantkv::Result<Vec<_>>>()?;
        Ok(RunReport {
            dtype,
            format: plan.engine.format,
            outputs: (0..num_prompts)
                .map(|number| engine.outputs(number).map(<[_]>::to_vec))
                .collect::<quantkv::Result<_>>()?,
            stats: engine.stats(),
            decode_steps: DecodeSteps::of(steps, plan.bytes_per_token),
            num_blocks: plan.engine.num_blocks,
            block_size: plan.engine.block_size,
            cache_bytes: plan.engine.num_blocks * plan.block_bytes,
            bytes_per_token: plan.bytes_per_token,
            bytes_per_token_auto: plan.bytes_per_token_auto,
            k_scale: scales.iter().map(|s| s.k.values().to_vec()).collect(),
            v_scale: scales.iter().map(|s| s.v.values().to_vec()).collect(),
            scales: ScaleReport::new(plan, &scales),
            scales_origin: plan.scales.origin.clone(),
        })
    }

    /// `auto`, `fp8_e4m3`, `fp8_e5m2` or `fp8_e4m3_fnuz`.
    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            KvCacheDtype::Auto => "auto",
            KvCacheDtype::Format(format) => format.name(),
        }
    }

    /// The first token in which a sample differs from the same one of `other`.
    pub fn first_divergence(&self, other: &RunReport, prompt: usize, sample: usize) -> Option<usize> {
        let (a, b) = (&self.outputs[prompt][sample].token_ids, &other.outputs[prompt][sample].token_ids);
        let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
        (common < a.len().max(b.len())).then_some(common)
    }

    fn requests_json<B: Compute<A>, A: Element>(&self, session: &Session<B, A>) -> Value {
        let output = |output: &Output| {
            json!({
                "token_ids": output.token_ids,
                "text": output.text,
                "finish_reason": output.finish_reason.map(|reason| reason.name()),
            })
        };
        let request = |(prompt, outputs): (&crate::setup::Prompt, &Vec<Output>)| {
            json!({
                "prompt": prompt.text,
                "prompt_token_ids": prompt.ids,
                "outputs": outputs.iter().map(output).collect::<Vec<_>>(),
            })
        };
        session.prompts.iter().zip(&self.outputs).map(request).collect()
    }

    fn kv_cache_json(&self) -> Value {
        json!({
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_token_auto": self.bytes_per_token_auto,
            "blocks_total": self.num_blocks,
            "blocks_peak": self.stats.blocks_peak,
            "blocks_copied": self.stats.blocks_copied,
            "blocks_swapped_out": self.stats.blocks_swapped_out,
            "blocks_swapped_in": self.stats.blocks_swapped_in,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "scales": self.scales.json(self),
            "scales_origin": self.scales_origin.as_ref().map(origin_json),
        })
    }

    fn timing_json(&self) -> Value {
        json!({
            "prefill_tokens": self.stats.prefill_tokens,
            "prefill_seconds": self.stats.prefill_seconds,
            "decode_tokens": self.stats.decode_tokens,
            "decode_seconds": self.stats.decode_seconds,
            "decode_steps": self.decode_steps.as_ref().map(DecodeSteps::json),
        })
    }
}

/// Where scales come from, as far as their files say.
fn origin_json(origin: &Origin) -> Value {
    json!({
        "tool": origin.tool.name(),
        "version": origin.version,
        "key_range": origin.key_range.name(),
        "statistic": origin.statistic.to_string(),
        "shared_by_k_and_v": origin.shared,
        "tensors": origin.naming.map(|naming| naming.pattern()),
    })
}

/// The object of `--json`.
pub fn json<B: Compute<A>, A: Element>(session: &Session<B, A>, run: &RunReport) -> Value {
    json!({
        "model": session.name,
        "device": session.device,
        "activations": A::DTYPE.to_string(),
        "kv_cache_dtype": run.dtype_name(),
        "requests": run.requests_json(session),
        "kv_cache": run.kv_cache_json(),
        "timing": run.timing_json(),
    })
}

/// The object of `--json --compare`: one entry a dtype, the first of them `auto`.
pub fn compare_json<B: Compute<A>, A: Element>(session: &Session<B, A>, runs: &[RunReport]) -> Value {
    let divergences = |run: &RunReport| -> Vec<Vec<Option<usize>>> {
        let of_prompt = |(prompt, outputs): (usize, &Vec<Output>)| {
            (0..outputs.len()).map(|sample| run.first_divergence(&runs[0], prompt, sample)).collect()
        };
        run.outputs.iter().enumerate().map(of_prompt).collect()
    };
    let entry = |run: &RunReport| {
        json!({
            "kv_cache_dtype": run.dtype_name(),
            "requests": run.requests_json(session),
            "first_divergence": divergences(run),
            "kv_cache": run.kv_cache_json(),
            "timing": run.timing_json(),
        })
    };
    json!({
        "model": session.name,
        "device": session.device,
        "activations": A::DTYPE.to_string(),
        "compare": runs.iter().map(entry).collect::<Vec<_>>(),
    })
}
