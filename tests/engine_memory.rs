//! Peak memory of an engine with many samples and a large vocabulary. Alone in its file: the peak
//! is the process's.

#![cfg(target_os = "linux")]

use std::io::Write;
use std::sync::Arc;

use quantkv::decoder::engine::{EngineConfig, Request};
use quantkv::decoder::kv_scales::{ScaleSource, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::{Engine, Model};
use quantkv::{CpuBackend, KvFormat};
use serde_json::json;

fn peak_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
}

/// 300 samples over 128,256 tokens, from weights of zeros (a sparse file) so that all tokens are
/// equally likely: kept for all of them, logits alone would be 147 MiB, candidates 587 MiB.
#[test]
fn many_samples_of_a_large_vocabulary_fit_beside_the_weights() {
    let (vocab, hidden, samples) = (128_256usize, 32usize, 300usize);
    let dir = std::env::temp_dir().join(format!("quantkv-engine-memory-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| format!("model.layers.0.{name}"));
    let matrices = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
    let matrices = matrices.into_iter().chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
    let shapes = [("model.embed_tokens".to_owned(), vec![vocab, hidden]), ("model.norm".to_owned(), vec![hidden])]
        .into_iter()
        .chain(norms.map(|name| (name, vec![hidden])))
        .chain(matrices.map(|name| (format!("model.layers.0.{name}"), vec![hidden, hidden])));
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(format!("{name}.weight"), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = std::fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();

    let mut model: Model<CpuBackend> = Model::load(&dir, Arc::new(CpuBackend::new())).unwrap();
    let scales = resolve(model.config(), model.weights(), KvFormat::Fp8E4M3, ScaleSource::Checkpoint).unwrap();
    let before = peak_mib();
    let mut engine = Engine::new(&mut model, None, EngineConfig::new(KvFormat::Fp8E4M3, samples + 1), &scales).unwrap();
    let sampling = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    engine.add_request(Request { n: samples, sampling, ..Request::greedy(vec![1, 2, 3], 3) }).unwrap();
    engine.run(|_| ()).unwrap();
    let outputs = engine.outputs(0).unwrap();
    assert!(outputs.iter().all(|output| output.token_ids.len() == 3));
    assert_ne!(outputs[0], outputs[samples - 1]);

    let (weights, grown) = (end >> 20, peak_mib() - before);
    println!("{grown} MiB more at the peak, {weights} MiB of weights among them");
    assert!(grown < weights + 100, "{grown} MiB beside {weights} MiB of weights");
    std::fs::remove_dir_all(&dir).unwrap();
}
