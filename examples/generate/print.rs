//! Streaming text and tables.
//!
//! Samples are made side by side but read one after the other: the first that has not ended is
//! printed as it grows, the others wait in memory.

use std::io::{self, Write};

use quantkv::Element;
use quantkv::decoder::Compute;
use quantkv::decoder::engine::Event;

use crate::report::RunReport;
use crate::setup::{Prompt, Session};

/// Characters of a text in a table.
const TEXT_COLUMN: usize = 60;

/// Prints samples in order as their text comes.
pub struct Printer {
    samples: Vec<Sample>,
    per_prompt: usize,
    /// The sample being printed.
    current: usize,
    silent: bool,
}

struct Sample {
    /// Printed before its text.
    head: String,
    /// Text that has come but was not printed.
    waiting: String,
    begun: bool,
    ended: bool,
}

impl Printer {
    pub fn new(prompts: &[Prompt], n: usize) -> Self {
        let many = prompts.len() > 1;
        let samples = prompts.iter().enumerate().flat_map(|(number, prompt)| {
            let title = if many { format!("[prompt {}]\n", number + 1) } else { String::new() };
            (0..n).map(move |sample| {
                let head = match (sample, n) {
                    (_, 1) => format!("{title}{}", prompt.text),
                    (0, _) => format!("{title}{}\n\n[sample 1]", prompt.text),
                    _ => format!("[sample {}]", sample + 1),
                };
                Sample { head, waiting: String::new(), begun: false, ended: false }
            })
        });
        Printer { samples: samples.collect(), per_prompt: n, current: 0, silent: false }
    }

    pub fn silent() -> Self {
        Printer { samples: Vec::new(), per_prompt: 1, current: 0, silent: true }
    }

    pub fn is_silent(&self) -> bool {
        self.silent
    }

    pub fn event(&mut self, event: &Event<'_>) -> io::Result<()> {
        if self.silent {
            return Ok(());
        }
        let sample = &mut self.samples[event.request * self.per_prompt + event.sample];
        sample.waiting.push_str(event.text);
        sample.ended |= event.finish_reason.is_some();
        self.print_ready()
    }

    /// Everything that can be printed in order.
    fn print_ready(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        while let Some(sample) = self.samples.get_mut(self.current) {
            if !sample.begun {
                write!(out, "{}", sample.head)?;
                sample.begun = true;
            }
            write!(out, "{}", std::mem::take(&mut sample.waiting))?;
            if !sample.ended {
                break;
            }
            writeln!(out, "\n")?;
            self.current += 1;
        }
        out.flush()
    }

    pub fn finish(&mut self) -> io::Result<()> {
        if self.silent { Ok(()) } else { self.print_ready() }
    }
}

/// Speeds and the cost of the cache.
pub fn closing_table<B: Compute<A>, A: Element>(
    out: &mut impl Write,
    session: &Session<B, A>,
    run: &RunReport,
) -> io::Result<()> {
    let stats = &run.stats;
    let config = session.model.config();
    let share = 100.0 * run.bytes_per_token as f64 / run.bytes_per_token_auto as f64;
    let tokens = run.num_blocks * run.block_size;
    let tokens_auto = run.cache_bytes / (run.bytes_per_token_auto * run.block_size) * run.block_size;
    let mut rows = vec![
        ("model", format!("{}, {}, {} layers", session.name, session.model.dtype(), config.num_layers)),
        ("device", format!("{}, activations in {}", session.device_description, A::DTYPE)),
        ("KV cache", format!("{} in blocks of {} tokens", run.format, run.block_size)),
        ("prefill", speed(stats.prefill_tokens, stats.prefill_seconds)),
        ("decode", speed(stats.decode_tokens, stats.decode_seconds)),
        ("KV bytes per token", format!("{}, {share:.1} % of auto's {}", run.bytes_per_token, run.bytes_per_token_auto)),
        (
            "budget",
            format!(
                "{} hold {tokens} tokens (auto {tokens_auto}) in {} blocks",
                bytes(run.cache_bytes),
                run.num_blocks
            ),
        ),
        (
            "blocks",
            format!(
                "{} used at once, {} copied, {} swapped out, {} swapped in",
                stats.blocks_peak, stats.blocks_copied, stats.blocks_swapped_out, stats.blocks_swapped_in
            ),
        ),
    ];
    if let Some(steps) = &run.decode_steps {
        let decoding = format!(
            "{:.3} ms ({:.3} to {:.3}) for {} at contexts of {:.0} to {:.0}, {:.1} tokens/s, reading {} of K and V",
            steps.median_seconds * 1e3,
            steps.fastest_seconds * 1e3,
            steps.slowest_seconds * 1e3,
            if steps.batch == 1 { "1 sequence".into() } else { format!("{} sequences", steps.batch) },
            steps.first_context,
            steps.last_context,
            steps.tokens_per_second(),
            bytes(steps.kv_bytes as usize),
        );
        rows.insert(5, ("decode step", decoding));
    }
    if let Some(line) = run.scales.line(run) {
        rows.insert(3, ("KV scales", line));
    }
    if stats.shared_tokens > 0 {
        rows.push(("shared", format!("{} prompt tokens found in blocks of others", stats.shared_tokens)));
    }
    if stats.recomputed > 0 {
        rows.push(("recomputed", format!("{} times, host memory was full", stats.recomputed)));
    }
    let width = rows.iter().map(|row| row.0.len()).max().unwrap_or(0);
    for (name, value) in rows {
        writeln!(out, "{name:width$}  {value}")?;
    }
    Ok(())
}

/// A table for each prompt: every dtype's numbers and text.
pub fn compare_table<B: Compute<A>, A: Element>(
    out: &mut impl Write,
    session: &Session<B, A>,
    runs: &[RunReport],
) -> io::Result<()> {
    let rate = |tokens: usize, seconds: f64| match seconds > 0.0 {
        true => format!("{:.0}", tokens as f64 / seconds),
        false => "-".into(),
    };
    for (number, prompt) in session.prompts.iter().enumerate() {
        writeln!(out, "{}{}", if number > 0 { "\n" } else { "" }, one_line(&prompt.text, 2 * TEXT_COLUMN))?;
        let mut rows = vec![
            ["KV cache", "bytes/token", "prefill tok/s", "decode tok/s", "first divergence", "text"].map(str::to_owned),
        ];
        for run in runs {
            for (sample, output) in run.outputs[number].iter().enumerate() {
                let divergence = match run.first_divergence(&runs[0], number, sample) {
                    _ if std::ptr::eq(run, &runs[0]) => "-".to_owned(),
                    Some(at) => format!("token {}", at + 1),
                    None => "none".to_owned(),
                };
                rows.push([
                    run.dtype_name().to_owned(),
                    run.bytes_per_token.to_string(),
                    rate(run.stats.prefill_tokens, run.stats.prefill_seconds),
                    rate(run.stats.decode_tokens, run.stats.decode_seconds),
                    divergence,
                    one_line(&output.text, TEXT_COLUMN),
                ]);
            }
        }
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        for (index, row) in rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(out, "{}", cells.join("  ").trim_end())?;
            if index == 0 {
                writeln!(out, "{}", rule.join("  "))?;
            }
        }
    }
    out.flush()
}

/// At most `width` characters, line breaks shown as `\n`.
fn one_line(text: &str, width: usize) -> String {
    let escaped: String = text
        .trim_start()
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    match escaped.char_indices().nth(width) {
        Some((end, _)) => format!("{}…", &escaped[..end]),
        None => escaped,
    }
}

fn speed(tokens: usize, seconds: f64) -> String {
    match seconds > 0.0 {
        true => format!("{tokens} tokens in {seconds:.3} s, {:.1} tokens/s", tokens as f64 / seconds),
        false => format!("{tokens} tokens"),
    }
}

fn bytes(bytes: usize) -> String {
    let (unit, name) = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit)
        .unwrap_or((1, "bytes"));
    format!("{:.1} {name}", bytes as f64 / unit as f64)
}
