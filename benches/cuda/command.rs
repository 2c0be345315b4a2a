//! The command line and the run.

use std::ffi::c_int;
use std::path::PathBuf;

use quantkv::raw::bindings as c;

use crate::attention::{Case, Shape};
use crate::device::{self, Device, Outcome};
use crate::report::Report;
use crate::shapes::{self, Work};

struct Options {
    quick: bool,
    verify_only: bool,
    kernel: c_int,
    replays: usize,
    out: PathBuf,
    words: Vec<String>,
}

fn options() -> Outcome<Options> {
    let out = std::env::var_os("OUT").map_or("target/bench-cuda".into(), PathBuf::from);
    let mut options = Options {
        quick: false,
        verify_only: false,
        kernel: c::QUANTKV_ATTENTION_AUTO,
        replays: 30,
        out,
        words: vec![],
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--quick" => options.quick = true,
            // `cargo test --benches` wants to know that it runs, no more.
            "--verify-only" | "--test" => options.verify_only = true,
            "--bench" => {} // from cargo
            "--replays" => options.replays = value()?.parse().map_err(|error| format!("--replays: {error}"))?,
            "--out" => options.out = value()?.into(),
            "--kernel" => {
                options.kernel = match value()?.as_str() {
                    "auto" => c::QUANTKV_ATTENTION_AUTO,
                    "portable" => c::QUANTKV_ATTENTION_PORTABLE,
                    "tensor-core" => c::QUANTKV_ATTENTION_TENSOR_CORE,
                    other => return Err(format!("no kernel {other}")),
                }
            }
            option if option.starts_with('-') => return Err(format!("no option {option}")),
            word => options.words.push(word.into()),
        }
    }
    Ok(options)
}

/// A status that says "no kernel for this", rather than "it failed".
fn is_missing(why: &str) -> bool {
    let words = checked_words(c::QUANTKV_UNSUPPORTED);
    why.contains(&words) || why.contains("of cache do not fit")
}

fn checked_words(status: c_int) -> String {
    device::checked("", status).err().unwrap_or_default().trim_start_matches(": ").to_string()
}

/// Attention: `decode` and `prefill` with the plan ready, `schedule` the cost of making it.
fn attention(
    device: &Device,
    options: &Options,
    report: &mut Report,
    operation: &'static str,
    shape: &Shape,
) -> Outcome<()> {
    let shape = if options.verify_only { shape.shrunk() } else { shape.clone() };
    let pool_bytes = if options.verify_only { 0 } else { 200_000_000 };
    let case = Case::new(device, shape, options.kernel, pool_bytes)?;
    let error = case.verify()?;
    if options.verify_only {
        return Ok(());
    }
    let mut timing = case.time(true)?;
    if operation == "schedule" {
        let whole = case.time(false)?;
        timing.fastest = whole.fastest - timing.fastest;
        timing.slowest = whole.slowest - timing.slowest;
        timing.median = whole.median - timing.median;
    }
    let mut row = case.row(operation, timing, error)?;
    if operation == "schedule" {
        // It reads lengths, not the cache.
        (row.bytes, row.ceiling) = (0, None);
    }
    report.row(row);
    Ok(())
}

fn run(options: &Options) -> Outcome<Report> {
    let device = match Device::new(if options.verify_only { 1 } else { options.replays }) {
        Ok(device) => device,
        Err(why) => {
            println!("skipped: {why}");
            return Ok(Report::default());
        }
    };
    let mut about = device.describe()?;
    println!("{about}");
    let mut report = Report::default();
    if !options.verify_only {
        let (plain, overlapped) = device.empty_kernels()?;
        println!("empty kernel in a graph: {:.2} us; with dependent launch {:.2} us", plain.median, overlapped.median);
        let large = 1 << 30;
        let data = device.random(large, c::QUANTKV_F32, 8)?;
        let read = 4.0 * large as f64 / device.read_ceiling(&data, 4 * large)? / 1e6;
        drop(data);
        let copy = 2.0 * large as f64 / device.copy_ceiling(2 * large)? / 1e6;
        println!("plain read of 4 GiB: {read:.3} TB/s; plain copy of 1 GiB, read and written: {copy:.3} TB/s\n");
        about = format!("{about}; plain read {read:.2} TB/s");
        Report::header();
    }
    for work in shapes::all(options.quick) {
        let (operation, name) = (work.operation(), work.name());
        if !options.words.iter().all(|word| format!("{operation} {name}").contains(word.as_str())) {
            continue;
        }
        let done = match &work {
            Work::Decode(shape) => attention(&device, options, &mut report, operation, shape),
            Work::Prefill(shape) => attention(&device, options, &mut report, operation, shape),
            Work::Schedule(shape) => attention(&device, options, &mut report, operation, shape),
            Work::Write(write) => {
                write.measure(&device, options.verify_only).map(|row| row.map_or((), |row| report.row(row)))
            }
            Work::Copy(copy) => {
                copy.measure(&device, options.verify_only).map(|row| row.map_or((), |row| report.row(row)))
            }
            Work::Swap(swap) => {
                swap.measure(&device, options.verify_only).map(|row| row.map_or((), |row| report.row(row)))
            }
        };
        match done {
            Ok(()) if options.verify_only => println!("{operation:<12} {name:<58} ok"),
            Ok(()) => {}
            Err(why) => {
                let failure = !is_missing(&why);
                report.without(operation, &name, &why, failure);
                if failure && device.wait().is_err() {
                    return Err("the device is lost: an error it does not recover from".into());
                }
            }
        }
    }
    report.write(&options.out, "cuda", &about)?;
    Ok(report)
}

/// Runs what the command line asks for. Exit status 1: a shape failed; 2: nothing could be run.
pub fn main() {
    let report = options().and_then(|options| run(&options));
    match report {
        Ok(report) if report.failed == 0 => {}
        Ok(report) => {
            println!("{} shapes failed", report.failed);
            std::process::exit(1);
        }
        Err(why) => {
            eprintln!("error: {why}");
            std::process::exit(2);
        }
    }
}
