//! Results: a line printed as it is measured, a CSV file of all, and a picture of attention against
//! the bytes it reads.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::device::{Outcome, Timing};

/// One measured shape.
pub struct Row {
    /// `decode`, `prefill`, `cache_write`, ...
    pub operation: &'static str,
    pub shape: String,
    /// Lines of one series are one colour of the picture.
    pub series: String,
    pub timing: Timing,
    /// Bytes that must move.
    pub bytes: usize,
    /// Microseconds of a plain read (attention) or copy (the rest) of as many bytes, measured in this run.
    pub ceiling: Option<f64>,
    /// Floating-point operations, where they are the limit.
    pub flops: Option<f64>,
    /// ‖out - ref‖ / ‖ref‖ of the rows that were checked, or 0 where all bytes were equal.
    pub error: f64,
}

impl Row {
    fn terabytes(&self) -> f64 {
        self.bytes as f64 / self.timing.median / 1e6
    }
    fn fraction(&self) -> Option<f64> {
        self.ceiling.map(|ceiling| ceiling / self.timing.median)
    }
    fn teraflops(&self) -> Option<f64> {
        self.flops.map(|flops| flops / self.timing.median / 1e6)
    }
}

/// What has been measured so far.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    pub failed: usize,
}

fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

impl Report {
    pub fn header() {
        println!(
            "{:<12} {:<58} {:>9} {:>15} {:>10} {:>6} {:>8} {:>7} {:>8}",
            "operation", "shape", "us", "spread", "MB", "TB/s", "of limit", "TFLOP/s", "error"
        );
    }

    /// Prints and keeps a row.
    pub fn row(&mut self, row: Row) {
        println!(
            "{:<12} {:<58} {:>9.2} {:>15} {:>10.2} {:>6.3} {:>8} {:>7} {:>8.1e}",
            row.operation,
            row.shape,
            row.timing.median,
            format!("{:.2}-{:.2}", row.timing.fastest, row.timing.slowest),
            row.bytes as f64 / 1e6,
            row.terabytes(),
            or_dash(row.fraction(), 3),
            or_dash(row.teraflops(), 0),
            row.error
        );
        self.rows.push(row);
    }

    /// Prints why a shape has no row. Wrong results count as failures, a kernel that is not there does not.
    pub fn without(&mut self, operation: &str, shape: &str, why: &str, failure: bool) {
        println!("{operation:<12} {shape:<58} {}{why}", if failure { "FAILED: " } else { "" });
        self.failed += usize::from(failure);
    }

    /// Writes `NAME.csv` and `NAME.svg` into `folder`.
    pub fn write(&self, folder: &Path, name: &str, device: &str) -> Outcome<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let save = |extension: &str, text: String| {
            let path = folder.join(format!("{name}.{extension}"));
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
            println!("wrote {}", path.display());
            Ok::<_, String>(())
        };
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        save("csv", self.csv())?;
        let decode: Vec<_> = self.rows.iter().filter(|row| row.operation == "decode").collect();
        if decode.is_empty() { Ok(()) } else { save("svg", picture(&decode, device)) }
    }

    fn csv(&self) -> String {
        let mut text =
            "operation,series,shape,us,us_fastest,us_slowest,bytes,tb_per_s,limit_us,of_limit,tflops,error\n"
                .to_string();
        for row in &self.rows {
            let Timing { median, fastest, slowest } = row.timing;
            let _ = writeln!(
                text,
                "{},{},\"{}\",{median:.3},{fastest:.3},{slowest:.3},{},{:.4},{},{},{},{:.2e}",
                row.operation,
                row.series,
                row.shape,
                row.bytes,
                row.terabytes(),
                row.ceiling.map_or(String::new(), |x| format!("{x:.3}")),
                row.fraction().map_or(String::new(), |x| format!("{x:.4}")),
                row.teraflops().map_or(String::new(), |x| format!("{x:.1}")),
                row.error
            );
        }
        text
    }
}

const COLOURS: [&str; 8] = ["#1b6ca8", "#d1495b", "#3a7d44", "#8f5db7", "#c77d0a", "#2a9d8f", "#7a7a7a", "#9c2c77"];
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;

/// Fraction of a plain read of the same bytes (0 to 1, up) against those bytes (logarithmic, right).
fn picture(rows: &[&Row], device: &str) -> String {
    let mut series: Vec<&str> = rows.iter().map(|row| row.series.as_str()).collect();
    series.sort_unstable();
    series.dedup();
    let decade = |bytes: usize| (bytes.max(1) as f64).log10();
    let first = rows.iter().map(|row| decade(row.bytes)).fold(f64::MAX, f64::min).floor();
    let last = rows.iter().map(|row| decade(row.bytes)).fold(f64::MIN, f64::max).ceil().max(first + 1.0);
    let x = |bytes: usize| LEFT + WIDTH * (decade(bytes) - first) / (last - first);
    let y = |fraction: f64| TOP + HEIGHT * (1.0 - fraction.clamp(0.0, 1.1) / 1.1);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">Paged attention, decode: share of a plain read of the same bytes</text>\n\
         <text x=\"{LEFT}\" y=\"41\" fill=\"#555\">{}</text>\n",
        LEFT + WIDTH + 170.0,
        TOP + HEIGHT + 50.0,
        escape(device)
    );
    for tenth in (0..=10).step_by(2) {
        let (fraction, line) = (f64::from(tenth) / 10.0, y(f64::from(tenth) / 10.0));
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{line:.1}\" y2=\"{line:.1}\" stroke=\"{}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{fraction:.1}</text>",
            LEFT + WIDTH,
            if tenth == 10 { "#333" } else { "#ddd" },
            LEFT - 8.0,
            line + 4.0
        );
    }
    for power in first as i32..=last as i32 {
        let at = LEFT + WIDTH * (f64::from(power) - first) / (last - first);
        let label = match power {
            9.. => format!("{} GB", 10f64.powi(power - 9)),
            6..9 => format!("{} MB", 10f64.powi(power - 6)),
            _ => format!("{} kB", 10f64.powi(power - 3)),
        };
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            TOP + HEIGHT,
            TOP + HEIGHT + 18.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">bytes of K and V a call reads</text>",
        LEFT + WIDTH / 2.0,
        TOP + HEIGHT + 38.0
    );
    for row in rows {
        let (Some(fraction), Ok(which)) = (row.fraction(), series.binary_search(&row.series.as_str())) else {
            continue;
        };
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{}\" fill-opacity=\"0.75\"><title>{}: {fraction:.3}</title></circle>",
            x(row.bytes),
            y(fraction),
            COLOURS[which % COLOURS.len()],
            escape(&row.shape)
        );
    }
    for (i, name) in series.iter().enumerate() {
        let (at, colour) = (TOP + 10.0 + 20.0 * i as f64, COLOURS[i % COLOURS.len()]);
        let _ = writeln!(
            svg,
            "<circle cx=\"{0}\" cy=\"{at}\" r=\"5\" fill=\"{colour}\"/><text x=\"{1}\" y=\"{2}\">{3}</text>",
            LEFT + WIDTH + 20.0,
            LEFT + WIDTH + 32.0,
            at + 4.0,
            escape(name)
        );
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
