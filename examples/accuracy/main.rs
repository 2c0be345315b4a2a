//! What each format and scale of the KV cache does to a model's predictions.
//!
//! ```text
//! cargo run --release --example accuracy
//! cargo run --release --example accuracy -- --out DIR                     CSV, JSON and a plot as well
//! cargo run --release --example accuracy -- --model DIR --text F          another model and text
//! cargo run --release --example accuracy -- --formats fp8_e5m2,failures   some rows
//! ```
//! The same texts are read over every cache, and the expected next tokens compared with those over the
//! unquantized one, position by position; then prompts are continued greedily, and answers to questions
//! about tales checked.
//!
//! `args.rs` is the command line, `data.rs` what is measured on (`tales.rs` tells tales), `rows.rs` the
//! rows, `calibration.rs` their scales, `large_keys.rs` and `cache.rs` what two failures need, `measure.rs`
//! with `score.rs`, `greedy.rs` and `metrics.rs` the measuring, `report.rs` and `plot.rs` what is printed
//! and written. Any error is one line on stderr and exit code 2.

mod args;
#[path = "../common/bundled.rs"]
mod bundled;
mod cache;
mod calibration;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod greedy;
mod large_keys;
mod measure;
mod metrics;
mod plot;
mod report;
mod rows;
mod score;
mod tales;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use quantkv::decoder::tokenizer::Tokenizer;
use quantkv::decoder::{Compute, Config, GenerationConfig, Model, Weights};
use quantkv::{DType, Element};

use args::Args;
use calibration::Calibrations;
use common::device::{Job, Machine};
use common::program::{self, Failure};
use data::Data;
use greedy::Greedy;
use large_keys::LargeKeys;
use measure::{Measured, Run};
use report::Report;
use rows::{Row, Variant};

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: &Args) -> Result<(), Failure> {
    let rows = rows::chosen(&args.formats).map_err(Failure::User)?;
    let dir = match &args.model {
        Some(dir) => dir.clone(),
        None => bundled::model_dir()?,
    };
    let (config, weights) = (Config::from_dir(&dir)?, Weights::open(&dir)?);
    // Decode steps are too short, and their caches too many, to record graphs of them.
    args.machine.run(false, Accuracy { args, rows, dir, config, weights })
}

struct Accuracy<'a> {
    args: &'a Args,
    rows: Vec<&'static Row>,
    dir: PathBuf,
    config: Config,
    weights: Weights,
}

impl Job for Accuracy<'_> {
    fn model_dtype(&self) -> Result<DType, Failure> {
        match self.config.dtype {
            Some(dtype) => Ok(dtype),
            None => Ok(self.weights.tensor("model.embed_tokens.weight")?.dtype()),
        }
    }

    fn run<B: Compute<A> + Machine, A: Element>(self, backend: B) -> Result<(), Failure> {
        let Accuracy { args, rows, dir, config, weights } = self;
        let tokenizer = match dir.join("tokenizer.json").exists() {
            true => Some(Arc::new(Tokenizer::from_model_dir(&dir)?)),
            false => None,
        };
        let data = Data::load(args, &config, tokenizer.as_deref())?;
        let eos = GenerationConfig::from_dir(&dir)?.eos_token_ids.unwrap_or(config.eos_token_ids.clone());
        if let Some(out) = &args.out {
            // Now rather than after minutes of measuring.
            fs::create_dir_all(out).map_err(|error| cannot_write(out, &error))?;
        }
        let backend = Arc::new(backend);
        let (label, device) = (backend.label(), backend.describe());
        let mut model = Model::from_parts(config, weights, Arc::clone(&backend))?;

        let of = |variant| rows.iter().copied().filter(|row: &&Row| row.variant == variant).collect::<Vec<_>>();
        let (given, large) = (of(Variant::AsGiven), of(Variant::LargeKeys));
        let needed = measure::memory_needed(&model, &data, args.max_tokens, given.len().max(large.len()))?;
        if let Some(free) = backend.free_memory().filter(|free| needed > *free) {
            return Err(Failure::User(format!(
                "the caches of all rows would take {needed} bytes, {label} has {free} to give: use fewer --formats, a \
                 shorter --sequence-length, or fewer --max-tokens"
            )));
        }
        let bar = progress(&data, &[given.len(), large.len()]);
        let measure = |model: &mut Model<B, A>, rows: &[&'static Row]| {
            let calibrations = Calibrations::new(model, &data.calibration, rows)?;
            let greedy = Greedy { max_tokens: args.max_tokens, eos: &eos };
            let run =
                Run { data: &data, calibrations: &calibrations, tokenizer: tokenizer.as_ref(), greedy, bar: &bar };
            Ok::<_, Failure>((run.measure(model, rows)?, calibrations.largest_keys()))
        };
        let (mut measured, keys): (Vec<Measured>, _) = measure(&mut model, &given)?;
        let (dtype, layers) = (model.dtype(), model.config().num_layers);
        let mut large_keys = None;
        if !large.is_empty() {
            let factor = large_keys::factor_for(keys, rows::LARGE_KEY);
            let folder = LargeKeys::make(&dir, model.config(), model.weights(), factor)?;
            // One model in memory at a time.
            drop(model);
            let mut model = Model::<B, A>::load(folder.path(), backend)?;
            let (more, keys) = measure(&mut model, &large)?;
            measured.extend(more);
            large_keys = Some((factor, keys));
        }
        bar.finish_and_clear();
        measured.sort_by_key(|measured| rows.iter().position(|row| row.name == measured.row.name));

        let report = Report {
            args,
            data: &data,
            model: dir.display().to_string(),
            dtype,
            layers,
            device,
            activations: A::DTYPE,
            large_keys,
            rows: &measured,
        };
        write_out(args, &report)
    }
}

fn write_out(args: &Args, report: &Report<'_>) -> Result<(), Failure> {
    if let Some(out) = &args.out {
        let write = |name: &str, text: String| {
            let path = out.join(name);
            fs::write(&path, text).map_err(|error| cannot_write(&path, &error))
        };
        write("accuracy.csv", report.csv())?;
        write("accuracy.json", format!("{:#}\n", report.json()))?;
        write("accuracy.svg", plot::svg(report)?)?;
    }
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", report.json())?,
        false => report.table(&mut out)?,
    }
    Ok(out.flush()?)
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::User(format!("{}: {error}", path.display()))
}

/// A bar over all texts and prompts of all rows of the models; none unless stderr is a terminal.
fn progress(data: &Data, rows: &[usize]) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let prompts = data.prompts.len();
    let of_model = |rows: &usize| match rows {
        0 => 0,
        // The reference continues the prompts once more.
        rows => rows * (data.evaluation.len() + prompts) + prompts,
    };
    let total: usize = rows.iter().map(of_model).sum();
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} texts and prompts, {eta} left");
    ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
