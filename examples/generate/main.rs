//! Text from a Hugging Face model through a quantized paged KV cache, and what the cache cost.
//!
//! ```text
//! cargo run --release --example generate
//! cargo run --release --example generate -- --model DIR --prompt "Once" --kv-cache-dtype fp8_e5m2
//! cargo run --release --example generate -- --compare
//! cargo run --release --features cuda --example generate -- --device cuda --random-weights llama-3.1-8b \
//!     --prompt-length 1000 --batch 16
//! ```
//! `args.rs` is the command line, `scales.rs` its part about scales, `../common/device.rs` the backend, `setup.rs`
//! what is loaded and how it is run, `print.rs` text and tables, `report.rs` the JSON object. Any error is
//! one line on stderr and exit code 2.

mod args;
#[path = "../common/bundled.rs"]
mod bundled;
#[path = "../common/mod.rs"]
mod common;
mod print;
mod report;
mod scales;
mod setup;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use quantkv::decoder::{Compute, Engine};
use quantkv::{DType, Element, KvCacheDtype};

use args::Args;
use common::device::{Job, Machine};
use common::program::{self, Failure, note};
use print::Printer;
use report::RunReport;
use setup::{Session, Source};

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: &Args) -> Result<(), Failure> {
    let source = Source::open(args)?;
    args.machine.run(!args.no_graphs, Generate { args, source })
}

struct Generate<'a> {
    args: &'a Args,
    source: Source,
}

impl Job for Generate<'_> {
    fn model_dtype(&self) -> Result<DType, Failure> {
        self.source.dtype()
    }

    fn run<B: Compute<A> + Machine, A: Element>(self, backend: B) -> Result<(), Failure> {
        let Generate { args, source } = self;
        let spinner = progress(None);
        let session = Session::load(args, source, backend);
        spinner.finish_and_clear();
        let mut session: Session<B, A> = session?;

        if args.compare {
            let formats = ["auto", "fp8_e4m3", "fp8_e5m2"];
            let mut runs = Vec::new();
            for name in formats {
                runs.push(generate(args, &mut session, name, true)?);
            }
            let mut out = io::stdout().lock();
            return match args.json {
                true => writeln!(out, "{}", report::compare_json(&session, &runs)).map_err(Failure::Output),
                false => print::compare_table(&mut out, &session, &runs).map_err(Failure::Output),
            };
        }

        let name = args.kv_cache_dtype.as_str();
        // Random tokens are no text to read.
        let silent = args.json || args.prompt_length.is_some();
        let report = generate(args, &mut session, name, silent)?;
        let mut out = io::stdout().lock();
        match args.json {
            true => writeln!(out, "{}", report::json(&session, &report))?,
            false => print::closing_table(&mut out, &session, &report)?,
        }
        Ok(out.flush()?)
    }
}

/// Runs all prompts through one cache, and unless `silent` prints text as it comes.
fn generate<B: Compute<A> + Machine, A: Element>(
    args: &Args,
    session: &mut Session<B, A>,
    dtype: &str,
    silent: bool,
) -> Result<RunReport, Failure> {
    let dtype: KvCacheDtype = dtype.parse()?;
    let plan = session.plan(args, dtype)?;
    let requests = session.requests(args)?;
    let prompt_tokens: usize = requests.iter().map(|request| request.prompt.len()).sum();

    let prompts = &session.prompts;
    let mut engine = Engine::new(&mut session.model, session.tokenizer.clone(), plan.engine, &plan.scales)?;
    for (number, request) in requests.into_iter().enumerate() {
        engine.add_request(request).map_err(|error| setup::explain(number, prompts.len(), error))?;
    }
    // Not before: a refused request is to be the only line.
    let warnings = std::mem::take(&mut session.notes).into_iter().chain(plan.scales.warnings.iter().cloned());
    warnings.for_each(|text| note("warning", &text));
    let mut printer = if silent { Printer::silent() } else { Printer::new(prompts, args.n) };
    let bar = progress(Some(prompt_tokens).filter(|tokens| *tokens > args.max_prefill_tokens));
    let mut steps = Vec::new();
    while engine.has_work() {
        let mut written = Ok(());
        engine.step(|event| {
            if !bar.is_finished() && !printer.is_silent() {
                bar.finish_and_clear();
            }
            if written.is_ok() {
                written = printer.event(&event);
            }
        })?;
        written?;
        steps.push(engine.last_step());
        let stats = engine.stats();
        bar.set_position((stats.prefill_tokens + stats.shared_tokens) as u64);
    }
    bar.finish_and_clear();
    printer.finish()?;
    Ok(RunReport::new(&engine, dtype, &plan, prompts.len(), &steps)?)
}

/// A bar over `total` prompt tokens, or a spinner for loading; neither unless stderr is a terminal.
fn progress(total: Option<usize>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    match total {
        Some(total) => {
            let style = ProgressStyle::with_template("prefill {bar:40} {pos}/{len} tokens");
            ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        }
        None => {
            let spinner = ProgressBar::new_spinner().with_message("loading the model");
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        }
    }
}
