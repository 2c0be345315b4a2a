//! Attention and the merge of partial states in f64, with the error a kernel may make.
//!
//! The tolerance follows the arithmetic the contract allows (f32, any order of sums, scales folded
//! anywhere, exp2 domain). With `u = 2^-24` and `A_j = |softmax_scale| Σ_d |q_d k_jd|`:
//!
//! ```text
//! score      |δs_j| <= (D + 8) u A_j         D products, D - 1 sums, a few foldings of scales
//!                    + 16 u cap              soft cap: slope at most 1, tanh to 16 u
//!                    + 8 u (|s_j| + |alibi|) conversion to base 2 and the bias
//! weights    E = max_j |δs_j| + 16 u         exp of a shifted argument, to 16 u
//! output     |δo_d| <= Σ_j p_j |v_jd| (2 E + 2 (n + 16) u) + ½ ulp_out(o_d)
//! lse        |δl| <= E + (n + 16) u + 8 u |l|
//! ```
//! Numerator and denominator each carry E and a sum of n terms, hence the factors 2.
//!
//! Tensor cores ([`Arithmetic::TensorCore`]) take 16-bit operands and add 16 products at a time, aligned to the
//! largest of them and cut off: at most 17 * 2^-23 of the magnitudes in 16 terms, below 3 u a term. Codes
//! are exact in 16 bits. Queries are exact too, but
//! - f16: below 2^-24 of what a row's largest, scaled by a power of two to 2^13 at least, leaves: 2^-38 of it;
//! - with K scales per channel, which are multiplied in first: 2^-11.
//!
//! Weights, relative to the largest and times the dynamic V scale relative to the largest power of two, are rounded:
//! r = 2^-11 in f16, and then not finer than 2^-24; r = 2^-8 in bf16.
//!
//! ```text
//! score      |δs_j| <= (3 D + 8) u A_j + |softmax_scale| Σ_d |k_jd| (c |q_d| + 2^-38 max_e |q_e s_e| / s_d) + ..
//! output     |δo_d| <= Σ_j p_j |v_jd| (2 E + 2 (3 n + 16) u + r)
//!                    + 2^-24 Σ_j |v_jd| (max_i dynamic_i / dynamic_j) / Σ_j exp(s_j - max s)   f16 only
//! ```
//! where c = 2^-11 with K scales per channel, else 0.
//!
//! The matrix cores of gfx90a ([`Arithmetic::FlushingTensorCore`]) take subnormal operands for zero. In f16 2^-38 becomes
//! 2^-27 then, and elements of K and V below 2^-14 before their scale count for nothing: f16 and E5M2 have such.

use quantkv::args::{AttentionParams, RowStrides};
use quantkv::layout::Half;
use quantkv::{DType, Faults, KvFormat};

use super::formats::{quantized, smallest, unit_roundoff};
use super::geometry::{Geometry, Layer, Scales};
use super::rows::Rows;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// What a kernel computes scores and outputs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    F32,
    /// 16-bit products wherever activations are 16-bit: bf16 if K is bf16, else f16.
    TensorCore,
    /// The same, but subnormal operands are zeros.
    FlushingTensorCore,
}

impl Arithmetic {
    pub fn of(has_tensor_cores: bool, flushes_subnormals: bool) -> Self {
        match (has_tensor_cores, flushes_subnormals) {
            (false, _) => Arithmetic::F32,
            (true, false) => Arithmetic::TensorCore,
            (true, true) => Arithmetic::FlushingTensorCore,
        }
    }
}

/// How many there are.
const ARITHMETICS: usize = 3;

/// A bound of errors for each [`Arithmetic`].
type Bounds = [f64; ARITHMETICS];

#[derive(Clone, Debug)]
pub struct AttentionCase {
    pub geometry: Geometry,
    pub layer: Layer,
    pub k_scale: Scales,
    pub v_scale: Scales,
    pub params: AttentionParams,
    pub num_heads: usize,
    pub num_tokens: usize,
    pub max_query_len: Option<usize>,
    pub dtype: DType,
    pub query: Rows,
    pub query_starts: Vec<i32>,
    pub seq_lens: Vec<i32>,
    pub tables: Vec<i32>,
    pub table_stride: usize,
    pub alibi: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    /// The output's layout, and what it holds before.
    pub output: Rows,
    /// What the LSE buffer holds before, if there is one.
    pub lse: Option<Vec<f32>>,
}

/// What one (token, head) must be.
#[derive(Clone, Debug)]
pub struct Expected {
    pub out: Vec<f64>,
    pub out_tolerance: Vec<f64>,
    pub lse: f64,
    pub lse_tolerance: f64,
}

/// The same, and how far each [`Arithmetic`] may be from it.
#[derive(Clone, Debug)]
struct Row {
    out: Vec<f64>,
    out_tolerance: [Vec<f64>; ARITHMETICS],
    lse: f64,
    lse_tolerance: Bounds,
}

/// What tensor cores round, for one case.
#[derive(Clone, Copy, Debug)]
struct Rounding {
    /// Of a weight, relative.
    weight: f64,
    /// Of a weight, relative to the largest one.
    weight_floor: f64,
    /// Of a query element, relative.
    query: f64,
    /// Of a query element, relative to the row's largest.
    query_floor: f64,
    /// What elements of K and of V may lose, before their scales.
    element_floor: [f64; 2],
    /// Roundings a term of a sum, in [`U`].
    sum: f64,
}

impl Rounding {
    const NONE: Rounding =
        Rounding { weight: 0.0, weight_floor: 0.0, query: 0.0, query_floor: 0.0, element_floor: [0.0; 2], sum: 1.0 };

    /// For each [`Arithmetic`].
    fn of(case: &AttentionCase) -> [Rounding; ARITHMETICS] {
        let format = case.geometry.format(Half::K);
        let tensor_core = if case.dtype == DType::F32 {
            Rounding::NONE
        } else if format == KvFormat::BF16 {
            Rounding { weight: 2f64.powi(-8), sum: 3.0, ..Rounding::NONE }
        } else {
            let by_channel = quantized(format) && case.k_scale.channel != 0;
            Rounding {
                weight: 2f64.powi(-11),
                weight_floor: 2f64.powi(-24),
                query: if by_channel { 2f64.powi(-11) } else { 0.0 },
                query_floor: 2f64.powi(-38),
                element_floor: [0.0; 2],
                sum: 3.0,
            }
        };
        let has_subnormals = |half| matches!(case.geometry.format(half), KvFormat::F16 | KvFormat::Fp8E5M2);
        let element_floor = [Half::K, Half::V].map(|half| if has_subnormals(half) { 2f64.powi(-14) } else { 0.0 });
        let is_f16 = tensor_core.query_floor > 0.0;
        let of_f16 = Rounding { query_floor: 2f64.powi(-27), element_floor, ..tensor_core };
        let flushing = if is_f16 { of_f16 } else { tensor_core };
        [Rounding::NONE, tensor_core, flushing]
    }
}

/// A sequence as the kernel must see it after clamping.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub first: usize,
    pub queries: usize,
    pub len: usize,
}

/// The sequences whose query starts are sound, and the faults that starts and lengths owe and
/// allow. A length that no query asks about may be looked at or not.
pub fn sequences(case: &AttentionCase) -> (Vec<Option<Sequence>>, Faults, Faults) {
    let (mut owed, mut allowed, mut claimed) = (Faults::NONE, Faults::NONE, 0);
    let capacity = case.table_stride.saturating_mul(case.geometry.block_size);
    let sequences = (0..case.seq_lens.len())
        .map(|s| {
            let (first, last) = (i64::from(case.query_starts[s]), i64::from(case.query_starts[s + 1]));
            let len = usize::try_from(case.seq_lens[s]).unwrap_or(0).min(capacity);
            let bad_len = len as i64 != i64::from(case.seq_lens[s]);
            if bad_len {
                allowed = allowed.union(Faults::SEQ_LEN_OUT_OF_RANGE);
            }
            if (first == last && first < claimed) || case.num_tokens == 0 {
                // Claims no row: skipped or not, nothing shows.
                allowed = allowed.union(Faults::QUERY_START_OUT_OF_RANGE);
            }
            let too_many = case.max_query_len.is_some_and(|most| last - first > most.max(1) as i64);
            if first < 0
                || last < first
                || last > case.num_tokens as i64
                || (first < claimed && last > first)
                || too_many
            {
                owed = owed.union(Faults::QUERY_START_OUT_OF_RANGE);
                return None;
            }
            claimed = claimed.max(last);
            if bad_len && last > first {
                owed = owed.union(Faults::SEQ_LEN_OUT_OF_RANGE);
            }
            Some(Sequence { first: first as usize, queries: (last - first) as usize, len })
        })
        .collect();
    (sequences, owed, allowed)
}

/// Whether the query at position `p` sees key `j`.
pub fn visible(case: &AttentionCase, p: i64, j: i64) -> bool {
    j <= p && case.params.sliding_window.is_none_or(|window| j as i128 > p as i128 - window as i128)
}

/// Where position `j` of sequence `s` lies: `None` if its block id is outside the cache.
pub fn slot_of(case: &AttentionCase, s: usize, j: usize) -> Option<(usize, usize)> {
    let block = case.tables[s * case.table_stride + j / case.geometry.block_size];
    let block = usize::try_from(block).ok().filter(|&block| block < case.geometry.num_blocks)?;
    Some((block, j % case.geometry.block_size))
}

/// A position's key and value rows of all heads, dequantized exactly but for f64; and of each head the sum of the key's
/// magnitudes over their static scales, and the dynamic scale of the value.
struct Token {
    k: Vec<f64>,
    v: Vec<f64>,
    k_over_scales: Vec<f64>,
    v_dynamic: Vec<f64>,
}

/// The positions of one sequence; `None` for one whose block is outside the cache.
struct Dense {
    positions: Vec<Option<Token>>,
    /// The largest dynamic scale of V, each head.
    v_dynamic_max: Vec<f64>,
}

impl Dense {
    fn new(case: &AttentionCase, s: usize, len: usize) -> Self {
        let geometry = &case.geometry;
        let dynamic =
            |half, (block, slot), head| -> f64 { case.layer.dynamic_scale(geometry, half, (block, head, slot)).into() };
        let row = |half: Half, (block, slot): (usize, usize)| {
            let scales = if half == Half::K { &case.k_scale } else { &case.v_scale };
            let mut row = Vec::with_capacity(geometry.heads * geometry.dim(half));
            for head in 0..geometry.heads {
                for d in 0..geometry.dim(half) {
                    let code = f64::from(case.layer.load(geometry, half, (block, head, slot, d)));
                    let scale = if quantized(geometry.format(half)) { f64::from(scales.at(head, d)) } else { 1.0 };
                    row.push(code * scale * dynamic(half, (block, slot), head));
                }
            }
            row
        };
        let over_scales = |head: usize, k: &[f64]| -> f64 {
            k.iter().enumerate().map(|(d, k)| k.abs() / k_scale(case, head, d)).sum()
        };
        let position = |j| {
            slot_of(case, s, j).map(|slot| {
                let k = row(Half::K, slot);
                Token {
                    k_over_scales: k.chunks(geometry.k_dim).enumerate().map(|(head, k)| over_scales(head, k)).collect(),
                    k,
                    v: row(Half::V, slot),
                    v_dynamic: (0..geometry.heads).map(|head| dynamic(Half::V, slot, head)).collect(),
                }
            })
        };
        let positions: Vec<Option<Token>> = (0..len).map(position).collect();
        let largest = |head: usize| positions.iter().flatten().map(|token| token.v_dynamic[head]).fold(0.0, f64::max);
        let v_dynamic_max = (0..geometry.heads).map(largest).collect();
        Dense { positions, v_dynamic_max }
    }
}

/// The static scale of K's codes.
fn k_scale(case: &AttentionCase, kv_head: usize, d: usize) -> f64 {
    if quantized(case.geometry.format(Half::K)) { case.k_scale.at(kv_head, d).into() } else { 1.0 }
}

/// What query `i` of sequence `s` must give for query head `h`; also whether it met a block
/// outside the cache.
fn attend(case: &AttentionCase, dense: &Dense, sequence: Sequence, i: usize, h: usize) -> (Row, bool) {
    let geometry = &case.geometry;
    let (k_dim, v_dim) = (geometry.k_dim, geometry.v_dim);
    let kv_head = h / (case.num_heads / geometry.heads);
    let p = sequence.len as i64 - sequence.queries as i64 + i as i64;
    let q: Vec<f64> = (0..k_dim).map(|d| case.query.at(sequence.first + i, h, d).into()).collect();
    let scaled = |(d, q): (usize, &f64)| (q * k_scale(case, kv_head, d)).abs();
    let q_max = q.iter().enumerate().map(scaled).fold(0.0, f64::max);
    let queries: f64 = q.iter().enumerate().map(scaled).sum();
    let scale = f64::from(case.params.softmax_scale);
    let rounding = Rounding::of(case);
    let mut keys = Vec::new();
    let mut met_fault = false;
    let mut error: Bounds = [0.0; ARITHMETICS];
    for j in (0..sequence.len).filter(|&j| visible(case, p, j as i64)) {
        let Some(token) = &dense.positions[j] else {
            met_fault = true;
            continue;
        };
        let (mut dot, mut magnitude) = (0.0, 0.0);
        for (q, k) in q.iter().zip(&token.k[kv_head * k_dim..]) {
            dot += q * k;
            magnitude += (q * k).abs();
        }
        let floor = q_max * token.k_over_scales[kv_head];
        let mut score = scale * dot;
        let mut bound = 0.0;
        if let Some(cap) = case.params.soft_cap.map(f64::from) {
            score = cap * (score / cap).tanh();
            bound += 16.0 * U * cap;
        }
        let bias = case.alibi.as_ref().map_or(0.0, |slopes| f64::from(slopes[h]) * (j as i64 - p) as f64);
        bound += 8.0 * U * (score.abs() + bias.abs());
        score += bias;
        for (error, rounding) in error.iter_mut().zip(&rounding) {
            let relative = (rounding.sum * k_dim as f64 + 8.0) * U + rounding.query;
            let lost = rounding.query_floor * floor + rounding.element_floor[0] * queries;
            let products = scale.abs() * (relative * magnitude + lost);
            *error = error.max(bound + products);
        }
        // What a weight's floor is relative to, and its value's magnitude.
        let floor =
            if token.v_dynamic[kv_head] == 0.0 { 0.0 } else { dense.v_dynamic_max[kv_head] / token.v_dynamic[kv_head] };
        keys.push(Key { score, v: &token.v[kv_head * v_dim..(kv_head + 1) * v_dim], floor });
    }
    let sink = case.sinks.as_ref().map(|sinks| f64::from(sinks[h]));
    let rest = 16.0 * U + sink.filter(|sink| sink.is_finite()).map_or(0.0, |sink| 8.0 * U * sink.abs());
    (softmax(case, &keys, kv_head, sink, error.map(|error| error + rest), rounding), met_fault)
}

/// A visible key's score and value; and the dynamic scale that its weight is rounded relative to, over its own.
struct Key<'a> {
    score: f64,
    v: &'a [f64],
    floor: f64,
}

/// Weights and sums.
fn softmax(
    case: &AttentionCase,
    keys: &[Key<'_>],
    kv_head: usize,
    sink: Option<f64>,
    error: Bounds,
    rounding: [Rounding; ARITHMETICS],
) -> Row {
    let v_dim = case.geometry.v_dim;
    let largest = keys.iter().map(|key| key.score).fold(f64::NEG_INFINITY, f64::max);
    let max = sink.map_or(largest, |sink| largest.max(sink));
    if max == f64::NEG_INFINITY {
        let zeros = vec![0.0; v_dim];
        let out_tolerance = [(); ARITHMETICS].map(|()| zeros.clone());
        return Row { out: zeros, out_tolerance, lse: max, lse_tolerance: [0.0; ARITHMETICS] };
    }
    let n = keys.len() as f64;
    let denominator: f64 = keys.iter().map(|key| key.score).chain(sink).map(|score| (score - max).exp()).sum();
    let (mut out, mut magnitude, mut floor) = (vec![0.0; v_dim], vec![0.0; v_dim], vec![0.0; v_dim]);
    for key in keys {
        let weight = (key.score - max).exp() / denominator;
        let unit = (largest - max).exp() / denominator * key.floor;
        for (d, v) in key.v.iter().enumerate() {
            out[d] += weight * v;
            magnitude[d] += weight * v.abs();
            floor[d] += unit * v.abs();
        }
    }
    let bound = |arithmetic: usize| {
        let (error, rounding) = (error[arithmetic], rounding[arithmetic]);
        let relative = 2.0 * error + 2.0 * (rounding.sum * n + 16.0) * U + rounding.weight;
        let of_channel = |d: usize| {
            let v_scale =
                if quantized(case.geometry.format(Half::V)) { case.v_scale.at(kv_head, d).into() } else { 1.0 };
            let lost = floor[d] * rounding.weight_floor + v_scale * rounding.element_floor[1];
            let absolute = magnitude[d] * relative + lost;
            absolute + unit_roundoff(case.dtype) * (out[d].abs() + absolute) + smallest(case.dtype)
        };
        if keys.is_empty() { vec![0.0; v_dim] } else { (0..v_dim).map(of_channel).collect() }
    };
    let lse = max + denominator.ln();
    let lse_tolerance = error.map(|error| error + (n + 16.0) * U + 8.0 * U * lse.abs());
    Row { out_tolerance: std::array::from_fn(bound), out, lse, lse_tolerance }
}

/// What a case must give: compute it once, check every backend.
#[derive(Clone, Debug)]
pub struct AttentionExpectation {
    /// (token, head) and its numbers.
    rows: Vec<(usize, usize, Row)>,
    owed: Faults,
    allowed: Faults,
}

/// The expectation of a case.
pub fn expect(case: &AttentionCase) -> AttentionExpectation {
    let (sequences, mut owed, mut allowed) = sequences(case);
    let mut rows = Vec::new();
    for (s, sequence) in sequences.iter().enumerate() {
        let Some(sequence) = *sequence else { continue };
        if (0..sequence.len).any(|j| slot_of(case, s, j).is_none()) {
            // A bad block that no query sees (behind a window) may set the fault or not.
            allowed = allowed.union(Faults::BLOCK_OUT_OF_RANGE);
        }
        let dense = Dense::new(case, s, sequence.len);
        for (i, h) in (0..sequence.queries).flat_map(|i| (0..case.num_heads).map(move |h| (i, h))) {
            let (want, met_fault) = attend(case, &dense, sequence, i, h);
            if met_fault {
                owed = owed.union(Faults::BLOCK_OUT_OF_RANGE);
            }
            rows.push((sequence.first + i, h, want));
        }
    }
    AttentionExpectation { rows, owed, allowed: allowed.union(owed) }
}

/// Checks an output and LSE against the expectation: rows, gaps, rows no sequence claims, faults.
pub fn check_attention(
    case: &AttentionCase,
    expectation: &AttentionExpectation,
    arithmetic: Arithmetic,
    out: &[f32],
    lse: Option<&[f32]>,
    faults: Faults,
) -> Result<(), String> {
    // What no row owns must stay; what a row owns is checked by tolerance and then taken over.
    let mut expected = case.output.clone();
    let mut expected_lse = case.lse.clone();
    for (row, h, want) in &expectation.rows {
        for d in 0..case.geometry.v_dim {
            let at = row * case.output.strides.token + h * case.output.strides.head + d;
            check_close(out[at], want.out[d], want.out_tolerance[arithmetic as usize][d])
                .map_err(|text| format!("token {row} head {h} channel {d}: {text}"))?;
            expected.data[at] = out[at];
        }
        if let (Some(all), Some(got)) = (&mut expected_lse, lse) {
            let at = row * case.num_heads + h;
            check_close(got[at], want.lse, want.lse_tolerance[arithmetic as usize])
                .map_err(|text| format!("token {row} head {h}: LSE {text}"))?;
            all[at] = got[at];
        }
    }
    check_untouched("output", &expected.data, out)?;
    if let (Some(expected), Some(got)) = (&expected_lse, lse) {
        check_untouched("LSE", expected, got)?;
    }
    let (owed, allowed) = (expectation.owed, expectation.allowed);
    if !faults.contains(owed) || !allowed.contains(faults) {
        return Err(format!("faults are {faults}; owed: {owed}; allowed: {allowed}"));
    }
    Ok(())
}

/// Equal (infinities too) or within the tolerance; a NaN is neither.
pub fn check_close(got: f32, want: f64, tolerance: f64) -> Result<(), String> {
    let got = f64::from(got);
    if got == want || (got - want).abs() <= tolerance {
        return Ok(());
    }
    Err(format!("{got} is not {want} within {tolerance:e}"))
}

fn check_untouched(what: &str, expected: &[f32], got: &[f32]) -> Result<(), String> {
    match expected.iter().zip(got).position(|(a, b)| a.to_bits() != b.to_bits()) {
        Some(at) => Err(format!("{what}[{at}] belongs to no row, it was {} and became {}", expected[at], got[at])),
        None => Ok(()),
    }
}

#[derive(Clone, Debug)]
pub struct MergeCase {
    pub tokens: usize,
    pub heads: usize,
    pub dim: usize,
    pub dtype: DType,
    pub strides: RowStrides,
    pub a: Vec<f32>,
    pub a_lse: Vec<f32>,
    pub b: Vec<f32>,
    pub b_lse: Vec<f32>,
    /// What the output holds before.
    pub output: Vec<f32>,
    pub with_lse: bool,
}

/// What one (token, head) of a merge must be. An LSE of ±inf means "no keys".
///
/// Tolerance: two exponentials to 16 u of an argument known to u |lse|, two products, a sum and a
/// division: `(32 + 4 |lse|) u` of the summed magnitudes.
pub fn merge(case: &MergeCase, token: usize, head: usize) -> Expected {
    let at = token * case.heads + head;
    let (a_lse, b_lse) = (no_keys(case.a_lse[at]), no_keys(case.b_lse[at]));
    let max = a_lse.max(b_lse);
    if max == f64::NEG_INFINITY {
        let zeros = vec![0.0; case.dim];
        return Expected { out: zeros.clone(), out_tolerance: zeros, lse: max, lse_tolerance: 0.0 };
    }
    let (wa, wb) = ((a_lse - max).exp(), (b_lse - max).exp());
    let argument = if wa * wb == 0.0 { 0.0 } else { a_lse.abs().max(b_lse.abs()) };
    let relative = (32.0 + 4.0 * argument) * U;
    let row = token * case.strides.token + head * case.strides.head;
    let (mut out, mut out_tolerance) = (Vec::new(), Vec::new());
    for d in 0..case.dim {
        // A side without keys counts for nothing, whatever its row holds.
        let weighted = |weight: f64, x: f32| if weight == 0.0 { 0.0 } else { weight / (wa + wb) * f64::from(x) };
        let (a, b) = (weighted(wa, case.a[row + d]), weighted(wb, case.b[row + d]));
        let magnitude = a.abs() + b.abs();
        out.push(a + b);
        out_tolerance.push(
            magnitude * relative * (1.0 + unit_roundoff(case.dtype))
                + unit_roundoff(case.dtype) * (a + b).abs()
                + smallest(case.dtype),
        );
    }
    let lse = max + (wa + wb).ln();
    Expected { out, out_tolerance, lse, lse_tolerance: (32.0 + 4.0 * (argument + lse.abs())) * U }
}

fn no_keys(lse: f32) -> f64 {
    if lse.is_infinite() { f64::NEG_INFINITY } else { lse.into() }
}
