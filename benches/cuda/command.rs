//! The command line and the run.

use std::ffi::c_int;
use std::path::PathBuf;

use quantkv::raw::bindings as c;

use crate::attention::{Case, Shape};
use crate::device::{self, Device, Outcome};
use crate::report::{Report, Row};
use crate::shapes::{self, Work};

struct Options {
    quick: bool,
    verify_only: bool,
    kernel: c_int,
    replays: usize,
    pool_bytes: usize,
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
        pool_bytes: 200_000_000,
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
            "--pool-mb" => {
                let megabytes: usize = value()?.parse().map_err(|error| format!("--pool-mb: {error}"))?;
                options.pool_bytes = megabytes * 1_000_000;
            }
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
    let pool_bytes = if options.verify_only { 0 } else { options.pool_bytes };
    let case = Case::new(device, shape.clone(), options.kernel, pool_bytes)?;
    let error = case.verify()?;
    if options.verify_only {
        println!("{operation:<12} {:<58} ok, off by {error:.1e}", shape.name());
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
        // 4 GB of reads and 2 GB of copies for pools of 200 MB.
        let (read_bytes, copy_bytes) = (options.pool_bytes / 16 * 320, options.pool_bytes / 16 * 160);
        let data = device.random(read_bytes / 4, c::QUANTKV_F32, 8)?;
        let read = read_bytes as f64 / device.read_ceiling(&data, read_bytes)? / 1e6;
        drop(data);
        let copy = copy_bytes as f64 / device.copy_ceiling(copy_bytes)? / 1e6;
        println!(
            "plain read of {} MB: {read:.3} TB/s; plain copy, {} MB read and written: {copy:.3} TB/s\n",
            read_bytes / 1_000_000,
            copy_bytes / 1_000_000
        );
        about = format!("{about}; plain read {read:.2} TB/s");
        Report::header();
    }
    let work = if options.verify_only { shapes::small() } else { shapes::all(options.quick) };
    let mut lost = None;
    for work in work {
        let (operation, name) = (work.operation(), work.name());
        if !options.words.iter().all(|word| format!("{operation} {name}").contains(word.as_str())) {
            continue;
        }
        let moved = |report: &mut Report, row: Option<Row>| match row {
            Some(row) => report.row(row),
            None => println!("{operation:<12} {name:<58} ok"),
        };
        let verify_only = options.verify_only;
        let done = match &work {
            Work::Decode(shape) | Work::Prefill(shape) | Work::Schedule(shape) => {
                attention(&device, options, &mut report, operation, shape)
            }
            Work::Write(write) => write.measure(&device, verify_only).map(|row| moved(&mut report, row)),
            Work::Copy(copy) => copy.measure(&device, verify_only).map(|row| moved(&mut report, row)),
            Work::Swap(swap) => swap.measure(&device, verify_only).map(|row| moved(&mut report, row)),
        };
        if let Err(why) = done {
            let failure = !is_missing(&why);
            report.without(operation, &name, &why, failure);
            if failure && device.wait().is_err() {
                lost = Some("an error the device does not recover from: the rest is not measured");
                break;
            }
        }
    }
    report.write(&options.out, "cuda", &about)?;
    lost.map_or(Ok(report), |why| Err(why.into()))
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
