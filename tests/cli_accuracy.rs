//! The `accuracy` example as a program: that the order of its rows is what it must be, what it prints and
//! writes, and that whatever is wrong ends in one line on stderr and exit code 2.

mod cli_support;

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::OnceLock;

use cli_support::{command, root, temp_dir};
use serde_json::{Value, json};

/// A few seconds of measuring.
const SMALL: &[&str] = &[
    "--samples",
    "8",
    "--calibration-samples",
    "8",
    "--sequence-length",
    "128",
    "--tales",
    "2",
    "--facts",
    "4",
    "--fillers",
    "4",
    "--max-tokens",
    "20",
];

fn run(args: &[&str]) -> Output {
    command("accuracy").args(args).output().unwrap()
}

/// Standard output of a run that must succeed and have nothing to complain about.
fn text(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    assert_eq!(stderr, "", "{args:?}: not a terminal, no bar");
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(args: &[&str]) -> Value {
    let stdout = text(&[args, &["--json"]].concat());
    assert_eq!(stdout.trim_end().lines().count(), 1, "one object on one line");
    serde_json::from_str(&stdout).unwrap()
}

fn row<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}"))
}

fn keys(value: &Value) -> Vec<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

/// One run of all rows, for every test that looks at it, and the folder it wrote to.
fn all_rows() -> &'static (Value, PathBuf) {
    static REPORT: OnceLock<(Value, PathBuf)> = OnceLock::new();
    REPORT.get_or_init(|| {
        let dir = temp_dir("all");
        let out = dir.join("new/folder").display().to_string();
        let report = json_of(&[SMALL, &["--out", &out]].concat());
        (report, PathBuf::from(out))
    })
}

/// Mean KL; what is null is infinite.
fn kl(name: &str) -> f64 {
    row(&all_rows().0, name)["mean_kl"].as_f64().unwrap_or(f64::INFINITY)
}

const E4M3: [&str; 8] = [
    "e4m3-one",
    "e4m3-tensor",
    "e4m3-head",
    "e4m3-channel",
    "e4m3-dynamic",
    "e4m3-first-batch",
    "e4m3-ema",
    "e4m3-mse",
];

#[test]
fn the_reference_is_exact_and_repeats_its_text() {
    for name in ["auto", "large-keys-auto"] {
        let row = row(&all_rows().0, name);
        assert_eq!((&row["mean_kl"], &row["max_kl"]), (&json!(0.0), &json!(0.0)), "{name}");
        assert_eq!(row["top1_agreement"], 1.0);
        assert_eq!(row["perplexity"], row["reference_perplexity"]);
        assert_eq!(row["greedy"], json!({ "same": 2, "first_divergence": [null, null] }));
        assert_eq!(row["recall"], json!({ "right": 2, "tales": 2 }), "the bundled model recalls");
    }
}

#[test]
fn formats_stand_in_the_order_of_their_mantissas() {
    // bf16 rounds to 2^-9, e4m3 to 2^-4, e5m2 to 2^-3.
    assert!(kl("f32") > 0.0, "bf16 is not f32");
    for name in E4M3 {
        assert!(kl("f32") * 20.0 < kl(name), "{name}: {} against f32's {}", kl(name), kl("f32"));
        assert!(kl(name) * 1.5 < kl("e5m2-one"), "{name}: {} against e5m2's {}", kl(name), kl("e5m2-one"));
        // Gates for a model of this size.
        assert!(kl(name) < 2e-3, "{name}: {}", kl(name));
        assert!(row(&all_rows().0, name)["top1_agreement"].as_f64().unwrap() > 0.97, "{name}");
    }
    assert!(kl("e5m2-one") < 8e-3);
    // With FNUZ codes and doubled scales a cache holds the same values, but for those beyond the range
    // of the calibration texts.
    let (ocp, fnuz) = (kl("e4m3-tensor"), kl("e4m3-fnuz"));
    assert!((ocp - fnuz).abs() < 0.5 * ocp, "{ocp} and {fnuz}");
}

#[test]
fn mistakes_are_visible_and_their_remedies_work() {
    let sound = kl("e4m3-tensor");
    for name in ["clipped", "large-keys-one", "fnuz-as-ocp", "fnuz-not-doubled", "fnuz-halved"] {
        assert!(kl(name) > 50.0 * sound, "{name}: {} against {sound}", kl(name));
        assert_eq!(row(&all_rows().0, name)["kind"], "failure");
    }
    assert!(kl("large-keys-tensor") < 2.0 * sound, "{} against {sound}", kl("large-keys-tensor"));
    assert_eq!(row(&all_rows().0, "large-keys-tensor")["kind"], "remedy");
    assert!(kl("large-keys-e5m2") < 8e-3, "e5m2 reaches as far");
    let choices = E4M3.map(kl).into_iter().chain([kl("f32"), kl("e5m2-one"), kl("e4m3-fnuz")]);
    assert!(choices.fold(0.0, f64::max) < kl("clipped"), "clipping is worse than any format");
    // Queries and keys times and by a power of two: the same model, to the bit.
    let (report, _) = all_rows();
    assert_eq!(row(report, "large-keys-auto")["perplexity"], row(report, "auto")["perplexity"]);
    let factor = report["large_keys_factor"].as_f64().unwrap();
    assert!(factor.log2().fract() == 0.0 && factor > 1.0, "{factor}");
}

#[test]
fn json_has_the_documented_fields() {
    let (report, _) = all_rows();
    let head = ["model", "dtype", "device", "activations", "texts", "prompts", "seed", "large_keys_factor", "rows"];
    assert_eq!(keys(report), head);
    assert_eq!(keys(&report["texts"]), ["source", "scored", "calibration", "sequence_length"]);
    assert_eq!(keys(&report["prompts"]), ["count", "tales", "facts", "fillers", "max_tokens"]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 21);
    for row in rows {
        let fields = [
            "name",
            "kind",
            "model",
            "format",
            "scales",
            "bytes_per_token",
            "k_scale",
            "v_scale",
            "positions",
            "invalid_positions",
            "perplexity",
            "reference_perplexity",
            "mean_kl",
            "mean_kl_error",
            "p99_kl",
            "max_kl",
            "top1_agreement",
            "greedy",
            "recall",
        ];
        assert_eq!(keys(row), fields);
        let handed_over = row["name"].as_str().unwrap().starts_with("fnuz-");
        // 8 texts of 128 tokens; the last is only a target, and of a prompt nothing is scored.
        assert_eq!(row["positions"], 8 * if handed_over { 63 } else { 127 }, "{}", row["name"]);
        // 4 layers of 2 heads of 64 channels, K and V.
        let bytes = match row["format"].as_str().unwrap() {
            "f32" => 4096,
            "bf16" => 2048,
            _ if row["name"] == "e4m3-dynamic" => 1024 + 4 * 2 * 2 * 4,
            _ => 1024,
        };
        assert_eq!(row["bytes_per_token"], bytes, "{}", row["name"]);
        assert_eq!(row["invalid_positions"] == 0, row["mean_kl"].is_number(), "{}", row["name"]);
    }
}

#[test]
fn files_say_the_same_as_the_output() {
    let (report, out) = all_rows();
    let file: Value = serde_json::from_str(&fs::read_to_string(out.join("accuracy.json")).unwrap()).unwrap();
    assert_eq!(&file, report);

    let csv = fs::read_to_string(out.join("accuracy.csv")).unwrap();
    let mut lines = csv.lines();
    let columns: Vec<&str> = lines.next().unwrap().split(',').collect();
    let (name, mean) = (0, columns.iter().position(|column| *column == "mean_kl").unwrap());
    let mut count = 0;
    for line in lines {
        // Commas stand inside quotes alone.
        let quoted: Vec<&str> = line.split('"').collect();
        let fields: Vec<String> = format!("{}-{}", quoted[0], quoted[2]).split(',').map(str::to_owned).collect();
        assert_eq!(fields.len(), columns.len(), "{line}");
        let expected = row(report, &fields[name])["mean_kl"].as_f64().unwrap_or(f64::INFINITY);
        // The JSON reader here may be off by the last bit.
        let written: f64 = fields[mean].parse().unwrap();
        assert!(written == expected || (written - expected).abs() <= 2.0 * f64::EPSILON * expected, "{line}");
        count += 1;
    }
    assert_eq!(count, 21);

    let svg = fs::read_to_string(out.join("accuracy.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("1024 bytes per token") && svg.contains("8 times too small"), "groups and rows are named");
    assert_eq!(svg.matches("<circle").count(), 21 - 5, "a circle for each row that is no mistake");
}

#[test]
fn the_table_has_the_rows_asked_for() {
    let small = ["--samples", "2", "--calibration-samples", "1", "--sequence-length", "64", "--tales", "0"];
    let table = text(&[&small[..], &["--formats", "fp8_e5m2,e4m3-head", "--max-tokens", "4"]].concat());
    let rows: Vec<&str> = table.lines().skip_while(|line| !line.starts_with("---")).skip(1).collect();
    assert_eq!(rows.len(), 3, "{table}");
    for (row, (cache, scales)) in rows.iter().zip([("auto", "none"), ("fp8_e4m3", "absmax"), ("fp8_e5m2", "1.0")]) {
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!((words[0], words[1]), (cache, scales), "{table}");
        assert!(row.ends_with('-'), "no tales, nothing to recall: {table}");
    }
    assert!(!table.contains("large"), "a model that no row asks for is not made: {table}");
}

#[test]
fn other_models_and_texts() {
    let dir = temp_dir("texts");
    let file = dir.join("text.txt").display().to_string();
    fs::write(&file, "The wind was cold that day. Ana's old map was left in the tall tower. ".repeat(20)).unwrap();
    let ids = dir.join("ids.json").display().to_string();
    let list: Vec<Vec<u32>> = (0..6).map(|list| (0..40).map(|id| (list * 31 + id * 7) % 500).collect()).collect();
    fs::write(&ids, json!(list).to_string()).unwrap();
    let model = root().join("tests/fixtures/micro/llmcompressor-tiny-f32").display().to_string();
    let small = ["--samples", "2", "--calibration-samples", "2", "--sequence-length", "32", "--max-tokens", "4"];
    for source in [["--text", &file], ["--ids-file", &ids]] {
        let report = json_of(&[&["--model", &model][..], &small, &source].concat());
        assert_eq!((&report["texts"]["scored"], &report["prompts"]["tales"]), (&json!(2), &json!(0)), "{source:?}");
        assert_eq!(row(&report, "auto")["format"], "f32", "the model's own dtype");
        assert_eq!(row(&report, "auto")["recall"], Value::Null);
        // Its keys reach thousands as it is: scale 1.0 clips, calibrated scales do not.
        let kl = |name| row(&report, name)["mean_kl"].as_f64().unwrap();
        assert!(kl("e4m3-tensor") * 3.0 < kl("e4m3-one"), "{} {}", kl("e4m3-tensor"), kl("e4m3-one"));
    }
}

#[test]
fn wrong_arguments_end_in_one_line() {
    let dir = temp_dir("hostile");
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let short = write("short.txt", "A few words.");
    let text = write("text.json", "Once upon a time");
    let far = write("far.json", "[[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 800]]");
    let nested = write("nested.json", "[[1, 2, -3]]");
    let empty = write("empty.json", "[]");
    let missing = dir.join("missing").display().to_string();
    let here = dir.display().to_string();
    for (args, expected) in [
        (&["--formats", "fp4"][..], "\"fp4\" is none of: all, failures, f32"),
        (&["--formats", ""], "none of"),
        (&["--samples", "0"], "at least 1"),
        (&["--samples", "-3"], "expected a whole number"),
        (&["--calibration-samples", "0"], "at least 1"),
        (&["--sequence-length", "7"], "at least 8"),
        (&["--sequence-length", "5000"], "2048 positions"),
        (&["--max-tokens", "5000", "--tales", "1"], "2048 positions"),
        (&["--max-tokens", "18446744073709551615", "--tales", "1"], "2048 positions"),
        (&["--fillers", "2000", "--tales", "1"], "2048 positions"),
        (&["--fillers", "18446744073709551615"], "at most 10000"),
        (&["--tales", "18446744073709551615"], "at most 10000"),
        (&["--samples", "18446744073709551615"], "at most 10000"),
        (&["--facts", "17"], "at most 16 facts"),
        (&["--facts", "4,0"], "at least 1"),
        (&["--text", &short], "at least 2 are needed"),
        (&["--text", &missing], "missing: "),
        (&["--text", &here], &here),
        (&["--text", &short, "--ids-file", &far], "cannot be used with"),
        (&["--ids-file", &text], "expected a JSON list of lists"),
        (&["--ids-file", &nested], "expected a JSON list of lists"),
        (&["--ids-file", &empty], "has 0 windows"),
        (&["--ids-file", &far], "token id 800 is outside the vocabulary of 768"),
        (&["--model", &missing], "missing/config.json"),
        (&["--out", &short, "--samples", "1"], "short.txt"),
        (&["--device", "tpu"], "expected cpu, cuda, cuda:N, rocm or rocm:N"),
        (&["--activations", "bf16"], "the CPU computes with f32"),
        (&["unexpected"], "unexpected"),
    ] {
        let output = run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    }
}
