//! Every file that scales are read from, whatever its bytes: a value or a typed error comes of it, never
//! a panic, a scale that is none, or an error of several lines.
//!
//! ```text
//! input[0]   which file the rest is            the others are
//! 0          config.json                       a good checkpoint
//! 1          hf_quant_config.json              the same
//! 2          kv_cache_scales.json
//! 3          model.safetensors                 the configuration of input[0] / 8
//! 4          the header of one: its length is added, and a body as long as the largest number in it
//! 5          model.safetensors.index.json      the same; shards are good ones
//! ```
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use quantkv::checkpoint::{CheckpointScales, MissingScales, ModelShape, ReadOptions, read_scales, read_scales_file};
use quantkv::{Error, Result};

const LAYERS: usize = 4;
/// Real tools' declarations; seeds of the corpus have them whole.
const CONFIGS: [&str; 4] = [
    r#"{"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float", "num_bits": 8, "strategy": "tensor"}}"#,
    r#"{"quant_method": "modelopt", "kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": false}}"#,
    r#"{"quant_method": "fp8", "kv_cache_scheme": "static"}"#,
    "null",
];

/// The folder that `scripts/fuzz.sh` made, in memory where there is such a thing; or one of its own.
struct Folder {
    dir: PathBuf,
    /// What a file called `model.safetensors` holds by default.
    good: Vec<u8>,
}

impl Folder {
    fn get() -> &'static Folder {
        static FOLDER: OnceLock<Folder> = OnceLock::new();
        FOLDER.get_or_init(|| {
            let own = || std::env::temp_dir().join(format!("quantkv-fuzz-{}", std::process::id()));
            let dir = std::env::var_os("QUANTKV_FUZZ_DIR").map_or_else(own, PathBuf::from);
            std::fs::create_dir_all(&dir).expect("a folder to work in");
            let names =
                (0..LAYERS).flat_map(|l| ["k", "v"].map(|half| format!("model.layers.{l}.self_attn.{half}_scale")));
            let entries: Vec<String> = names
                .enumerate()
                .map(|(i, name)| {
                    format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4)
                })
                .collect();
            let good = with_body(format!("{{{}}}", entries.join(",")).as_bytes(), 8 * LAYERS);
            Folder { dir, good }
        })
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.dir.join(file), bytes).expect("writing a file");
    }

    fn remove(&self, file: &str) {
        let _ = std::fs::remove_file(self.dir.join(file));
    }
}

/// The largest number in a header, within reason: the end of the last tensor, if the header is a good one.
fn largest_number(header: &[u8]) -> usize {
    let digits = header.split(|byte| !byte.is_ascii_digit());
    let numbers = digits.filter_map(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    numbers.filter(|number| *number <= 1 << 16).max().unwrap_or(0)
}

/// A safetensors file with this header and a body of f32 ones.
fn with_body(header: &[u8], bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend(1f32.to_le_bytes().iter().cycle().take(bytes));
    file
}

fn config(quantization: &str) -> String {
    format!(
        r#"{{"model_type": "llama", "num_hidden_layers": {LAYERS}, "num_attention_heads": 4, "num_key_value_heads": 2,
           "hidden_size": 64, "quantization_config": {quantization}}}"#
    )
}

/// Checks what came of a read, and gives it on.
fn checked(result: Result<Option<CheckpointScales>>) -> Option<Option<CheckpointScales>> {
    let one_line = |text: &str| assert!(!text.chars().any(char::is_control), "{text:?}");
    match result {
        Err(error) => {
            one_line(&error.to_string());
            None
        }
        Ok(found) => {
            if let Some(found) = &found {
                found.warnings.iter().for_each(|warning| one_line(warning));
                for pair in found.scales.layers() {
                    let values = pair.k.values().iter().chain(pair.v.values());
                    assert!(values.into_iter().all(|scale| scale.is_finite() && *scale > 0.0));
                }
                assert_eq!(found.scales.shard(0, 1).as_ref().ok(), Some(&found.scales));
                let heads = found.scales.num_kv_heads();
                let last = found.scales.shard(heads - 1, heads).expect("a rank for each KV head");
                assert_eq!(last.layers().len(), found.scales.layers().len());
            }
            Some(found)
        }
    }
}

fn read(folder: &Folder) {
    let strict = checked(read_scales(&folder.dir, &ReadOptions::default()));
    let lenient = read_scales(&folder.dir, &ReadOptions { missing: MissingScales::One, shard: None });
    assert!(!matches!(lenient, Err(Error::MissingScales { .. })));
    // What is whole is the same under either policy.
    if let Some(strict) = strict {
        assert_eq!(checked(lenient), Some(strict));
    } else {
        checked(lenient);
    }
}

fuzz_target!(|data: &[u8]| {
    let [selector, payload @ ..] = data else { return };
    let folder = Folder::get();
    folder.remove("hf_quant_config.json");
    folder.remove("model.safetensors.index.json");
    folder.write("config.json", config(CONFIGS[usize::from(selector / 8) % CONFIGS.len()]).as_bytes());
    folder.write("model.safetensors", &folder.good);
    match selector % 8 {
        0 => folder.write("config.json", payload),
        1 => folder.write("hf_quant_config.json", payload),
        2 => {
            folder.write("kv_cache_scales.json", payload);
            let shape =
                ModelShape { model_type: None, num_layers: LAYERS, num_heads: 8, num_kv_heads: 2, head_dim: Some(16) };
            for (missing, shard) in [(MissingScales::Error, None), (MissingScales::One, Some((1, 2)))] {
                let options = ReadOptions { missing, shard };
                checked(read_scales_file(&folder.dir.join("kv_cache_scales.json"), &shape, &options).map(Some));
            }
            return;
        }
        3 => folder.write("model.safetensors", payload),
        4 => folder.write("model.safetensors", &with_body(payload, largest_number(payload))),
        5 => {
            folder.write("a.safetensors", &folder.good);
            folder.remove("model.safetensors");
            folder.write("model.safetensors.index.json", payload);
        }
        _ => return,
    }
    read(folder);
});
