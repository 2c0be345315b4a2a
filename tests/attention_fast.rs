//! The fast attention against the specification, on every instruction set this machine has.
//!
//! `parity_attention` holds both to an f64 oracle over random small batches. Here are the shapes
//! where the fast form differs in structure: contexts of many tiles and several chunks, uneven
//! batches, blocks of many query rows, pools of different sizes. All that no query may see is NaN.
//!
//! Tolerance, with `u = 2^-24` and everything random and independent of sign, so that sums grow as
//! random walks, of which 8 standard deviations bound every one: the terms of a dot product have
//! standard deviation 4/3 at most, its partial sums stay below `8 * 4/3 * sqrt(d)`, and `d`
//! roundings of those add up to `8 * 4/3 * d u`. What follows (scales, soft cap, exp2) adds 32 u of
//! a score, ALiBi included. Two forms so differ by twice that a score, and by twice *that* a
//! normalized weight; sums over `n` weighted values add `8 sqrt(n) u`.

use quantkv::args::{AttentionParams, LayerRef, PagedAttention, Quantize, RowStrides};
use quantkv::layout::Half;
use quantkv::scale::{ScaleRef, StaticScale};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Faults, Isa, KvFormat};

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [-1, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A batch: `(cached tokens, of them new)` of each sequence.
#[derive(Clone)]
struct Case {
    shape: CacheShape,
    heads: usize,
    seqs: Vec<(usize, usize)>,
    params: AttentionParams,
    k: Vec<u8>,
    v: Vec<u8>,
    k_dynamic: Option<Vec<f32>>,
    v_dynamic: Option<Vec<f32>>,
    k_scale: StaticScale,
    v_scale: StaticScale,
    query: Vec<f32>,
    tables: Vec<i32>,
    table_stride: usize,
    alibi: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
}

/// Elements of `values` in `format`, by the library's own quantizer (which `golden_codec` checks).
fn encode(values: &[f32], format: KvFormat) -> Vec<u8> {
    let one = StaticScale::one();
    let mut codes = vec![0; values.len() * format.bytes()];
    let op = Quantize::<CpuBackend, f32> {
        num_tokens: 1,
        num_heads: 1,
        head_dim: values.len(),
        format,
        input: values,
        strides: RowStrides::contiguous(1, values.len()),
        scale: ScaleRef { values: one.values(), strides: one.strides() },
        codes: &mut codes,
    };
    CpuBackend::scalar().quantize(op).unwrap();
    codes
}

/// A cache that is NaN but for the first `len` positions of each table.
fn fill(shape: &CacheShape, half: Half, tables: &[i32], stride: usize, lens: &[usize], rng: &mut Rng) -> Vec<u8> {
    let (spec, format) = (&shape.spec, shape.spec.format(half));
    let bytes = format.bytes();
    let nan = encode(&[f32::NAN], format);
    let mut cache = nan.repeat(shape.buffer_bytes(half) / bytes);
    for (seq, &len) in lens.iter().enumerate() {
        for position in 0..len {
            let block = tables[seq * stride + position / spec.block_size] as usize;
            for head in 0..spec.num_kv_heads {
                let row: Vec<f32> = (0..spec.head_dim(half)).map(|_| 2.0 * rng.unit()).collect();
                for (d, code) in encode(&row, format).chunks_exact(bytes).enumerate() {
                    let at = shape.map(half).index(block, head, position % spec.block_size, d) * bytes;
                    cache[at..at + bytes].copy_from_slice(code);
                }
            }
        }
    }
    cache
}

impl Case {
    fn new(spec: CacheSpec, group: usize, seqs: &[(usize, usize)], seed: u64) -> Case {
        let mut rng = Rng(seed);
        let longest = seqs.iter().map(|s| s.0).max().unwrap();
        let table_stride = longest.div_ceil(spec.block_size) + 1;
        let num_blocks = table_stride * seqs.len();
        let shape = spec.shape(num_blocks).unwrap();
        let mut tables: Vec<i32> = (0..num_blocks as i32).collect();
        for i in (1..num_blocks).rev() {
            tables.swap(i, rng.next() as usize % (i + 1));
        }
        let lens: Vec<usize> = seqs.iter().map(|s| s.0).collect();
        let k = fill(&shape, Half::K, &tables, table_stride, &lens, &mut rng);
        let v = fill(&shape, Half::V, &tables, table_stride, &lens, &mut rng);
        let tokens: usize = seqs.iter().map(|s| s.1).sum();
        let heads = group * spec.num_kv_heads;
        let mut dynamic = |half| {
            let len = shape.dynamic_scale_len(half);
            (len > 0).then(|| (0..len).map(|_| 0.75 + 0.25 * rng.unit()).collect::<Vec<f32>>())
        };
        let (k_dynamic, v_dynamic) = (dynamic(Half::K), dynamic(Half::V));
        let per_channel = |dim: usize| (0..spec.num_kv_heads * dim).map(|i| 0.5 + (i % 7) as f32 / 8.0).collect();
        Case {
            shape,
            heads,
            seqs: seqs.to_vec(),
            params: AttentionParams::new(0.6 / (spec.k_head_dim as f32).sqrt()),
            k,
            v,
            k_dynamic,
            v_dynamic,
            k_scale: StaticScale::per_channel("k", spec.k_head_dim, per_channel(spec.k_head_dim)).unwrap(),
            v_scale: StaticScale::per_channel("v", spec.v_head_dim, per_channel(spec.v_head_dim)).unwrap(),
            query: (0..tokens * heads * spec.k_head_dim).map(|_| 2.0 * rng.unit()).collect(),
            tables,
            table_stride,
            alibi: None,
            sinks: None,
        }
    }

    fn run(&self, backend: &CpuBackend) -> (Vec<f32>, Vec<f32>, Faults) {
        let spec = &self.shape.spec;
        let tokens: usize = self.seqs.iter().map(|s| s.1).sum();
        let mut starts = vec![0];
        starts.extend(self.seqs.iter().scan(0, |sum, s| {
            *sum += s.1 as i32;
            Some(*sum)
        }));
        let seq_lens: Vec<i32> = self.seqs.iter().map(|s| s.0 as i32).collect();
        let mut output = vec![f32::NAN; tokens * self.heads * spec.v_head_dim];
        let mut lse = vec![f32::NAN; tokens * self.heads];
        let mut workspace = vec![f32::NAN; backend.attention_workspace_len(&self.shape, self.heads, tokens)];
        let op = PagedAttention::<CpuBackend, f32> {
            shape: self.shape,
            cache: LayerRef {
                k: &self.k,
                v: &self.v,
                k_dynamic: self.k_dynamic.as_deref(),
                v_dynamic: self.v_dynamic.as_deref(),
            },
            k_scale: ScaleRef { values: self.k_scale.values(), strides: self.k_scale.strides() },
            v_scale: ScaleRef { values: self.v_scale.values(), strides: self.v_scale.strides() },
            params: self.params,
            num_heads: self.heads,
            num_tokens: tokens,
            max_query_len: None,
            query: &self.query,
            query_strides: RowStrides::contiguous(self.heads, spec.k_head_dim),
            query_starts: &starts,
            seq_lens: &seq_lens,
            block_tables: &self.tables,
            block_table_stride: self.table_stride,
            alibi_slopes: self.alibi.as_deref(),
            sinks: self.sinks.as_deref(),
            output: &mut output,
            output_strides: RowStrides::contiguous(self.heads, spec.v_head_dim),
            lse: Some(&mut lse),
            workspace: &mut workspace,
            plan_is_ready: false,
        };
        backend.paged_attention(op).unwrap();
        let faults = backend.faults().unwrap();
        (output, lse, faults)
    }

    /// See the module. |q|, |k| and |v| are below 2, static scales at most 1.25, dynamic ones 1.
    fn tolerance(&self) -> f32 {
        let u = 2f32.powi(-24);
        let dim = self.shape.spec.k_head_dim as f32;
        let longest = self.seqs.iter().map(|s| s.0).max().unwrap() as f32;
        let scale = self.params.softmax_scale * 1.25;
        let bias = if self.alibi.is_some() { longest / 16.0 } else { 0.0 };
        let largest_score = scale * 8.0 * 4.0 / 3.0 * dim.sqrt() + bias;
        let score = scale * 8.0 * 4.0 / 3.0 * dim * u + 32.0 * u * largest_score;
        2.0 * 1.25 * (4.0 * score + 8.0 * longest.sqrt() * u)
    }

    fn check(&self, what: &str) {
        let (expected, expected_lse, expected_faults) = self.run(&CpuBackend::scalar());
        let tolerance = self.tolerance();
        for backend in Isa::ALL.into_iter().filter_map(CpuBackend::with_isa) {
            let (output, lse, faults) = self.run(&backend);
            assert_eq!(faults, expected_faults, "{what} on {}", backend.isa());
            for (name, got, want) in [("output", &output, &expected), ("lse", &lse, &expected_lse)] {
                for (i, (got, want)) in got.iter().zip(want).enumerate() {
                    let close = got == want || (got - want).abs() <= tolerance;
                    assert!(close, "{what} on {}: {name}[{i}] is {got}, not {want} ± {tolerance}", backend.isa());
                }
            }
        }
    }
}

fn spec(heads: usize, dim: usize, format: KvFormat, layout: CacheLayout) -> CacheSpec {
    CacheSpec::new(heads, dim, 16, format).unwrap().with_layout(layout).unwrap()
}

#[test]
fn every_format_layout_and_length() {
    for format in KvFormat::ALL {
        for layout in CacheLayout::ALL {
            for dim in [64, 80, 128] {
                let seqs = [(0, 1), (1, 1), (15, 1), (16, 1), (17, 1), (63, 1), (64, 1), (65, 1), (200, 3)];
                Case::new(spec(2, dim, format, layout), 4, &seqs, 1).check(&format!("{format} {layout:?} d{dim}"));
            }
        }
    }
}

#[test]
fn odd_dims_and_groups() {
    for (k_dim, v_dim) in [(1, 7), (13, 64), (65, 33), (192, 128), (512, 500)] {
        for group in [1, 2, 3, 5, 7, 8, 12] {
            let mut spec = spec(1, k_dim, KvFormat::Fp8E4M3, CacheLayout::Nhd);
            (spec.v_head_dim, spec.v_format) = (v_dim, KvFormat::Fp8E5M2);
            Case::new(spec, group, &[(100, 1), (70, 2)], 2).check(&format!("d{k_dim}/{v_dim} G{group}"));
        }
    }
}

#[test]
fn long_contexts_are_split_and_merged() {
    for seqs in [&[(5000, 1)][..], &[(3000, 1), (20, 1), (511, 1), (512, 1), (513, 1)], &[(2100, 6), (40, 2)]] {
        let spec = spec(2, 64, KvFormat::Fp8E4M3, CacheLayout::Hnd).with_dynamic_scales().unwrap();
        let mut case = Case::new(spec, 4, seqs, 3);
        case.check("plain");
        case.sinks = Some((0..8).map(|h| h as f32 - 4.0).collect());
        case.check("sinks");
        case.alibi = Some((0..8).map(|h| 2f32.powi(-h - 4)).collect());
        case.params.soft_cap = Some(20.0);
        case.check("ALiBi and soft cap");
        for window in [1, 63, 64, 65, 700, 4000] {
            case.params.sliding_window = Some(window);
            case.check(&format!("window {window}"));
        }
    }
}

#[test]
fn prefill_blocks_share_tiles() {
    for group in [1, 3, 4] {
        for layout in CacheLayout::ALL {
            let spec = spec(1, 64, KvFormat::Fp8E4M3, layout);
            Case::new(spec, group, &[(150, 150), (300, 70), (9, 20)], 4).check(&format!("{layout:?} G{group}"));
        }
    }
}

/// Few query rows and many have kernels of their own, which sum in one order: how a prompt was cut, or who else is in the batch,
/// does not show in any bit.
#[test]
fn a_query_alone_gives_the_same_bits() {
    for format in KvFormat::ALL {
        for (layout, dim, group, window) in [
            (CacheLayout::Hnd, 128, 1, None),
            (CacheLayout::VllmPacked, 80, 4, Some(20)),
            (CacheLayout::Nhd, 37, 3, Some(100)),
            (CacheLayout::Hnd, 64, 2, Some(64)),
        ] {
            let (len, new) = (190, 70);
            let mut case = Case::new(spec(2, dim, format, layout), group, &[(len, new)], 7);
            case.params.sliding_window = window;
            let row = case.heads * dim;
            let fast = Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar);
            for backend in fast.filter_map(CpuBackend::with_isa) {
                let bits = |case: &Case| case.run(&backend).0.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let together = bits(&case);
                for i in 0..new {
                    let query = case.query[i * row..][..row].to_vec();
                    let alone = Case { seqs: vec![(len - new + i + 1, 1)], query, ..case.clone() };
                    let what =
                        format!("{format} {layout:?} d{dim} G{group} {window:?}: query {i} on {}", backend.isa());
                    assert!(bits(&alone) == together[i * row..][..row], "{what}");
                }
            }
        }
    }
}

#[test]
fn bad_blocks_are_skipped_in_every_tile() {
    let mut case = Case::new(spec(1, 64, KvFormat::Fp8E4M3, CacheLayout::Hnd), 4, &[(1500, 1), (90, 1)], 5);
    for at in [0, 3, 40, 93, 97] {
        case.tables[at] = if at % 2 == 0 { -1 } else { i32::MAX };
    }
    case.check("bad blocks");
    assert!(case.run(&CpuBackend::new()).2.contains(Faults::BLOCK_OUT_OF_RANGE));
}

#[test]
fn threads_do_not_show() {
    let spec = spec(4, 64, KvFormat::Fp8E4M3, CacheLayout::Hnd);
    let case = Case::new(spec, 4, &[(3000, 1), (17, 1), (900, 5), (100, 40)], 6);
    for backend in Isa::ALL.into_iter().filter_map(CpuBackend::with_isa) {
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (output, lse, _) = pool.install(|| case.run(&backend));
            output.into_iter().chain(lse).map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = bits(1);
        assert!(one == bits(2) && one == bits(3) && one == bits(1), "{}", backend.isa());
    }
}
