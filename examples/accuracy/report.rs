//! The rows as a table, as CSV and as JSON.

use std::io::{self, Write};

use quantkv::DType;
use serde_json::{Value, json};

use crate::args::Args;
use crate::data::Data;
use crate::measure::Measured;
use crate::rows::{Kind, Variant};

/// Everything that was measured, and on what.
pub struct Report<'a> {
    pub args: &'a Args,
    pub data: &'a Data,
    pub model: String,
    pub dtype: DType,
    pub layers: usize,
    pub device: String,
    pub activations: DType,
    /// By how much the keys of that model are larger; its layers' largest keys, from and to.
    pub large_keys: Option<(f32, (f32, f32))>,
    pub rows: &'a [Measured],
}

const HEAD: [&str; 11] = [
    "KV cache",
    "scales",
    "bytes/token",
    "perplexity",
    "change",
    "mean KL",
    "+-",
    "p99 KL",
    "top-1",
    "same text",
    "recall",
];

impl Report<'_> {
    pub fn table(&self, out: &mut impl Write) -> io::Result<()> {
        self.heading(out)?;
        let cells: Vec<[String; 11]> = self.rows.iter().map(cells).collect();
        let mut widths = HEAD.map(str::len);
        for row in &cells {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: &[String; 11]| {
            let pad = |(at, (cell, width)): (usize, (&String, &usize))| match at {
                0 | 1 => format!("{cell:width$}"),
                _ => format!("{cell:>width$}"),
            };
            let line: Vec<String> = cells.iter().zip(&widths).enumerate().map(pad).collect();
            line.join("  ").trim_end().to_owned() + "\n"
        };
        let lines = |rows: &[[String; 11]]| rows.iter().map(line).collect::<String>();
        write!(out, "{}{}", line(&HEAD.map(str::to_owned)), line(&widths.map(|width| "-".repeat(width))))?;
        let is_choice = |row: &&Measured| matches!(row.row.kind, Kind::Reference | Kind::Choice);
        let (choices, failures) = cells.split_at(self.rows.iter().filter(is_choice).count());
        write!(out, "{}", lines(choices))?;
        if !failures.is_empty() {
            write!(out, "\nMistakes (!) and what to do instead (=):\n{}", lines(failures))?;
        }
        out.flush()
    }

    fn heading(&self, out: &mut impl Write) -> io::Result<()> {
        let Report { args, data, .. } = self;
        let length = args.sequence_length;
        let (scored, calibrated) = (data.evaluation.len(), data.calibration.len());
        writeln!(out, "model   {}, {}, {} layers", self.model, self.dtype, self.layers)?;
        writeln!(out, "device  {}, activations in {}", self.device, self.activations)?;
        writeln!(
            out,
            "texts   {scored} of up to {length} tokens from {}; scales from {calibrated} others",
            data.source
        )?;
        let prompts = match self.tales() {
            0 => format!("{} halves of texts", data.prompts.len()),
            tales => format!("{tales} tales with {:?} facts and {} other sentences", args.facts, args.fillers),
        };
        writeln!(out, "greedy  {} tokens after {prompts}", args.max_tokens)?;
        if let Some((factor, (from, to))) = self.large_keys {
            writeln!(out, "large   keys times {factor}, queries divided by it: keys reach {from:.0} to {to:.0}")?;
        }
        writeln!(out)
    }

    fn tales(&self) -> usize {
        self.data.prompts.iter().filter(|prompt| prompt.answer.is_some()).count()
    }

    pub fn csv(&self) -> String {
        let mut text = String::from(
            "name,kind,model,format,scales,bytes_per_token,positions,invalid_positions,perplexity,\
             reference_perplexity,mean_kl,mean_kl_error,p99_kl,max_kl,top1_agreement,prompts,same_text,\
             median_first_divergence,tales,recalled\n",
        );
        for row in self.rows {
            let s = &row.scores;
            let fields = [
                row.row.name.to_owned(),
                row.row.kind.name().to_owned(),
                model_name(row.row.variant).to_owned(),
                row.format.to_string(),
                format!("\"{}\"", row.row.about),
                row.bytes_per_token.to_string(),
                s.positions.to_string(),
                s.invalid.to_string(),
                s.perplexity.to_string(),
                s.reference_perplexity.to_string(),
                s.mean_kl.to_string(),
                s.kl_error.to_string(),
                s.p99_kl.to_string(),
                s.max_kl.to_string(),
                s.top1.to_string(),
                row.divergence.len().to_string(),
                row.same_text().to_string(),
                row.median_divergence().map_or(String::new(), |token| token.to_string()),
                row.tales.to_string(),
                row.recalled.to_string(),
            ];
            text.push_str(&fields.join(","));
            text.push('\n');
        }
        text
    }

    /// Numbers that are infinite or not numbers are null.
    pub fn json(&self) -> Value {
        let Report { args, data, .. } = self;
        json!({
            "model": self.model,
            "dtype": self.dtype.to_string(),
            "device": self.device,
            "activations": self.activations.to_string(),
            "texts": {
                "source": data.source,
                "scored": data.evaluation.len(),
                "calibration": data.calibration.len(),
                "sequence_length": args.sequence_length,
            },
            "prompts": {
                "count": data.prompts.len(),
                "tales": self.tales(),
                "facts": args.facts,
                "fillers": args.fillers,
                "max_tokens": args.max_tokens,
            },
            "seed": args.seed,
            "large_keys_factor": self.large_keys.map(|(factor, _)| factor),
            "rows": self.rows.iter().map(row_json).collect::<Vec<_>>(),
        })
    }
}

impl Measured {
    /// Prompts whose greedy continuation is the reference's.
    pub fn same_text(&self) -> usize {
        self.divergence.iter().filter(|token| token.is_none()).count()
    }

    /// The first token that differs, counted from 0, in the median of the prompts where one does.
    pub fn median_divergence(&self) -> Option<usize> {
        let mut tokens: Vec<usize> = self.divergence.iter().copied().flatten().collect();
        tokens.sort_unstable();
        tokens.get(tokens.len().saturating_sub(1) / 2).copied()
    }
}

fn row_json(row: &Measured) -> Value {
    let s = &row.scores;
    json!({
        "name": row.row.name,
        "kind": row.row.kind.name(),
        "model": model_name(row.row.variant),
        "format": row.format.name(),
        "scales": row.row.about,
        "bytes_per_token": row.bytes_per_token,
        "k_scale": [row.k_scale.0, row.k_scale.1],
        "v_scale": [row.v_scale.0, row.v_scale.1],
        "positions": s.positions,
        "invalid_positions": s.invalid,
        "perplexity": s.perplexity,
        "reference_perplexity": s.reference_perplexity,
        "mean_kl": s.mean_kl,
        "mean_kl_error": s.kl_error,
        "p99_kl": s.p99_kl,
        "max_kl": s.max_kl,
        "top1_agreement": s.top1,
        "greedy": { "same": row.same_text(), "first_divergence": row.divergence },
        "recall": (row.tales > 0).then(|| json!({ "right": row.recalled, "tales": row.tales })),
    })
}

fn model_name(variant: Variant) -> &'static str {
    match variant {
        Variant::AsGiven => "as given",
        Variant::LargeKeys => "large keys",
    }
}

fn cells(row: &Measured) -> [String; 11] {
    let s = &row.scores;
    let mark = match row.row.kind {
        Kind::Failure => "! ",
        Kind::Remedy => "= ",
        Kind::Reference | Kind::Choice => "",
    };
    let name = if row.row.format.is_none() { "auto".into() } else { row.format.to_string() };
    let same = match row.median_divergence() {
        None => format!("{}/{}", row.same_text(), row.divergence.len()),
        Some(token) => format!("{}/{}, from {}", row.same_text(), row.divergence.len(), token + 1),
    };
    [
        name,
        format!("{mark}{}", row.row.about),
        row.bytes_per_token.to_string(),
        number(s.perplexity, 4),
        match s.perplexity - s.reference_perplexity {
            change if change.is_finite() => format!("{change:+.4}"),
            _ => "-".into(),
        },
        small(s.mean_kl),
        small(s.kl_error),
        small(s.p99_kl),
        format!("{:.2} %", 100.0 * s.top1),
        same,
        if row.tales > 0 { format!("{}/{}", row.recalled, row.tales) } else { "-".into() },
    ]
}

fn number(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "inf".into() }
}

fn small(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".into(),
        value if value.is_infinite() => "inf".into(),
        0.0 => "0".into(),
        value => format!("{value:.1e}"),
    }
}
