//! Weights as stored: 16-bit ones give exactly what their widened values give, from anywhere in a
//! file, and are never widened as a whole.

mod decoder_support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use decoder_support::{cache_for, fixture, greedy};
use half::{bf16, f16};
use quantkv::decoder::{Batch, Model, WantedLogits};
use quantkv::scale::LayerScales;
use quantkv::{CpuBackend, Isa, KvFormat, PagedKvCache};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quantkv-weights-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn logits(dir: &Path, backend: CpuBackend) -> Vec<u32> {
    let mut model: Model<CpuBackend> = Model::load(dir, Arc::new(backend)).unwrap();
    let scales = vec![LayerScales::one(); model.config().num_layers];
    let (mut cache, table) = cache_for(&model, model.cache_spec(16, KvFormat::F32).unwrap(), &scales, 24);
    let prompt: Vec<u32> = (3..20).collect();
    let run = greedy(&mut model, &mut cache, &table, &prompt, 11, 4);
    run.prefill_logits.iter().chain(&run.decode_logits).map(|x| x.to_bits()).collect()
}

#[test]
fn sixteen_bit_weights_equal_their_widened_values() {
    let source = fixture("arch/qwen3");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    type Narrow = fn(f32) -> ([u8; 2], f32);
    let kinds: [(Dtype, Narrow); 2] = [
        (Dtype::BF16, |x| (bf16::from_f32(x).to_le_bytes(), bf16::from_f32(x).to_f32())),
        (Dtype::F16, |x| (f16::from_f32(x).to_le_bytes(), f16::from_f32(x).to_f32())),
    ];
    for (dtype, narrow) in kinds {
        let dirs = ["narrow", "wide"].map(|kind| folder(&format!("{dtype:?}-{kind}")));
        for (dir, dtype) in dirs.iter().zip([dtype, Dtype::F32]) {
            let data: Vec<(String, Vec<usize>, Vec<u8>)> = (file.tensors().into_iter())
                .map(|(name, view)| {
                    let floats = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    let data = match dtype {
                        Dtype::F32 => floats.flat_map(|x| narrow(x).1.to_le_bytes()).collect(),
                        _ => floats.flat_map(|x| narrow(x).0).collect(),
                    };
                    (name, view.shape().to_vec(), data)
                })
                .collect();
            let views =
                data.iter().map(|(name, shape, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
            safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
            std::fs::copy(source.join("config.json"), dir.join("config.json")).unwrap();
        }
        assert_eq!(logits(&dirs[0], CpuBackend::new()), logits(&dirs[1], CpuBackend::new()), "{dtype:?}");

        // The same file with its data at an odd offset: copied, not refused, not misread.
        let path = dirs[0].join("model.safetensors");
        let before = logits(&dirs[0], CpuBackend::new());
        let aligned = std::fs::read(&path).unwrap();
        let header_len = u64::from_le_bytes(aligned[..8].try_into().unwrap());
        let (header, data) = aligned[8..].split_at(header_len as usize);
        let odd = [&(header_len + 1).to_le_bytes()[..], header, b" ", data].concat();
        std::fs::write(&path, odd).unwrap();
        assert_eq!(logits(&dirs[0], CpuBackend::new()), before, "{dtype:?}, unaligned");
        dirs.iter().for_each(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

/// A 90 MiB bf16 model of zeros (a sparse file), a 512-token prefill and a decode step: what is
/// allocated besides the mapping must stay far below the weights, let alone their f32 form.
#[cfg(target_os = "linux")]
#[test]
fn weights_are_never_widened_as_a_whole() {
    let (vocab, hidden, inner, layers) = (8192usize, 1024usize, 4096usize, 2usize);
    let dir = folder("memory");
    let config = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 1024, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("lm_head.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 4, hidden]),
            ("self_attn.v_proj", vec![hidden / 4, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = std::fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    let weight_mib = end >> 20;
    assert!(weight_mib > 85);

    let anonymous_mib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
    };
    let before = anonymous_mib();
    let mut model: Model<CpuBackend> =
        Model::load(&dir, Arc::new(CpuBackend::with_isa(Isa::detect()).unwrap())).unwrap();
    let spec = model.cache_spec(16, KvFormat::Fp8E4M3).unwrap();
    let mut cache = PagedKvCache::new(model.backend().clone(), spec, 33, &vec![LayerScales::one(); layers]).unwrap();
    let table: Vec<u32> = (0..33).collect();
    let mut batch = Batch::new();
    for (tokens, start) in [(vec![7; 512], 0), (vec![9], 512)] {
        batch.clear();
        batch.push_sequence(&tokens, start, &table, 16, WantedLogits::Last).unwrap();
        assert_eq!(model.forward(&batch, &mut cache).unwrap().len(), vocab);
    }
    // Scratch is kept between steps, so what is resident now is the peak.
    let grown = anonymous_mib().saturating_sub(before);
    println!("{weight_mib} MiB of weights, {grown} MiB allocated beside them");
    assert!(grown < 50, "{grown} MiB beside {weight_mib} MiB of weights");
    std::fs::remove_dir_all(&dir).unwrap();
}
