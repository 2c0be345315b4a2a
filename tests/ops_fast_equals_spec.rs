//! The fast CPU operations give the bytes of the specification ([`CpuBackend::scalar`]) on every
//! instruction set of this machine and any number of threads, over random geometry, formats,
//! strides, scales and hostile ids. (That the specification itself is right is the business of the
//! parity tests against the f64 oracle.)

use half::{bf16, f16};
use quantkv::args::{
    Absmax, CacheWrite, Dequantize, Gather, GatherBytes, LayerMut, LayerRef, MergeStates, Quantize, RowStrides,
};
use quantkv::format::Pod;
use quantkv::layout::Half;
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Element, Faults, Isa, KvFormat};
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};

/// Bit patterns, so that NaN compares.
fn bits<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Asserts equal bits, naming the first element that differs.
fn assert_same<T: Pod>(what: &str, spec: &[T], fast: &[T]) {
    if let Some(i) = (0..spec.len()).find(|&i| bits(&spec[i..=i]) != bits(&fast[i..=i])) {
        panic!("{what}: element {i} of {}: spec {:?}, fast {:?}", spec.len(), spec[i], fast[i]);
    }
    assert_eq!(spec.len(), fast.len());
}

/// Runs `op` on the specification and on every fast backend, the fastest also on other numbers of
/// threads, and checks that `same` holds between the results.
fn compare<R: Send>(what: &str, op: impl Fn(&CpuBackend) -> R + Sync, same: impl Fn(&str, &R, &R)) {
    let spec = op(&CpuBackend::scalar());
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar) {
        if let Some(backend) = CpuBackend::with_isa(isa) {
            same(&format!("{what}, {isa}"), &spec, &op(&backend));
        }
    }
    for threads in [1, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let fast = pool.install(|| op(&CpuBackend::new()));
        same(&format!("{what}, {threads} threads"), &spec, &fast);
    }
}

fn pick<T: Copy>(rng: &mut impl Rng, choices: &[T]) -> T {
    choices[rng.random_range(0..choices.len())]
}

/// Mostly ordinary numbers, and some of everything else.
fn number<T: Element>(rng: &mut impl Rng) -> T {
    T::from_f32(match rng.random_range(0..64) {
        0 => f32::NAN,
        1 => f32::INFINITY,
        2 => f32::NEG_INFINITY,
        3 => -0.0,
        4 => 1e-40,
        5 => f32::MAX,
        6 => f32::from_bits(rng.random()),
        _ => rng.random_range(-1.0f32..1.0) * 10f32.powi(rng.random_range(-6..4)),
    })
}

fn numbers<T: Element>(rng: &mut impl Rng, len: usize) -> Vec<T> {
    (0..len).map(|_| number(rng)).collect()
}

/// A scale tensor of a random granularity, odd strides included.
fn scales(rng: &mut impl Rng, heads: usize, dim: usize) -> (Vec<f32>, ScaleStrides) {
    let strides = pick(rng, &[(0, 0), (1, 0), (dim, 1), (0, 1), (2 * dim, 2), (dim + 3, 1)]);
    let strides = ScaleStrides { head: strides.0, channel: strides.1 };
    let values = (0..strides.len(heads, dim)).map(|_| 10f32.powf(rng.random_range(-3.0..1.0)));
    (values.collect(), strides)
}

/// Strides of `[tokens, heads, dim]` inside a fused or padded tensor, and the elements it needs.
fn row_strides(rng: &mut impl Rng, tokens: usize, heads: usize, dim: usize) -> (RowStrides, usize) {
    let head = dim + pick(rng, &[0, 0, 3]);
    let token = heads * head + pick(rng, &[0, 0, 5, 2 * heads * dim]);
    (RowStrides { token, head }, tokens * token + heads * head)
}

/// A geometry; every field is drawn until the combination is one the library supports.
fn shape(rng: &mut impl Rng, num_blocks: usize) -> CacheShape {
    loop {
        let dims = [1, 7, 12, 16, 32, 46, 64, 96, 128, 192, 256, 512];
        let mut spec =
            CacheSpec::new(pick(rng, &[1, 2, 3, 8, 13]), 16, pick(rng, &[8, 16, 32, 64]), KvFormat::F32).unwrap();
        spec.layout = pick(rng, &CacheLayout::ALL);
        (spec.k_head_dim, spec.v_head_dim) = (pick(rng, &dims), pick(rng, &dims));
        (spec.k_format, spec.v_format) = (pick(rng, &KvFormat::ALL), pick(rng, &KvFormat::ALL));
        let spec = if rng.random_bool(0.4) { spec.with_dynamic_scales() } else { Ok(spec) };
        let Ok(shape) = spec.and_then(|spec| spec.shape(num_blocks)) else { continue };
        let block = |half| shape.spec.elements_per_block(half).unwrap();
        return match rng.random_range(0..3) {
            0 => shape.with_block_strides(block(Half::K) + 48, block(Half::V) + 5).unwrap(),
            _ => shape,
        };
    }
}

/// One layer's buffers.
#[derive(Clone)]
struct Layer {
    k: Vec<u8>,
    v: Vec<u8>,
    k_dynamic: Option<Vec<f32>>,
    v_dynamic: Option<Vec<f32>>,
}

impl Layer {
    /// Random codes (any byte is one) and random scales.
    fn random(rng: &mut impl Rng, shape: &CacheShape) -> Layer {
        let mut bytes = |half| {
            let mut bytes = vec![0; shape.buffer_bytes(half)];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let (k, v) = (bytes(Half::K), bytes(Half::V));
        let mut dynamic = |half| {
            let scales = (0..shape.dynamic_scale_len(half)).map(|_| rng.random_range(0.001..2.0)).collect();
            shape.spec.has_dynamic_scales(half).then_some(scales)
        };
        Layer { k, v, k_dynamic: dynamic(Half::K), v_dynamic: dynamic(Half::V) }
    }

    fn as_ref(&self) -> LayerRef<'_, CpuBackend> {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.k_dynamic.as_deref(), v_dynamic: self.v_dynamic.as_deref() }
    }

    fn as_mut(&mut self) -> LayerMut<'_, CpuBackend> {
        LayerMut {
            k: &mut self.k,
            v: &mut self.v,
            k_dynamic: self.k_dynamic.as_deref_mut(),
            v_dynamic: self.v_dynamic.as_deref_mut(),
        }
    }
}

fn same_layers(what: &str, spec: &(Layer, Faults), fast: &(Layer, Faults)) {
    assert_same(&format!("{what}: K"), &spec.0.k, &fast.0.k);
    assert_same(&format!("{what}: V"), &spec.0.v, &fast.0.v);
    let scales = |scales: &Option<Vec<f32>>| scales.clone().unwrap_or_default();
    assert_same(&format!("{what}: K scales"), &scales(&spec.0.k_dynamic), &scales(&fast.0.k_dynamic));
    assert_same(&format!("{what}: V scales"), &scales(&spec.0.v_dynamic), &scales(&fast.0.v_dynamic));
    assert_eq!(spec.1, fast.1, "{what}: faults");
}

/// Runs of consecutive slots, jumps, duplicates, padding and, in half of the cases, nonsense.
fn slot_mapping(rng: &mut impl Rng, shape: &CacheShape, tokens: usize) -> Vec<i64> {
    let slots = shape.num_slots() as i64;
    let hostile = rng.random_bool(0.5);
    let mut slot = 0;
    (0..tokens)
        .map(|_| {
            slot = if rng.random_bool(0.9) { (slot + 1) % slots } else { rng.random_range(0..slots) };
            match rng.random_range(0..20) {
                0 => -1,
                1 if hostile => pick(rng, &[slots, slots + 7, i64::MAX, i64::MIN, -5]),
                _ => slot,
            }
        })
        .collect()
}

fn check_cache_write<T: Element>(rng: &mut ChaCha8Rng, what: &str, shape: &CacheShape, tokens: usize) {
    let spec = shape.spec;
    let heads = spec.num_kv_heads;
    let layer = Layer::random(rng, shape);
    let (key_strides, key_len) = row_strides(rng, tokens, heads, spec.k_head_dim);
    let (value_strides, value_len) = row_strides(rng, tokens, heads, spec.v_head_dim);
    let (key, value) = (numbers::<T>(rng, key_len), numbers::<T>(rng, value_len));
    let slots = slot_mapping(rng, shape, tokens);
    let (k_scales, k_strides) = scales(rng, heads, spec.k_head_dim);
    let (v_scales, v_strides) = scales(rng, heads, spec.v_head_dim);
    let write = |backend: &CpuBackend| {
        let mut layer = layer.clone();
        let op = CacheWrite {
            shape: *shape,
            cache: layer.as_mut(),
            key: &key,
            key_strides,
            value: &value,
            value_strides,
            slot_mapping: &slots,
            k_scale: ScaleRef { values: &k_scales, strides: k_strides },
            v_scale: ScaleRef { values: &v_scales, strides: v_strides },
        };
        backend.cache_write(op).unwrap();
        (layer, backend.faults().unwrap())
    };
    compare(what, write, same_layers);
}

/// Calls a generic function for one of the three element types.
macro_rules! for_random_element {
    ($rng:expr, $function:ident($($argument:expr),*)) => {
        match $rng.random_range(0..3) {
            0 => $function::<f32>($($argument),*),
            1 => $function::<f16>($($argument),*),
            _ => $function::<bf16>($($argument),*),
        }
    };
}

#[test]
fn cache_write() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for case in 0..120 {
        let num_blocks = pick(&mut rng, &[1, 2, 9, 40]);
        let shape = shape(&mut rng, num_blocks);
        let tokens = pick(&mut rng, &[0, 1, 2, 17, 64]);
        let what = format!("case {case}: {tokens} tokens, {shape:?}");
        for_random_element!(rng, check_cache_write(&mut rng, &what, &shape, tokens));
    }
}

/// Enough tokens that threads share them, crowded into few blocks so that many collide.
#[test]
fn cache_write_of_a_long_prefill() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for case in 0..12 {
        let mut shape = shape(&mut rng, 24);
        if case < 6 {
            // 13 heads of 46 channels (no multiple of any vector), and more than 512 pieces of 16
            // bytes in a packed token row.
            let (heads, dim) = if case % 2 == 0 { (13, 46) } else { (33, 512) };
            let mut spec = CacheSpec::new(heads, dim, 16, KvFormat::Fp8E4M3).unwrap();
            spec.layout = [CacheLayout::Nhd, CacheLayout::VllmPacked, CacheLayout::Hnd][case % 3];
            if spec.validate().is_err() {
                spec.k_head_dim = 48;
            }
            shape = spec.shape(24).unwrap();
        }
        let tokens = 3_000_000 / (shape.spec.bytes_per_token().unwrap() * 4).max(1);
        let what = format!("long case {case}: {tokens} tokens, {shape:?}");
        for_random_element!(rng, check_cache_write(&mut rng, &what, &shape, tokens.min(6000)));
    }
}

/// Block tables of three sequences, with what a gather of them needs.
struct Tables {
    blocks: Vec<i32>,
    stride: usize,
    cu_seq_lens: Vec<i32>,
    starts: Option<Vec<i32>>,
    num_tokens: usize,
}

impl Tables {
    fn random(rng: &mut impl Rng, shape: &CacheShape, max_len: usize) -> Tables {
        let seqs = 3;
        let stride = max_len.div_ceil(shape.spec.block_size) + 2;
        let hostile = rng.random_bool(0.5);
        let block = |_| match rng.random_range(0..12) {
            0 if hostile => pick(rng, &[-1, i32::MAX, i32::MIN, shape.num_blocks as i32]),
            _ => rng.random_range(0..shape.num_blocks as i32),
        };
        let blocks = (0..seqs * stride).map(block).collect();
        let mut cu_seq_lens = vec![rng.random_range(0..3)];
        for seq in 0..seqs {
            cu_seq_lens.push(cu_seq_lens[seq] + rng.random_range(0..=max_len as i32));
        }
        let num_tokens = cu_seq_lens[seqs] as usize + 2;
        if hostile && rng.random_bool(0.5) {
            let at = rng.random_range(0..=seqs);
            cu_seq_lens[at] = pick(rng, &[-4, 0, 3, i32::MAX]);
        }
        let highest = if hostile { 3 * shape.spec.block_size as i32 } else { shape.spec.block_size as i32 };
        let start = |_| rng.random_range(if hostile { -3 } else { 0 }..=highest);
        let starts = (0..seqs).map(start).collect();
        Tables { blocks, stride, cu_seq_lens, starts: rng.random_bool(0.6).then_some(starts), num_tokens }
    }
}

fn check_gather<T: Element>(rng: &mut ChaCha8Rng, what: &str, shape: &CacheShape, max_len: usize) {
    let spec = shape.spec;
    let heads = spec.num_kv_heads;
    let layer = Layer::random(rng, shape);
    let tables = Tables::random(rng, shape, max_len);
    let tokens = tables.num_tokens;
    let (key_strides, key_len) = row_strides(rng, tokens, heads, spec.k_head_dim);
    let (value_strides, value_len) = row_strides(rng, tokens, heads, spec.v_head_dim);
    // What no sequence claims stays as it is.
    let (key, value) = (numbers::<T>(rng, key_len), numbers::<T>(rng, value_len));
    let (k_scales, k_strides) = scales(rng, heads, spec.k_head_dim);
    let (v_scales, v_strides) = scales(rng, heads, spec.v_head_dim);
    let gather = |backend: &CpuBackend| {
        let (mut key, mut value) = (key.clone(), value.clone());
        let op = Gather {
            shape: *shape,
            cache: layer.as_ref(),
            k_scale: ScaleRef { values: &k_scales[..], strides: k_strides },
            v_scale: ScaleRef { values: &v_scales[..], strides: v_strides },
            block_tables: &tables.blocks,
            block_table_stride: tables.stride,
            cu_seq_lens: &tables.cu_seq_lens,
            starts: tables.starts.as_deref(),
            num_tokens: tokens,
            key: &mut key,
            key_strides,
            value: &mut value,
            value_strides,
        };
        backend.gather(op).unwrap();
        (key, value, backend.faults().unwrap())
    };
    compare(what, gather, |what, spec, fast| {
        assert_same(&format!("{what}: key"), &spec.0, &fast.0);
        assert_same(&format!("{what}: value"), &spec.1, &fast.1);
        assert_eq!(spec.2, fast.2, "{what}: faults");
    });

    let row_bytes = |half| tokens * heads * spec.head_dim(half) * spec.format(half).bytes();
    let gather_bytes = |backend: &CpuBackend| {
        let (mut key, mut value) = (vec![0xa5; row_bytes(Half::K)], vec![0x5a; row_bytes(Half::V)]);
        let op = GatherBytes {
            shape: *shape,
            cache: layer.as_ref(),
            block_tables: &tables.blocks,
            block_table_stride: tables.stride,
            cu_seq_lens: &tables.cu_seq_lens,
            starts: tables.starts.as_deref(),
            num_tokens: tokens,
            key: &mut key,
            value: &mut value,
        };
        backend.gather_bytes(op).unwrap();
        (key, value, backend.faults().unwrap())
    };
    compare(what, gather_bytes, |what, spec, fast| assert_eq!(spec, fast, "{what}: bytes"));
}

#[test]
fn gather() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for case in 0..100 {
        let num_blocks = pick(&mut rng, &[1, 5, 40]);
        let shape = shape(&mut rng, num_blocks);
        let max_len = if case % 10 == 0 { 400 } else { pick(&mut rng, &[0, 1, 30, 70]) };
        let what = format!("case {case}: {shape:?}");
        for_random_element!(rng, check_gather(&mut rng, &what, &shape, max_len));
    }
}

fn check_convert<T: Element>(rng: &mut ChaCha8Rng, what: &str, tokens: usize, heads: usize, dim: usize) {
    let format = pick(rng, &KvFormat::ALL);
    let (strides, len) = row_strides(rng, tokens, heads, dim);
    let (values, scale_strides) = scales(rng, heads, dim);
    let input = numbers::<T>(rng, len);
    let code_bytes = tokens * heads * dim * format.bytes();
    let what = &format!("{what}, {format}, {strides:?}, {scale_strides:?}");
    let quantize = |backend: &CpuBackend| {
        let mut codes = vec![0xa5; code_bytes + 3];
        let op = Quantize {
            num_tokens: tokens,
            num_heads: heads,
            head_dim: dim,
            format,
            input: &input[..],
            strides,
            scale: ScaleRef { values: &values[..], strides: scale_strides },
            codes: &mut codes[..],
        };
        backend.quantize(op).unwrap();
        codes
    };
    compare(&format!("{what}: quantize"), quantize, |what, spec, fast| assert_same(what, spec, fast));

    let mut codes = vec![0; code_bytes];
    rng.fill_bytes(&mut codes);
    let dequantize = |backend: &CpuBackend| {
        let mut output = input.clone();
        let op = Dequantize {
            num_tokens: tokens,
            num_heads: heads,
            head_dim: dim,
            format,
            codes: &codes[..],
            scale: ScaleRef { values: &values[..], strides: scale_strides },
            output: &mut output[..],
            strides,
        };
        backend.dequantize(op).unwrap();
        output
    };
    compare(&format!("{what}: dequantize"), dequantize, |what, spec, fast| assert_same(what, spec, fast));
}

fn check_absmax<T: Element>(rng: &mut ChaCha8Rng, what: &str, tokens: usize, heads: usize, dim: usize) {
    let (strides, len) = row_strides(rng, tokens, heads, dim);
    let input = numbers::<T>(rng, len);
    for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Channel] {
        let before: Vec<f32> = (0..granularity.len(heads, dim)).map(|_| rng.random_range(0.0..2.0)).collect();
        let absmax = |backend: &CpuBackend| {
            let mut running = before.clone();
            let op = Absmax {
                input: &input[..],
                strides,
                num_tokens: tokens,
                num_heads: heads,
                head_dim: dim,
                granularity,
                running: &mut running[..],
            };
            backend.absmax(op).unwrap();
            running
        };
        compare(&format!("{what}, {granularity:?}"), absmax, |what, spec, fast| assert_same(what, spec, fast));
    }
}

fn check_merge<T: Element>(rng: &mut ChaCha8Rng, what: &str, tokens: usize, heads: usize, dim: usize) {
    let (strides, len) = row_strides(rng, tokens, heads, dim);
    let (a, b, before) = (numbers::<T>(rng, len), numbers::<T>(rng, len), numbers::<T>(rng, len));
    let mut lse = || {
        let lse = |_| match rng.random_range(0..10) {
            0 => pick(rng, &[f32::INFINITY, f32::NAN]),
            1..4 => f32::NEG_INFINITY,
            _ => rng.random_range(-30.0..30.0),
        };
        (0..tokens * heads).map(lse).collect::<Vec<f32>>()
    };
    let (a_lse, b_lse) = (lse(), lse());
    let want_lse = rng.random_bool(0.7);
    let merge = |backend: &CpuBackend| {
        let (mut output, mut lse) = (before.clone(), vec![7.0; tokens * heads]);
        let op = MergeStates {
            num_tokens: tokens,
            num_heads: heads,
            head_dim: dim,
            a: &a[..],
            a_lse: &a_lse[..],
            b: &b[..],
            b_lse: &b_lse[..],
            strides,
            output: &mut output[..],
            lse: want_lse.then_some(&mut lse[..]),
        };
        backend.merge_states(op).unwrap();
        // Which NaN a sum of NaNs gives is not specified, by Rust or by us.
        for y in &mut output {
            *y = if y.to_f32().is_nan() { T::from_f32(f32::NAN) } else { *y };
        }
        (output, lse)
    };
    compare(what, merge, |what, spec, fast| {
        assert_same(&format!("{what}: output"), &spec.0, &fast.0);
        assert_same(&format!("{what}: LSE"), &spec.1, &fast.1);
    });
}

/// Dense shapes: tiny, odd, wider than any cache row, and large enough for threads.
fn dense_shape(rng: &mut impl Rng, case: usize) -> (usize, usize, usize) {
    let tokens = if case.is_multiple_of(10) { 700 } else { pick(rng, &[0, 1, 3, 20]) };
    (tokens, pick(rng, &[1, 2, 8, 13]), pick(rng, &[1, 7, 46, 64, 128, 257, 600]))
}

#[test]
fn convert() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for case in 0..80 {
        let (tokens, heads, dim) = dense_shape(&mut rng, case);
        let what = format!("case {case}: [{tokens}, {heads}, {dim}]");
        for_random_element!(rng, check_convert(&mut rng, &what, tokens, heads, dim));
    }
}

#[test]
fn absmax() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for case in 0..50 {
        let (tokens, heads, dim) = dense_shape(&mut rng, case);
        let what = format!("case {case}: [{tokens}, {heads}, {dim}]");
        for_random_element!(rng, check_absmax(&mut rng, &what, tokens, heads, dim));
    }
}

#[test]
fn merge_states() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for case in 0..50 {
        let (tokens, heads, dim) = dense_shape(&mut rng, case);
        let what = format!("case {case}: [{tokens}, {heads}, {dim}]");
        for_random_element!(rng, check_merge(&mut rng, &what, tokens, heads, dim));
    }
}
