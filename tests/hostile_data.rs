//! Hostile contents: random numbers as slot mappings, block tables, sequence lengths, query starts
//! and floats, and random shapes, strides and lengths around them.
//!
//! Device data cannot be refused before a launch. What a kernel must do instead is exact: skip
//! what lies outside, clamp lengths, set the fault, and leave every other byte alone. So the
//! oracle checks these runs like any other. Random *arguments* must end in `Ok` or `Err`, never in
//! a panic or a write outside the buffers given.

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use devices::{Parts, attention_devices, devices};
use oracle::attention::{Arithmetic, AttentionCase, check_attention, expect};
use oracle::geometry::{Geometry, Layer};
use oracle::rows::{self, CacheWriteCase, GatherCase, Rows};
use oracle::run::{self, same_layer};
use oracle::strategy::{self, Rng, ScaleKind};
use proptest::prelude::*;
use quantkv::args::{AttentionParams, CacheWrite, Gather, LayerMut, LayerRef, PagedAttention, RowStrides};
use quantkv::format::Pod;
use quantkv::layout::{AddressMap, DynamicScales, Half};
use quantkv::scale::{ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, DType, KvFormat};

/// Integers as random bytes give them, and as an engine's off-by-one does.
fn hostile(rng: &mut Rng, limit: usize) -> i32 {
    match rng.below(8) {
        0 => rng.bits() as i32,
        1 => [i32::MIN, i32::MAX, -1, 1 << 30, -(1 << 30), 0][rng.below(6)],
        2 => (limit as i32).wrapping_add(rng.below(3) as i32 - 1),
        3 => -(rng.below(limit + 1) as i32),
        _ => rng.below(limit + 1) as i32,
    }
}

fn small_geometry() -> impl Strategy<Value = Geometry> {
    strategy::geometry().prop_map(|geometry| Geometry {
        heads: geometry.heads.min(3),
        k_dim: if geometry.k_dim > 64 { 48 } else { geometry.k_dim },
        v_dim: geometry.v_dim.min(40),
        block_size: geometry.block_size.min(16),
        tail: 64,
        ..geometry
    })
}

/// A small one, or one that GPU kernels are tuned for.
fn attention_geometry() -> impl Strategy<Value = Geometry> {
    let tuned = (
        prop::sample::select(vec![CacheLayout::Hnd, CacheLayout::Nhd]),
        (1usize..=2, prop::sample::select(vec![64usize, 128])),
        (prop::sample::select(vec![8usize, 16, 32]), 1usize..=6),
        (strategy::format(), any::<bool>(), any::<bool>()),
    );
    let tuned = tuned.prop_map(|(layout, heads, blocks, (format, dynamic, gaps))| {
        let dynamic = dynamic && oracle::formats::quantized(format);
        let gap = if gaps { 64 } else { 0 };
        Geometry { dynamic, k_gap: gap, v_gap: 2 * gap, tail: 64, ..Geometry::plain(layout, heads, blocks, format) }
    });
    prop_oneof![small_geometry(), tuned]
}

fn tensor(geometry: &Geometry, half: Half, tokens: usize, rng: &mut Rng) -> Rows {
    strategy::rows((tokens, geometry.heads, geometry.dim(half)), (1, 2, 3), DType::F32, || rng.normal())
}

/// What is random of a call of `paged_attention` whose tables, lengths and query starts are.
#[derive(Debug)]
struct HostileTables {
    geometry: Geometry,
    dtype: DType,
    group: usize,
    seqs: usize,
    num_tokens: usize,
    table_stride: usize,
    window: Option<usize>,
    longest: Option<usize>,
    seed: u64,
}

fn check_tables(tables: &HostileTables) -> Result<(), TestCaseError> {
    let HostileTables { geometry, dtype, group, seqs, num_tokens, table_stride, window, longest, seed } = *tables;
    let mut rng = Rng::new(seed);
    let num_heads = geometry.heads * group;
    let mut layer = Layer::poisoned(&geometry);
    for (block, slot) in (0..geometry.num_blocks).flat_map(|b| (0..geometry.block_size).map(move |s| (b, s))) {
        strategy::fill_slot(&geometry, &mut layer, (block, slot), &mut rng);
    }
    let rows = |dim, rng: &mut Rng| strategy::rows((num_tokens, num_heads, dim), (0, 8, 8), dtype, || rng.normal());
    let (query, output) = (rows(geometry.k_dim, &mut rng), rows(geometry.v_dim, &mut rng));
    let mut query_starts: Vec<i32> = (0..=seqs).map(|_| hostile(&mut rng, num_tokens)).collect();
    if rng.chance(50) {
        // Sound starts with at most one broken entry reach the deeper code more often.
        query_starts = (0..=seqs).map(|_| rng.below(num_tokens + 1) as i32).collect();
        query_starts.sort_unstable();
        let broken = rng.below(seqs + 1);
        query_starts[broken] = hostile(&mut rng, num_tokens);
    }
    let capacity = table_stride * geometry.block_size;
    let mut params = AttentionParams::new(0.3 / (geometry.k_dim as f32).sqrt());
    params.sliding_window = window;
    let case = AttentionCase {
        geometry,
        layer,
        k_scale: strategy::scales(ScaleKind::Tensor, geometry.heads, geometry.k_dim, || rng.mild_scale()),
        v_scale: strategy::scales(ScaleKind::Head, geometry.heads, geometry.v_dim, || rng.mild_scale()),
        params,
        num_heads,
        num_tokens,
        max_query_len: longest,
        dtype,
        query,
        query_starts,
        seq_lens: (0..seqs).map(|_| hostile(&mut rng, capacity)).collect(),
        tables: (0..seqs * table_stride).map(|_| hostile(&mut rng, geometry.num_blocks)).collect(),
        table_stride,
        alibi: None,
        sinks: None,
        output,
        lse: Some(vec![1234.0; num_tokens * num_heads + 5]),
    };
    let expectation = expect(&case);
    for device in attention_devices() {
        let arithmetic = Arithmetic::of(device.has_tensor_cores(), device.flushes_subnormals());
        let (out, lse, faults) = on_device!(&device, |backend| run::attention(backend, &case)).unwrap();
        prop_assert_eq!(
            check_attention(&case, &expectation, arithmetic, &out, lse.as_deref(), faults),
            Ok(()),
            "on {}",
            device
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(strategy::config(192))]

    /// Random 64-bit slots: what lies in the cache is written, the rest skipped with a fault, and
    /// gaps and guard bytes stay.
    #[test]
    fn slot_mappings(geometry in small_geometry(), tokens in 0usize..40, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let slots = (0..tokens)
            .map(|_| match rng.below(4) {
                0 => rng.bits() as i64,
                1 => [i64::MIN, i64::MAX, -1, 1 << 32, (1 << 32) + 1, 1 << 62][rng.below(6)],
                2 => geometry.num_slots() as i64 + rng.below(3) as i64 - 1,
                _ => rng.below(geometry.num_slots()) as i64,
            })
            .collect();
        let before = strategy::any_layer(&geometry, &mut rng);
        let (key, value) = (tensor(&geometry, Half::K, tokens, &mut rng), tensor(&geometry, Half::V, tokens, &mut rng));
        let k_scale = strategy::scales(ScaleKind::Head, geometry.heads, geometry.k_dim, || rng.any_scale());
        let v_scale = strategy::scales(ScaleKind::Channel, geometry.heads, geometry.v_dim, || rng.any_scale());
        let case = CacheWriteCase { geometry, before, dtype: DType::F32, key, value, slot_mapping: slots, k_scale, v_scale };
        for device in devices() {
            let case = if device.is_cpu() { case.clone() } else { case.without_repeated_slots() };
            let (expected, owed) = rows::cache_write(&case);
            let (got, faults) = on_device!(&device, |backend| run::cache_write(backend, &case)).unwrap();
            prop_assert!(same_layer(&expected, &got), "on {}", device);
            prop_assert_eq!(faults, owed, "on {}", device);
            prop_assert!(on_device!(&device, |backend| backend.faults()).unwrap().is_empty(), "faults() clears");
        }
    }

    /// Random tables, lengths and query starts. Every slot of the cache holds numbers, so that
    /// whatever is read is comparable.
    #[test]
    fn attention_tables(
        geometry in attention_geometry(), dtype in strategy::dtype(), group in 1usize..4, seqs in 0usize..5, num_tokens in prop_oneof![4 => 0usize..12, 1 => 40usize..90],
        table_stride in 0usize..5, window in prop::option::of(1usize..30), longest in prop::option::weighted(0.3, 0usize..6), seed in any::<u64>(),
    ) {
        check_tables(&HostileTables { geometry, dtype, group, seqs, num_tokens, table_stride, window, longest, seed })?;
    }

    /// The same for the kernel that takes 9 to 64 query rows a KV head.
    #[test]
    fn attention_tables_of_many_rows(
        layout in prop::sample::select(vec![CacheLayout::Hnd, CacheLayout::Nhd]), blocks in (prop::sample::select(vec![8usize, 16, 32]), 1usize..=6),
        dtype in prop::sample::select(vec![DType::F16, DType::BF16]), group in prop::sample::select(vec![6usize, 8, 12]), seqs in 4usize..7,
        num_tokens in 8usize..40, table_stride in 1usize..9, window in prop::option::of(1usize..90), longest in 3usize..6, seed in any::<u64>(),
    ) {
        let geometry = Geometry::plain(layout, (2, 128), blocks, KvFormat::Fp8E4M3);
        check_tables(&HostileTables { geometry, dtype, group, seqs, num_tokens, table_stride, window, longest: Some(longest), seed })?;
    }

    /// Random tables, bounds and starts of both gathers.
    #[test]
    fn gather_tables(
        geometry in small_geometry(), seqs in 0usize..5, num_tokens in 0usize..40, table_stride in 0usize..5,
        with_starts in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let mut cu_seq_lens: Vec<i32> = (0..=seqs).map(|_| rng.below(num_tokens + 1) as i32).collect();
        if rng.chance(60) {
            cu_seq_lens.sort_unstable();
        }
        if rng.chance(60) {
            let broken = rng.below(seqs + 1);
            cu_seq_lens[broken] = hostile(&mut rng, num_tokens);
        }
        let capacity = table_stride * geometry.block_size;
        let layer = strategy::any_layer(&geometry, &mut rng);
        let (key, value) =
            (tensor(&geometry, Half::K, num_tokens, &mut rng), tensor(&geometry, Half::V, num_tokens, &mut rng));
        let case = GatherCase {
            geometry,
            layer,
            dtype: DType::F32,
            k_scale: strategy::scales(ScaleKind::Tensor, geometry.heads, geometry.k_dim, || rng.any_scale()),
            v_scale: strategy::scales(ScaleKind::Channel, geometry.heads, geometry.v_dim, || rng.any_scale()),
            tables: (0..seqs * table_stride).map(|_| hostile(&mut rng, geometry.num_blocks)).collect(),
            table_stride,
            cu_seq_lens,
            starts: with_starts.then(|| (0..seqs).map(|_| hostile(&mut rng, capacity)).collect()),
            num_tokens,
            key,
            value,
        };
        let (key, value) = rows::gather(&case);
        let bytes = rows::gather_bytes(&case, 0x5a, 64);
        for device in devices() {
            let (got_key, got_value, faults) = on_device!(&device, |backend| run::gather(backend, &case)).unwrap();
            prop_assert_eq!(rows::check_gather_faults(&case, faults), Ok(()), "on {}", device);
            for (expected, got) in [(&key, &got_key), (&value, &got_value)] {
                let same = |(a, b): (&f32, &f32)| oracle::formats::same_value(*a, *b);
                prop_assert!(expected.data.iter().zip(&got.data).all(same), "on {}", device);
            }
            let (got, faults) = on_device!(&device, |backend| run::gather_bytes(backend, &case, 0x5a, 64)).unwrap();
            prop_assert_eq!(rows::check_gather_faults(&case, faults), Ok(()), "on {}", device);
            prop_assert!(got == bytes, "on {}", device);
        }
    }
}

/// A size: mostly one of `usual`, sometimes one no sane caller passes.
fn size(rng: &mut Rng, usual: &[usize]) -> usize {
    const WILD: [usize; 12] = [0, 1, 7, 12, 512, 513, 1 << 16, 1 << 31, 1 << 32, 1 << 63, usize::MAX - 1, usize::MAX];
    if rng.chance(96) { usual[rng.below(usual.len())] } else { WILD[rng.below(12)] }
}

/// A buffer of random bits inside a larger one, whose margins must stay.
struct Guarded<B: Backend, T: Pod> {
    all: B::Buffer<T>,
    len: usize,
}

const MARGIN: usize = 256;

impl<B: Parts, T: Pod + PartialEq> Guarded<B, T> {
    fn new(backend: &B, len: usize, guard: T, mut next: impl FnMut() -> T) -> Self {
        let mut all = vec![guard; len + 2 * MARGIN];
        all[MARGIN..MARGIN + len].iter_mut().for_each(|x| *x = next());
        Guarded { all: run::upload(backend, &all), len }
    }

    fn view(&self, backend: &B) -> B::Ref<'_, T> {
        B::part(backend.view(&self.all), MARGIN..MARGIN + self.len)
    }

    fn view_mut(&mut self, backend: &B) -> B::Mut<'_, T> {
        B::part_mut(backend.view_mut(&mut self.all), MARGIN..MARGIN + self.len)
    }

    fn intact(&self, backend: &B, guard: T) -> bool {
        let all = run::download(backend, &self.all, self.len + 2 * MARGIN);
        all[..MARGIN].iter().chain(&all[MARGIN + self.len..]).all(|&x| x == guard)
    }
}

/// A shape whose every field may be anything.
fn any_shape(rng: &mut Rng) -> CacheShape {
    let format = |rng: &mut Rng| KvFormat::ALL[rng.below(6)];
    let (k_format, v_format) = (format(rng), format(rng));
    let spec = CacheSpec {
        layout: CacheLayout::ALL[rng.below(3)],
        block_size: size(rng, &[8, 16]),
        num_kv_heads: size(rng, &[1, 2]),
        k_head_dim: size(rng, &[16, 32]),
        v_head_dim: size(rng, &[16, 5]),
        k_format,
        v_format,
        dynamic_scales: if rng.chance(30) { DynamicScales::PerSlotHead } else { DynamicScales::Off },
    };
    let num_blocks = size(rng, &[1, 3]);
    let mut shape = spec.shape(num_blocks).unwrap_or_else(|_| {
        // Refused: hand the operation the same nonsense with made-up strides.
        let map = AddressMap { block_stride: 512, head_stride: 128, slot_stride: 16, chunk: 16, chunk_stride: 16 };
        CacheShape { spec, num_blocks, k_map: map, v_map: map }
    });
    if rng.chance(10) {
        let map = if rng.chance(50) { &mut shape.k_map } else { &mut shape.v_map };
        match rng.below(3) {
            0 => map.block_stride = size(rng, &[0, 1024]),
            1 => map.slot_stride = size(rng, &[0, 3]),
            _ => map.chunk = size(rng, &[0, 8]),
        }
    }
    shape
}

/// Elements of a buffer: usually enough for the shapes above, sometimes a few short of anything.
fn length(rng: &mut Rng, usual: usize) -> usize {
    if rng.chance(95) { usual } else { rng.below(usual + 2) }
}

fn any_strides(rng: &mut Rng, heads: usize) -> RowStrides {
    RowStrides { token: size(rng, &[heads * 32, heads * 32 + 7]), head: size(rng, &[32, 33]) }
}

/// The buffers of one call; floats are any bits, scales and dynamic scales too.
struct Buffers<B: Backend> {
    k: Guarded<B, u8>,
    v: Guarded<B, u8>,
    dynamic: [Option<B::Buffer<f32>>; 2],
    scales: B::Buffer<f32>,
    input: B::Buffer<f32>,
    first: Guarded<B, f32>,
    second: Guarded<B, f32>,
}

const GUARD: f32 = 1234.0;

impl<B: Parts> Buffers<B> {
    fn new(backend: &B, shape: &CacheShape, rng: &mut Rng) -> Self {
        // The largest shape of `any_shape` that is valid: 3 blocks of 16 slots, 2 heads of 32 f32.
        let cache = 3 * 1024 * 4;
        let cached = |rng: &mut Rng| {
            let len = length(rng, cache);
            Guarded::new(backend, len, 0xee, || rng.bits() as u8)
        };
        let (k, v) = (cached(rng), cached(rng));
        let dynamic = [Half::K, Half::V].map(|half| {
            let wanted = shape.spec.has_dynamic_scales(half) != rng.chance(5);
            let scales =
                |rng: &mut Rng| Vec::from_iter((0..length(rng, 96)).map(|_| f32::from_bits(rng.bits() as u32)));
            wanted.then(|| run::upload(backend, &scales(rng)))
        });
        let floats = |len, rng: &mut Rng| {
            let floats: Vec<f32> = (0..length(rng, len))
                .map(|_| if rng.chance(50) { rng.normal() } else { rng.any_activation() })
                .collect();
            run::upload(backend, &floats)
        };
        let (scales, input) = (floats(64, rng), floats(4096, rng));
        let output = |rng: &mut Rng| {
            let len = length(rng, 4096);
            Guarded::new(backend, len, GUARD, || rng.normal())
        };
        let (first, second) = (output(rng), output(rng));
        Buffers { k, v, dynamic, scales, input, first, second }
    }

    fn intact(&self, backend: &B) -> bool {
        self.k.intact(backend, 0xee)
            && self.v.intact(backend, 0xee)
            && self.first.intact(backend, GUARD)
            && self.second.intact(backend, GUARD)
    }
}

/// One call of random arguments, the same for every backend.
fn random_call<B: Parts>(backend: &B, seed: u64) -> quantkv::Result<()> {
    let rng = &mut Rng::new(seed);
    let shape = any_shape(rng);
    let mut buffers = Buffers::new(backend, &shape, rng);
    let group = size(rng, &[1, 2]);
    let heads = shape.spec.num_kv_heads.wrapping_mul(group);
    let Buffers { k, v, dynamic: [k_dynamic, v_dynamic], scales, input, first, second } = &mut buffers;
    let ints: Vec<i32> = (0..length(rng, 64)).map(|_| hostile(rng, 6)).collect();
    let tables: Vec<i32> = (0..length(rng, 64)).map(|_| hostile(rng, 3)).collect();
    let slots: Vec<i64> = (0..rng.below(16)).map(|_| i64::from(hostile(rng, 48))).collect();
    let scale = ScaleStrides { head: size(rng, &[0, 1]), channel: size(rng, &[0, 0, 1]) };
    let (kind, table_stride) = (rng.below(3), size(rng, &[1, 3, 4]));
    let strides = [any_strides(rng, 4), any_strides(rng, 4)];
    let (num_tokens, seqs) = (size(rng, &[1, 5, 8]), rng.below(5).min(ints.len()));
    let (ints, tables, slots) =
        (run::upload(backend, &ints), run::upload(backend, &tables), run::upload(backend, &slots));
    let (ints, tables, slots) = (backend.view(&ints), backend.view(&tables), backend.view(&slots));
    let (scales, input) = (backend.view(scales), backend.view(input));
    macro_rules! scale {
        () => {
            ScaleRef { values: scales, strides: scale }
        };
    }
    macro_rules! layer_ref {
        () => {
            LayerRef {
                k: k.view(backend),
                v: v.view(backend),
                k_dynamic: k_dynamic.as_ref().map(|scales| backend.view(scales)),
                v_dynamic: v_dynamic.as_ref().map(|scales| backend.view(scales)),
            }
        };
    }
    let result = match kind {
        0 => backend.cache_write::<f32>(CacheWrite {
            shape,
            cache: LayerMut {
                k: k.view_mut(backend),
                v: v.view_mut(backend),
                k_dynamic: k_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
                v_dynamic: v_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
            },
            key: input,
            key_strides: strides[0],
            value: input,
            value_strides: strides[1],
            slot_mapping: slots,
            k_scale: scale!(),
            v_scale: scale!(),
        }),
        1 => backend.gather::<f32>(Gather {
            shape,
            cache: layer_ref!(),
            k_scale: scale!(),
            v_scale: scale!(),
            block_tables: tables,
            block_table_stride: table_stride,
            cu_seq_lens: B::part(ints, 0..seqs),
            starts: rng.chance(50).then_some(ints),
            num_tokens,
            key: first.view_mut(backend),
            key_strides: strides[0],
            value: second.view_mut(backend),
            value_strides: strides[1],
        }),
        _ => {
            let params = AttentionParams {
                softmax_scale: if rng.chance(90) { 0.2 } else { rng.any_activation() },
                soft_cap: rng.chance(20).then(|| rng.any_activation()),
                sliding_window: rng.chance(30).then(|| size(rng, &[1, 9])),
            };
            let floats = backend.attention_workspace_len(&shape, heads, num_tokens);
            let mut workspace = run::upload(backend, &vec![f32::NAN; if floats < 1 << 24 { floats } else { 0 }]);
            backend.paged_attention::<f32>(PagedAttention {
                shape,
                cache: layer_ref!(),
                k_scale: scale!(),
                v_scale: scale!(),
                params,
                num_heads: heads,
                num_tokens,
                max_query_len: rng.chance(30).then(|| rng.below(3)),
                query: input,
                query_strides: strides[0],
                query_starts: ints,
                seq_lens: B::part(ints, 0..seqs),
                block_tables: tables,
                block_table_stride: table_stride,
                alibi_slopes: rng.chance(30).then_some(scales),
                sinks: rng.chance(30).then_some(scales),
                output: first.view_mut(backend),
                output_strides: strides[1],
                lse: if rng.chance(50) { Some(second.view_mut(backend)) } else { None },
                workspace: backend.view_mut(&mut workspace),
                plan_is_ready: false,
            })
        }
    };
    if let Err(error) = &result {
        assert!(!error.to_string().is_empty());
    }
    assert!(buffers.intact(backend), "seed {seed}: a guard was overwritten");
    result
}

/// Structurally random calls: `Ok` or `Err`, the same on every device, no panic, no write outside. A good
/// part must get past validation, or the test would say little.
#[test]
fn random_arguments_never_panic() {
    let rounds = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3000u64);
    let devices = devices();
    let mut ran = 0;
    for seed in 0..rounds {
        let answers: Vec<_> =
            devices.iter().map(|device| on_device!(device, |backend| random_call(backend, seed))).collect();
        for (device, answer) in devices.iter().zip(&answers) {
            let (first, answer) = (format!("{:?}", answers[0]), format!("{answer:?}"));
            assert!(first == answer, "seed {seed}: {} says {first}, {device} {answer}", devices[0]);
        }
        ran += u64::from(answers.iter().all(Result::is_ok));
    }
    // Of a handful (under a sanitizer) chance may refuse all.
    assert!(rounds < 64 || (ran * 10 > rounds && ran < rounds), "{ran} of {rounds} calls ran");
}
