//! KL divergence against bytes per token, as SVG.
//!
//! ```text
//! ^ KL, log   │   1024 bytes/token   │ 1088 │   2048  │
//! │  o mean   │   o   o   o   x      │  o   │         │   o a choice, x a mistake; a line up to p99
//! └───────────┴──row──row──row──row──┴──────┴─────────┴
//! ```
//! Rows that store as many bytes stand side by side. Text is SVG text: the viewer brings the font.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::common::program::Failure;
use crate::measure::Measured;
use crate::report::Report;
use crate::rows::Kind;

const SLOT: u32 = 44;
const HEIGHT: u32 = 640;
const NAMES: u32 = 230;
const LEFT: u32 = 80;
const TOP: u32 = 60;

/// The plot of all rows.
pub fn svg(report: &Report<'_>) -> Result<String, Failure> {
    let mut rows: Vec<&Measured> = report.rows.iter().collect();
    // Stable: rows of as many bytes stay in the order of the table.
    rows.sort_by_key(|row| row.bytes_per_token);
    let mut text = String::new();
    draw(&mut text, &rows, &title(report)).map_err(|error| Failure::User(format!("the plot: {error}")))?;
    Ok(text)
}

fn title(report: &Report<'_>) -> String {
    let name = report.model.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(&report.model);
    format!("{name}: divergence from the unquantized KV cache, mean (marker) to p99 (line)")
}

type Drawn<T> = Result<T, DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

fn draw(text: &mut String, rows: &[&Measured], title: &str) -> Drawn<()> {
    let slots = rows.len() as f64;
    let (low, high) = decades(rows);
    let size = (LEFT + SLOT * rows.len() as u32 + 30, HEIGHT);
    let root = SVGBackend::with_string(text, size).into_drawing_area();
    root.fill(&WHITE)?;
    root.draw(&Text::new(title.to_owned(), (LEFT as i32, 12), ("sans-serif", 16).into_font()))?;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(TOP)
        .margin_right(20)
        .y_label_area_size(LEFT - 10)
        .x_label_area_size(NAMES)
        .build_cartesian_2d(0.0..slots, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc("KL divergence, nats")
        .y_label_formatter(&|value| format!("{value:.0e}"))
        .draw()?;

    let small = ("sans-serif", 12).into_font();
    for (slot, row) in rows.iter().enumerate() {
        let x = slot as f64 + 0.5;
        let (color, mark) = style(row.row.kind);
        let clamp = |kl: f64| if kl.is_nan() { high } else { kl.clamp(low, high) };
        let (mean, p99) = (clamp(row.scores.mean_kl), clamp(row.scores.p99_kl));
        chart.draw_series([PathElement::new(vec![(x, mean), (x, p99)], color.stroke_width(2))])?;
        match mark {
            Mark::Circle => drop(chart.draw_series([Circle::new((x, mean), 5, color.filled())])?),
            Mark::Cross => drop(chart.draw_series([Cross::new((x, mean), 5, color.stroke_width(2))])?),
        }
        if let Some(note) = note(row.scores.mean_kl) {
            let (px, py) = chart.plotting_area().map_coordinate(&(x, mean));
            let below = if mean < high { -18 } else { 8 };
            let centered = small.clone().color(&color).pos(Pos::new(HPos::Center, VPos::Top));
            root.draw(&Text::new(note, (px, py + below), centered))?;
        }
        let (px, py) = chart.plotting_area().map_coordinate(&(x, low));
        let sideways = small.clone().transform(FontTransform::Rotate270).color(&color);
        let sideways = sideways.pos(Pos::new(HPos::Right, VPos::Center));
        root.draw(&Text::new(label(row), (px, py + 8), sideways))?;
    }
    // A line between rows of different size, and above each group what a token takes.
    let mut start = 0;
    for group in rows.chunk_by(|a, b| a.bytes_per_token == b.bytes_per_token) {
        let (left, top) = chart.plotting_area().map_coordinate(&(start as f64, high));
        if start > 0 {
            let line = vec![(start as f64, low), (start as f64, high)];
            chart.draw_series([PathElement::new(line, BLACK.mix(0.4))])?;
        }
        let wide = group.len() > 2;
        let bytes = format!("{}{}", group[0].bytes_per_token, if wide { " bytes per token" } else { "" });
        root.draw(&Text::new(bytes, (left + 4, top - 16), small.clone()))?;
        start += group.len();
    }
    root.present()
}

enum Mark {
    Circle,
    Cross,
}

fn style(kind: Kind) -> (RGBColor, Mark) {
    match kind {
        Kind::Reference => (RGBColor(60, 60, 60), Mark::Circle),
        Kind::Choice => (RGBColor(31, 97, 172), Mark::Circle),
        Kind::Remedy => (RGBColor(30, 120, 70), Mark::Circle),
        Kind::Failure => (RGBColor(190, 40, 40), Mark::Cross),
    }
}

/// What the axis cannot show.
fn note(mean_kl: f64) -> Option<&'static str> {
    match mean_kl {
        0.0 => Some("0"),
        kl if kl.is_finite() => None,
        _ => Some("inf"),
    }
}

fn label(row: &Measured) -> String {
    let format = if row.row.format.is_none() { "auto".to_owned() } else { row.format.to_string() };
    match row.row.about {
        "none" => format,
        about => format!("{format}, {about}"),
    }
}

/// The powers of ten around every number that has a logarithm.
fn decades(rows: &[&Measured]) -> (f64, f64) {
    let values = || {
        let both = rows.iter().flat_map(|row| [row.scores.mean_kl, row.scores.p99_kl]);
        both.filter(|kl| kl.is_finite() && *kl > 0.0)
    };
    let low = values().fold(1e-3, f64::min).max(1e-12);
    let high = values().fold(1e-2, f64::max);
    (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil()))
}
