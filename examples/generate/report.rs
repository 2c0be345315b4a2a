//! What a run did, and the same as JSON.

use quantkv::decoder::Engine;
use quantkv::decoder::engine::{Output, Stats};
use quantkv::{CpuBackend, KvCacheDtype, KvFormat};
use serde_json::{Value, json};

use crate::setup::{Plan, Session};

/// Everything a run leaves behind.
pub struct RunReport {
    pub dtype: KvCacheDtype,
    pub format: KvFormat,
    /// Samples of each prompt.
    pub outputs: Vec<Vec<Output>>,
    pub stats: Stats,
    pub num_blocks: usize,
    pub block_size: usize,
    pub cache_bytes: usize,
    pub bytes_per_token: usize,
    pub bytes_per_token_auto: usize,
    /// Scales of each layer, in the order of KV heads (one for all, usually).
    k_scale: Vec<Vec<f32>>,
    v_scale: Vec<Vec<f32>>,
}

impl RunReport {
    pub fn new(
        engine: &Engine<'_, CpuBackend>,
        dtype: KvCacheDtype,
        plan: &Plan,
        num_prompts: usize,
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
            num_blocks: plan.engine.num_blocks,
            block_size: plan.engine.block_size,
            cache_bytes: plan.engine.num_blocks * plan.block_bytes,
            bytes_per_token: plan.bytes_per_token,
            bytes_per_token_auto: plan.bytes_per_token_auto,
            k_scale: scales.iter().map(|s| s.k.values().to_vec()).collect(),
            v_scale: scales.iter().map(|s| s.v.values().to_vec()).collect(),
        })
    }

    /// `auto`, `fp8_e4m3` or `fp8_e5m2`.
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

    fn requests_json(&self, session: &Session) -> Value {
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
        })
    }

    fn timing_json(&self) -> Value {
        json!({
            "prefill_tokens": self.stats.prefill_tokens,
            "prefill_seconds": self.stats.prefill_seconds,
            "decode_tokens": self.stats.decode_tokens,
            "decode_seconds": self.stats.decode_seconds,
        })
    }
}

/// The object of `--json`.
pub fn json(session: &Session, run: &RunReport) -> Value {
    json!({
        "model": session.model_dir.display().to_string(),
        "device": "cpu",
        "kv_cache_dtype": run.dtype_name(),
        "requests": run.requests_json(session),
        "kv_cache": run.kv_cache_json(),
        "timing": run.timing_json(),
    })
}

/// The object of `--json --compare`: one entry a dtype, the first of them `auto`.
pub fn compare_json(session: &Session, runs: &[RunReport]) -> Value {
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
        "model": session.model_dir.display().to_string(),
        "device": "cpu",
        "compare": runs.iter().map(entry).collect::<Vec<_>>(),
    })
}
