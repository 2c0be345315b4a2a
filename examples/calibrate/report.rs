//! What came out: a table, or one JSON object.

use std::io::{self, Write};

use quantkv::DType;
use quantkv::calibrate::{Calibration, HalfReport, LayerReport};
use quantkv::checkpoint::{Copied, WrittenCheckpoint};
use serde_json::{Value, json};

use crate::args::Args;

pub struct Report<'a> {
    pub args: &'a Args,
    /// `cpu`, `cuda:0`.
    pub device: String,
    pub activations: DType,
    pub model_dtype: DType,
    pub calibration: Calibration,
    pub layers: Vec<LayerReport>,
    /// `None` for a dry run.
    pub written: Option<WrittenCheckpoint>,
}

impl Report<'_> {
    /// A line for each layer and half, then what was done.
    pub fn table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>5}  {:<4} {:>24} {:>24} {:>10} {:>9}",
            "layer", "half", "scale", "largest", "clipped", "headroom"
        )?;
        for (number, layer) in self.layers.iter().enumerate() {
            for (name, half) in [("K", &layer.k), ("V", &layer.v)] {
                let (scale, largest) = (range(half.scale.values()), range(&half.absmax));
                let (clipped, headroom) = (format!("{:.4} %", half.clipped * 100.0), headroom(half));
                writeln!(out, "{number:>5}  {name:<4} {scale:>24} {largest:>24} {clipped:>10} {headroom:>9}")?;
            }
        }
        let Report { args, calibration, .. } = self;
        writeln!(out)?;
        writeln!(out, "observer            {}, one scale a {}", args.observer, args.strategy.name())?;
        writeln!(out, "data                {} samples, {} tokens", calibration.samples(), calibration.tokens())?;
        writeln!(out, "device              {}, activations in {}", self.device, self.activations)?;
        match (&self.written, &args.out) {
            (Some(written), Some(out_dir)) => {
                let count = |how| written.files.values().filter(|copied| **copied == how).count();
                writeln!(
                    out,
                    "written             {}: {} files linked, {} copied, {} new",
                    out_dir.display(),
                    count(Copied::Linked),
                    count(Copied::Copied),
                    count(Copied::Written)
                )?;
                if !written.skipped.is_empty() {
                    writeln!(out, "left out            {}", written.skipped.join(", "))?;
                }
                Ok(())
            }
            _ => writeln!(out, "written             nothing (--dry-run)"),
        }
    }

    pub fn json(&self) -> Value {
        let Report { args, calibration, .. } = self;
        let layer = |(number, layer): (usize, &LayerReport)| json!({ "layer": number, "k": half(&layer.k), "v": half(&layer.v) });
        let how = |copied: &Copied| match copied {
            Copied::Linked => "linked",
            Copied::Copied => "copied",
            Copied::Written => "written",
        };
        let files = |written: &WrittenCheckpoint| -> Value {
            written
                .files
                .iter()
                .map(|(name, copied)| (name.clone(), json!(how(copied))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "model": args.model.display().to_string(),
            "out": self.written.as_ref().and(args.out.as_ref()).map(|out| out.display().to_string()),
            "observer": args.observer.to_string(),
            "strategy": args.strategy.name(),
            "samples": calibration.samples(),
            "tokens": calibration.tokens(),
            "device": self.device,
            "activations": self.activations.to_string(),
            "model_dtype": self.model_dtype.to_string(),
            "layers": self.layers.iter().enumerate().map(layer).collect::<Vec<_>>(),
            "files": self.written.as_ref().map(files),
            "left_out": self.written.as_ref().map(|written| &written.skipped),
        })
    }
}

fn half(half: &HalfReport) -> Value {
    json!({
        "scale": half.scale.values(),
        "absmax": half.absmax,
        "clipped": half.clipped,
        // JSON has no infinity: there is none of it where all is zero.
        "headroom": half.headroom.is_finite().then_some(half.headroom),
    })
}

fn headroom(half: &HalfReport) -> String {
    if half.headroom.is_finite() { format!("{:.3}x", half.headroom) } else { "all zero".into() }
}

/// `0.0512`, or `0.0512 to 0.0899`.
fn range(values: &[f32]) -> String {
    let (min, max) = values.iter().fold((f32::INFINITY, 0.0f32), |(min, max), x| (min.min(*x), max.max(*x)));
    let number = |x: f32| if (1e-3..1e5).contains(&x) || x == 0.0 { format!("{x:.5}") } else { format!("{x:.4e}") };
    if min == max { number(min) } else { format!("{} to {}", number(min), number(max)) }
}
