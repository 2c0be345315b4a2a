//! Shapes of well-known models, for [`super::Model::random`]: what their `config.json` says of sizes, rotary
//! embedding and dtype. End tokens are left out, since made-up weights meet them by chance.

use std::path::Path;

use serde_json::{Value, json};

use super::config::Config;
use super::json::Object;
use crate::error::{Error, Result};

/// The names [`named`] knows.
pub const NAMES: [&str; 8] = [
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
];

/// The configuration of a well-known model.
///
/// # Errors
/// [`Error::InvalidRequest`] with the names there are.
pub fn named(name: &str) -> Result<Config> {
    // hidden, intermediate, layers, query heads, KV heads
    let sizes = |sizes: [usize; 5], vocab: usize, positions: usize| {
        let [hidden, intermediate, layers, heads, kv_heads] = sizes;
        json!({
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": positions, "torch_dtype": "bfloat16", "head_dim": 128,
        })
    };
    let llama3 = |stretch: f64| {
        json!({
            "rope_type": "llama3", "factor": stretch, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        })
    };
    let llama = |stretch| json!({"model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": llama3(stretch)});
    let tied = json!({"tie_word_embeddings": true});
    let qwen3 = json!({"model_type": "qwen3", "rope_theta": 1e6, "rms_norm_eps": 1e-6});
    let parts = match name {
        "llama-3.1-8b" => vec![sizes([4096, 14336, 32, 32, 8], 128_256, 131_072), llama(8.0)],
        "llama-3.1-70b" => vec![sizes([8192, 28672, 80, 64, 8], 128_256, 131_072), llama(8.0)],
        "llama-3.2-1b" => {
            vec![sizes([2048, 8192, 16, 32, 8], 128_256, 131_072), llama(32.0), tied, json!({"head_dim": 64})]
        }
        "llama-3.2-3b" => vec![sizes([3072, 8192, 28, 24, 8], 128_256, 131_072), llama(32.0), tied],
        "mistral-7b" => vec![
            sizes([4096, 14336, 32, 32, 8], 32_768, 32_768),
            json!({"model_type": "mistral", "rope_theta": 1e6, "rms_norm_eps": 1e-5}),
        ],
        "qwen2.5-7b" => vec![
            sizes([3584, 18944, 28, 28, 4], 152_064, 131_072),
            json!({"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
        ],
        "qwen3-0.6b" => vec![sizes([1024, 3072, 28, 16, 8], 151_936, 40_960), qwen3, tied],
        "qwen3-8b" => vec![sizes([4096, 12288, 36, 32, 8], 151_936, 40_960), qwen3],
        _ => {
            let known = NAMES.join(", ");
            return Err(Error::InvalidRequest(format!("there is no built-in model {name:?}; known: {known}")));
        }
    };
    let map = parts.into_iter().filter_map(|part| if let Value::Object(map) = part { Some(map) } else { None });
    let map = map.flatten().collect();
    Config::from_object(&Object { path: Path::new("(built in)"), prefix: "", map: &map })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_configuration_of_its_size() {
        // Parameters as the models' makers give them, in billions.
        let billions = [8.03, 70.55, 1.24, 3.21, 7.25, 7.62, 0.60, 8.19];
        for (name, want) in NAMES.into_iter().zip(billions) {
            let got = named(name).unwrap().num_parameters() as f64 / 1e9;
            assert!((got - want).abs() <= 0.006, "{name}: {got} billion parameters, expected {want}");
        }
        let error = named("gpt-5").unwrap_err().to_string();
        assert!(error.contains("gpt-5") && error.contains("qwen3-8b"), "{error}");
    }
}
