//! The FP8 scales of a model's KV cache from data, and a checkpoint that has them.
//!
//! ```text
//! cargo run --release --example calibrate -- --model DIR --text FILE --out DIR-FP8-KV
//! cargo run --release --example calibrate -- --model DIR --jsonl CHATS --chat --observer llmcompressor --out OUT
//! cargo run --release --example calibrate -- --model DIR --ids-file FILE --strategy head --dry-run
//! ```
//! `args.rs` is the command line, `data.rs` what becomes a sample, `interrupt.rs` Ctrl-C, `report.rs` the
//! table and the JSON object. What is computed is `quantkv::calibrate`, what is written
//! `quantkv::checkpoint`. Any error is one line on stderr and exit code 2; Ctrl-C is exit code 130, and
//! leaves no folder that is half written.

mod args;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod interrupt;
mod report;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use quantkv::calibrate::{Calibration, LayerReport, Runner};
use quantkv::checkpoint::{NewCheckpoint, WrittenCheckpoint, check_checkpoint, write_checkpoint};
use quantkv::decoder::{Compute, Config, Model, Weights};
use quantkv::{DType, Element};

use args::{Args, Strategy};
use common::device::{Job, Machine};
use common::program::{self, Failure, note};
use interrupt::Interrupt;
use report::Report;

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: &Args) -> Result<(), Failure> {
    let interrupt = Interrupt::listen()?;
    let (config, weights) = (Config::from_dir(&args.model)?, Weights::open(&args.model)?);
    if let Some(out) = args.out.as_deref().filter(|_| !args.dry_run) {
        check_checkpoint(&args.model, out)?;
    }
    let samples = data::read(args, &config)?;
    args.machine.run(true, Calibrate { args, config, weights, samples, interrupt })
}

struct Calibrate<'a> {
    args: &'a Args,
    config: Config,
    weights: Weights,
    samples: Vec<Vec<u32>>,
    interrupt: Interrupt,
}

impl Job for Calibrate<'_> {
    fn model_dtype(&self) -> Result<DType, Failure> {
        match self.config.dtype {
            Some(dtype) => Ok(dtype),
            None => Ok(self.weights.tensor("model.embed_tokens.weight")?.dtype()),
        }
    }

    fn run<B: Compute<A> + Machine, A: Element>(self, backend: B) -> Result<(), Failure> {
        let Calibrate { args, config, weights, samples, interrupt } = self;
        let device = backend.label();
        let spinner = spinner("loading the model");
        let model = Model::from_parts(config, weights, Arc::new(backend));
        spinner.finish_and_clear();
        let mut model: Model<B, A> = model?;

        let calibration = observe(args, &mut model, &samples, &interrupt)?;
        let layers = calibration.report()?;
        let written = match &args.out {
            Some(out) if !args.dry_run => Some(write(args, out, &layers, &interrupt)?),
            _ => None,
        };
        warn(args, &layers);
        let report =
            Report { args, device, activations: A::DTYPE, model_dtype: model.dtype(), calibration, layers, written };
        let mut out = io::stdout().lock();
        if args.json {
            writeln!(out, "{}", report.json())?
        } else {
            report.table(&mut out)?
        }
        Ok(out.flush()?)
    }
}

/// Runs every sample.
fn observe<B: Compute<A>, A: Element>(
    args: &Args,
    model: &mut Model<B, A>,
    samples: &[Vec<u32>],
    interrupt: &Interrupt,
) -> Result<Calibration, Failure> {
    let (dtype, granularity) = (model.dtype(), args.strategy.granularity());
    let mut calibration = Calibration::new(args.observer, granularity, model.config(), dtype);
    let longest = samples.iter().map(Vec::len).max().unwrap_or(0);
    let mut runner = Runner::new(model, longest)?;
    let bar = bar(samples.iter().map(Vec::len).sum());
    for (number, sample) in samples.iter().enumerate() {
        let mut progress = |tokens: usize| {
            bar.inc(tokens as u64);
            interrupt.flow()
        };
        let whole = runner.sample(sample, &mut calibration, &mut progress);
        if let Some(failure) = interrupt.failure() {
            bar.finish_and_clear();
            return Err(failure);
        }
        if let Err(error) = whole {
            bar.finish_and_clear();
            return Err(Failure::User(format!("sample {}: {error}", number + 1)));
        }
    }
    bar.finish_and_clear();
    Ok(calibration)
}

fn write(
    args: &Args,
    out: &std::path::Path,
    layers: &[LayerReport],
    interrupt: &Interrupt,
) -> Result<WrittenCheckpoint, Failure> {
    let scales: Vec<_> = layers.iter().map(LayerReport::scales).collect();
    let new = NewCheckpoint { model: &args.model, out, scales: &scales, observer: args.observer.scheme() };
    let spinner = spinner("writing the checkpoint");
    let written = write_checkpoint(&new, &mut || interrupt.flow());
    spinner.finish_and_clear();
    match (written?, interrupt.failure()) {
        (Some(written), _) => Ok(written),
        (None, failure) => Err(failure.unwrap_or(Failure::User("the checkpoint was not written".into()))),
    }
}

/// What the user should know of the scales.
fn warn(args: &Args, layers: &[LayerReport]) {
    if args.strategy == Strategy::Channel {
        note("warning", "scales per channel are quantkv's own: vLLM, transformers and others refuse the checkpoint");
    }
    let halves = || layers.iter().flat_map(|layer| [&layer.k, &layer.v]);
    let (clipping, worst) = (halves().filter(|half| half.clipped > 0.0), halves().map(|half| half.headroom));
    let (clipping, worst) = (clipping.count(), worst.fold(f32::INFINITY, f32::min));
    if clipping > 0 {
        let of = layers.len() * 2;
        note(
            "warning",
            &format!(
                "{clipping} of {of} scales cut off values of this very data, down to {:.0} % of the largest; \
                 --observer absmax cuts off none",
                worst * 100.0
            ),
        );
    }
}

/// A bar over tokens; hidden unless stderr is a terminal.
fn bar(tokens: usize) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("calibrating {bar:40} {pos}/{len} tokens, {per_sec}, {eta} left");
    ProgressBar::new(tokens as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn spinner(message: &'static str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
