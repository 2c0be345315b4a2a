//! The decoder against transformers, one micro model for each `config.json` switch: f32 logits of
//! 40 tokens, 16 greedy tokens, rotary tables. Goldens: transformers 5.17, eager attention, f32.

mod decoder_support;
#[path = "../testing/devices.rs"]
mod devices;

use std::sync::Arc;

use decoder_support::{argmax, cache_for, fixture, golden_tensors, greedy, ids, load, load_on, max_abs_diff};
use quantkv::decoder::{Batch, Compute, Config, Model, WantedLogits};
use quantkv::scale::LayerScales;
use quantkv::{CacheLayout, CpuBackend, KvFormat, PagedKvCache};

const MODELS: [&str; 10] = [
    "llama-bias",
    "llama-default",
    "llama-headdim",
    "llama-mha",
    "llama-rope-linear",
    "llama-rope-llama3",
    "llama-rope-yarn",
    "mistral-sliding",
    "qwen2",
    "qwen3",
];

/// Two f32 implementations with sums in another order, logits of magnitude ~10 behind ~200
/// products deep each: 10 * 200 * 2^-24 = 1.2e-4 at worst; 1e-4 has been enough.
const TOLERANCE: f32 = 1e-4;

/// (layout, block size, tokens in a chunk)
const CASES: [(CacheLayout, usize, usize); 6] = [
    (CacheLayout::Hnd, 16, 40),
    (CacheLayout::Hnd, 8, 7),
    (CacheLayout::Nhd, 8, 40),
    (CacheLayout::Nhd, 16, 7),
    (CacheLayout::VllmPacked, 16, 7),
    (CacheLayout::VllmPacked, 8, 1),
];

#[test]
fn logits_and_greedy_tokens_match_transformers() {
    for name in MODELS {
        check_model(name, &Arc::new(CpuBackend::new()), &CASES);
    }
}

/// In f32, with a step of decoding recorded and replayed from its second time on.
#[test]
fn logits_and_greedy_tokens_match_transformers_on_cuda() {
    for (index, name) in MODELS.into_iter().enumerate() {
        // Every model in one of the cases where all of them would take minutes.
        let cases = if devices::emulated() { &CASES[index % CASES.len()..][..1] } else { &CASES };
        if let Some(cuda) = devices::cuda() {
            on_device!(&cuda, move |backend| check_model(name, &backend, cases));
        }
    }
}

fn check_model<B: Compute>(name: &str, backend: &Arc<B>, cases: &[(CacheLayout, usize, usize)]) {
    let dir = fixture(&format!("arch/{name}"));
    let golden = golden_tensors(&dir.join("golden.safetensors"));
    let prompt = ids(&golden["input_ids"]);
    let mut model: Model<B> = load_on(&dir, backend);
    for &(layout, block_size, chunk) in cases {
        let case = format!("{name}, {layout:?}, blocks of {block_size}, chunks of {chunk}");
        let spec = model.cache_spec(block_size, KvFormat::F32).unwrap().with_layout(layout).unwrap();
        let scales = vec![LayerScales::one(); model.config().num_layers];
        let (mut cache, table) = cache_for(&model, spec, &scales, 56);
        let run = greedy(&mut model, &mut cache, &table, &prompt, chunk, 16);
        let worst = max_abs_diff(&run.prefill_logits, &golden["logits"]);
        println!("{case}: logits differ by {worst}");
        assert!(worst < TOLERANCE, "{case}: logits differ by {worst}");
        assert_eq!(run.tokens, ids(&golden["greedy"]), "{case}");
        assert!(model.backend().faults().unwrap().is_empty(), "{case}");
    }
}

#[test]
fn rotary_tables_match_transformers() {
    let backend = CpuBackend::new();
    for name in MODELS {
        let dir = fixture(&format!("arch/{name}"));
        let golden = golden_tensors(&dir.join("golden.safetensors"));
        let rope = Config::from_dir(&dir).unwrap().rope;
        let inv_freq = rope.inverse_frequencies();
        for (i, (got, want)) in inv_freq.iter().zip(&golden["inv_freq"]).enumerate() {
            // torch's pow may be one ulp off the correctly rounded one; two more roundings follow.
            assert!((got - want).abs() <= 3.0 * f32::EPSILON * want, "{name} inv_freq[{i}]: {got} {want}");
        }
        assert!((rope.attention_scaling() - golden["attention_scaling"][0]).abs() <= f32::EPSILON, "{name}");

        let (rows, half) = (40, inv_freq.len());
        let positions: Vec<i32> = (0..rows as i32).collect();
        let (mut cos, mut sin) = (vec![0.0; rows * half], vec![0.0; rows * half]);
        let scaling = rope.attention_scaling();
        backend.rope_table(&positions, rows, &inv_freq, scaling, &mut cos, &mut sin).unwrap();
        for (table, golden) in [(&cos, &golden["cos"]), (&sin, &golden["sin"])] {
            for row in 0..rows {
                // The golden table repeats each half.
                let want = &golden[row * 2 * half..][..half];
                // Angles below 40 with three ulps of frequency, and an ulp of cos or sin.
                assert!(
                    max_abs_diff(&table[row * half..][..half], want) < 40.0 * 4.0 * f32::EPSILON,
                    "{name} row {row}"
                );
            }
        }
    }
}

/// A row's logits are the same bits alone, in a chunk of any size, and beside other sequences:
/// else a preempted or differently batched request would drift.
#[test]
fn logits_do_not_depend_on_the_batch() {
    for name in ["llama-bias", "qwen3", "mistral-sliding"] {
        let dir = fixture(&format!("arch/{name}"));
        let golden = golden_tensors(&dir.join("golden.safetensors"));
        let prompt = ids(&golden["input_ids"]);
        let mut model = load(&dir);
        let scales = vec![LayerScales::one(); model.config().num_layers];
        let vocab = model.config().vocab_size;
        for format in [KvFormat::F32, KvFormat::Fp8E4M3] {
            let spec = model.cache_spec(8, format).unwrap();
            let mut runs = Vec::new();
            for chunk in [40, 1, 7, 16, 33] {
                let (mut cache, table) = cache_for(&model, spec, &scales, 40);
                runs.push(greedy(&mut model, &mut cache, &table, &prompt, chunk, 0).prefill_logits);
            }
            // Three sequences side by side, of different lengths, advancing by different steps.
            let mut cache = PagedKvCache::new(model.backend().clone(), spec, 15, &scales).unwrap();
            let tables: Vec<Vec<u32>> = (0..3).map(|s| (0..5).map(|b| b * 3 + s).collect()).collect();
            let mut rows = vec![vec![f32::NAN; 40 * vocab]; 3];
            let (mut done, mut step) = ([0usize; 3], 0);
            let mut batch = Batch::new();
            while done.iter().any(|done| *done < 40) {
                batch.clear();
                let mut takes = Vec::new();
                for seq in 0..3 {
                    let take = [5, 1, 9][(seq + step) % 3].min(40 - done[seq]);
                    if take > 0 {
                        let tokens = &prompt[done[seq]..done[seq] + take];
                        batch.push_sequence(tokens, done[seq], &tables[seq], 8, WantedLogits::All).unwrap();
                        takes.push((seq, take));
                    }
                }
                let mut logits = model.forward(&batch, &mut cache).unwrap();
                for (seq, take) in takes {
                    let (mine, rest) = logits.split_at(take * vocab);
                    rows[seq][done[seq] * vocab..][..take * vocab].copy_from_slice(mine);
                    done[seq] += take;
                    logits = rest;
                }
                step += 1;
            }
            runs.extend(rows);
            let bits = |run: &[f32]| run.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for (i, run) in runs.iter().enumerate() {
                assert!(bits(run) == bits(&runs[0]), "{name} {format}: run {i}, {}", max_abs_diff(run, &runs[0]));
            }
        }
    }
}

/// A tied checkpoint has no `lm_head.weight` and must give what an untied one with
/// `lm_head = embedding` gives.
#[test]
fn tied_embeddings() {
    let source = fixture("arch/qwen3");
    let scratch = std::env::temp_dir().join(format!("quantkv-tied-{}", std::process::id()));
    let [tied, untied] = ["tied", "untied"].map(|name| scratch.join(name));
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    for (dir, tie) in [(&tied, true), (&untied, false)] {
        std::fs::create_dir_all(dir).unwrap();
        let mut tensors: Vec<_> = file.tensors().into_iter().filter(|(name, _)| name != "lm_head.weight").collect();
        if !tie {
            tensors.push(("lm_head.weight".into(), file.tensor("model.embed_tokens.weight").unwrap()));
        }
        safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).unwrap();
        let needle = "\"tie_word_embeddings\": false";
        assert!(config.contains(needle));
        let text = config.replace(needle, &format!("\"tie_word_embeddings\": {tie}"));
        std::fs::write(dir.join("config.json"), text).unwrap();
    }
    let logits = [&tied, &untied].map(|dir| {
        let mut model: Model<CpuBackend> = Model::load(dir, Arc::new(CpuBackend::new())).unwrap();
        let scales = vec![LayerScales::one(); 2];
        let (mut cache, table) = cache_for(&model, model.cache_spec(16, KvFormat::F32).unwrap(), &scales, 8);
        greedy(&mut model, &mut cache, &table, &[5, 6, 7], 3, 0).prefill_logits
    });
    assert_eq!(logits[0], logits[1]);
    assert!(logits[0].iter().all(|x| x.is_finite()) && argmax(&logits[0]) < 128 * 3);
    std::fs::remove_dir_all(&scratch).unwrap();
}
