//! The tokenizer and the chat template against transformers: encoding, decoding, chat renderings,
//! streaming, and the truncation a calibrated checkpoint carries in its tokenizer.json.

#[path = "../testing/fixtures.rs"]
mod fixtures;

use std::path::PathBuf;

use quantkv::decoder::chat::{ChatTemplate, Message};
use quantkv::decoder::tokenizer::{Detokenizer, Tokenizer};
use serde_json::Value;

fn fixture(path: &str) -> PathBuf {
    fixtures::fixture_path(path)
}

fn golden() -> Value {
    let text = std::fs::read_to_string(fixture("tokenizer/tokenizer_golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The checkpoint whose tokenizer.json says `"truncation": {"max_length": 128}`.
fn tokenizer() -> Tokenizer {
    Tokenizer::from_model_dir(&fixture("micro/llmcompressor-tiny-f32")).unwrap()
}

#[test]
fn encodes_and_decodes_as_transformers() {
    let (golden, tokenizer) = (golden(), tokenizer());
    let cases = golden["encode"].as_array().unwrap();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{text:?}");
        let plain = ids(&case["ids_no_special"]);
        assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{text:?}");
        assert_eq!(tokenizer.decode(&plain, false).unwrap(), case["decoded"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids(&case["ids"]), true).unwrap(), case["decoded_skip"], "{text:?}");
    }
}

#[test]
fn the_files_truncation_is_cleared() {
    let golden = golden();
    let truncation = &golden["truncation"];
    let sentence = truncation["text_repeat"][0].as_str().unwrap();
    let text = vec![sentence; truncation["text_repeat"][1].as_u64().unwrap() as usize].join(" ");
    let file = std::fs::read_to_string(fixture("micro/llmcompressor-tiny-f32/tokenizer.json")).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    assert_eq!(file["truncation"]["max_length"], 128, "the fixture carries the trap");
    let tokens = tokenizer().encode(&text, true).unwrap();
    assert_eq!(tokens.len() as u64, truncation["n_ids_base"].as_u64().unwrap());
    assert_ne!(tokens.len() as u64, truncation["n_ids_llmcompressor_as_saved"].as_u64().unwrap());
}

#[test]
fn renders_chats_as_transformers() {
    let (golden, tokenizer) = (golden(), tokenizer());
    let template = ChatTemplate::from_model_dir(&fixture("micro/llmcompressor-tiny-f32")).unwrap().unwrap();
    let cases = golden["chat"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let text = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(text, case["text"]);
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn streaming_holds_back_unfinished_characters() {
    let (golden, tokenizer) = (golden(), tokenizer());
    let ids = ids(&golden["incremental"]["ids"]);
    let prefixes = golden["incremental"]["prefixes"].as_array().unwrap();
    let mut detokenizer = Detokenizer::default();
    let mut text = String::new();
    for (id, prefix) in ids.iter().zip(prefixes) {
        text += &detokenizer.push(&tokenizer, *id).unwrap();
        assert_eq!(text, prefix.as_str().unwrap().trim_end_matches('\u{FFFD}'));
    }
    text += &detokenizer.finish(&tokenizer).unwrap();
    assert_eq!(text, prefixes.last().unwrap().as_str().unwrap());
}

#[test]
fn text_cut_inside_a_character_is_flushed_as_replacement() {
    let (golden, tokenizer) = (golden(), tokenizer());
    let ids = ids(&golden["incremental"]["ids"]);
    let prefixes = golden["incremental"]["prefixes"].as_array().unwrap();
    for end in 1..=ids.len() {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for id in &ids[..end] {
            text += &detokenizer.push(&tokenizer, *id).unwrap();
        }
        text += &detokenizer.finish(&tokenizer).unwrap();
        assert_eq!(text, prefixes[end - 1].as_str().unwrap());
    }
}

#[test]
fn endless_garbage_is_not_held_back_for_ever() {
    let tokenizer = tokenizer();
    let lone_byte = tokenizer.encode("é", false).unwrap()[0];
    let ids = vec![lone_byte; 1000];
    let mut detokenizer = Detokenizer::default();
    let mut text = String::new();
    for id in &ids {
        text += &detokenizer.push(&tokenizer, *id).unwrap();
    }
    assert!(text.chars().count() >= 990);
    text += &detokenizer.finish(&tokenizer).unwrap();
    assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
}

#[test]
fn a_broken_tokenizer_is_one_clear_line() {
    let dir = std::env::temp_dir().join(format!("quantkv-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let missing = Tokenizer::from_model_dir(&dir).unwrap_err().to_string();
    assert!(missing.contains("tokenizer.json"), "{missing}");
    // Two on which `tokenizers` itself panics.
    let whole = std::fs::read_to_string(fixture("micro/llmcompressor-tiny-f32/tokenizer.json")).unwrap();
    let syntax = whole.replace("\"decoder\": {", "\"decoder\": {,");
    let charsmap = r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}"#;
    let charsmap = whole.replace("\"normalizer\": null", charsmap);
    assert!(whole != syntax && whole != charsmap);
    let no_vocabulary = "{\"model\": {\"type\": \"BPE\", \"vocab\": 3, \"merges\": []}}";
    for text in ["", "{}", "{\"version\": \"1.0\"}", "[[[[", no_vocabulary, &syntax, &charsmap] {
        std::fs::write(dir.join("tokenizer.json"), text).unwrap();
        let error = Tokenizer::from_model_dir(&dir).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && !error.contains('\n'), "{text}: {error}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
