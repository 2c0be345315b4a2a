//! Hostile arguments, second half: copies, attention, gathers and dense operations. See
//! `hostile_args.rs`.

mod hostile_support;

use hostile_support::*;
use quantkv::args::{
    Absmax, AttentionParams, BlockPair, CopyBlocks, Dequantize, Gather, GatherBytes, LayerMut, LayerRef, MergeStates,
    PagedAttention, Quantize, RowStrides, SwapBlocks, UpdateScales,
};
use quantkv::layout::Half;
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Error, KvFormat};

/// `copy_blocks` of these pairs over one layer, after `change`.
fn copy(pairs: &[BlockPair], mut cache: Cache, change: impl FnOnce(&mut CacheShape)) -> quantkv::Result<()> {
    let mut shape = shape();
    change(&mut shape);
    CpuBackend::new().copy_blocks(CopyBlocks { shape, layers: &mut [cache.view_mut()], pairs })
}

#[test]
fn copy_blocks() {
    use Error::*;
    let pair = BlockPair::new;
    refused!(copy(&[pair(0, 4)], Cache::new(), |_| {}), BlockOutOfRange { .. }, "copy_blocks", "block 4", "4 blocks");
    refused!(copy(&[pair(u32::MAX, 0)], Cache::new(), |_| {}), BlockOutOfRange { .. }, u32::MAX);
    refused!(
        copy(&[pair(0, 1), pair(2, 1)], Cache::new(), |_| {}),
        OverlappingPairs { .. },
        "block 1",
        "written twice"
    );
    refused!(copy(&[pair(0, 1), pair(1, 2)], Cache::new(), |_| {}), OverlappingPairs { .. }, "block 1", "both source");
    refused!(copy(&[pair(3, 3)], Cache::new(), |_| {}), OverlappingPairs { .. }, "block 3", "both source");
    let short = Cache { k: vec![0; 9], ..Cache::new() };
    refused!(copy(&[pair(0, 1)], short, |_| {}), BufferTooSmall { .. }, "K cache", 1024, 9);
    let extra = Cache { dynamic: Some(vec![1.0; 64]), ..Cache::new() };
    refused!(copy(&[], extra, |_| {}), DynamicScales { .. }, "given");
    refused!(copy(&[], Cache::new(), |shape| shape.spec.num_kv_heads = 0), Zero { .. }, "KV heads");
    refused!(
        copy(&[], Cache::new(), |shape| shape.v_map.block_stride = 1),
        StrideTooSmall { .. },
        "V block stride",
        256
    );
}

#[test]
fn swap_blocks() {
    use Error::*;
    let cpu = CpuBackend::new();
    let run = |pairs: &[BlockPair], src_shape: CacheShape, dst_shape: CacheShape, layers: (usize, usize), bytes| {
        let src = Cache::new();
        let mut dst: Vec<_> = (0..layers.1).map(|_| (vec![0u8; bytes], vec![0u8; bytes])).collect();
        let source = vec![src.view(); layers.0];
        let out: Vec<LayerRef<'_, quantkv::memory::Host>> =
            source.iter().map(|l| LayerRef { k: l.k, v: l.v, k_dynamic: None, v_dynamic: None }).collect();
        let mut views: Vec<LayerMut<'_, CpuBackend>> = dst
            .iter_mut()
            .map(|(k, v)| LayerMut { k: &mut k[..], v: &mut v[..], k_dynamic: None, v_dynamic: None })
            .collect();
        let swapped_in = cpu.swap_in(SwapBlocks { src_shape, src: &out, dst_shape, dst: &mut views, pairs });
        drop(views);
        let mut views: Vec<LayerMut<'_, quantkv::memory::Host>> = dst
            .iter_mut()
            .map(|(k, v)| LayerMut { k: &mut k[..], v: &mut v[..], k_dynamic: None, v_dynamic: None })
            .collect();
        let swapped_out = cpu.swap_out(SwapBlocks { src_shape, src: &source, dst_shape, dst: &mut views, pairs });
        // Both directions answer alike.
        assert_eq!(format!("{swapped_in:?}"), format!("{swapped_out:?}"));
        swapped_out
    };
    let pair = BlockPair::new;
    let two = spec().shape(2).unwrap();
    run(&[pair(3, 1)], shape(), two, (1, 1), 512).unwrap();
    refused!(
        run(&[pair(4, 1)], shape(), two, (1, 1), 512),
        BlockOutOfRange { .. },
        "swap_blocks",
        "block 4",
        "4 blocks"
    );
    refused!(run(&[pair(3, 2)], shape(), two, (1, 1), 512), BlockOutOfRange { .. }, "block 2", "2 blocks");
    refused!(run(&[pair(0, 1), pair(1, 1)], shape(), two, (1, 1), 512), OverlappingPairs { .. }, "block 1", "twice");
    refused!(run(&[], shape(), two, (2, 1), 512), LengthMismatch { .. }, "layers", 2, 1);
    refused!(run(&[], shape(), two, (1, 1), 511), BufferTooSmall { .. }, "K cache", 512, 511);
    let nhd = spec().with_layout(CacheLayout::Nhd).unwrap().shape(4).unwrap();
    refused!(run(&[], shape(), nhd, (1, 1), 1024), GeometryMismatch { .. }, "pools", "Hnd", "Nhd");
    let wide = CacheSpec { k_format: KvFormat::F16, ..spec() }.shape(4).unwrap();
    refused!(run(&[], wide, shape(), (1, 1), 1024), GeometryMismatch { .. }, "F16", "Fp8E4M3");
    let mut none = two;
    none.num_blocks = 0;
    refused!(run(&[], shape(), none, (1, 1), 512), Zero { .. }, "blocks");
}

/// Buffer lengths of an attention call.
#[derive(Clone, Copy, Debug)]
struct Lens {
    query: usize,
    output: usize,
    starts: usize,
    seqs: usize,
    tables: usize,
    per_head: usize,
    lse: usize,
    workspace: Option<usize>,
}

const LENS: Lens =
    Lens { query: 128, output: 128, starts: 3, seqs: 2, tables: 4, per_head: 4, lse: 8, workspace: None };

/// Two sequences, two tokens, four query heads over two KV heads, after `change`.
fn attend(lens: Lens, change: impl FnOnce(&mut PagedAttention<'_, CpuBackend, f32>)) -> quantkv::Result<()> {
    let cpu = CpuBackend::new();
    let cache = Cache::new();
    let workspace = lens.workspace.unwrap_or_else(|| cpu.attention_workspace_len(&shape(), 4, 2));
    let (query, tables, slopes) = (vec![0.5f32; lens.query], vec![0i32; lens.tables], vec![0.1; lens.per_head]);
    let (starts, seqs) = ((0..lens.starts as i32).collect::<Vec<_>>(), vec![3i32; lens.seqs]);
    let (mut output, mut lse, mut workspace) = (vec![0.0f32; lens.output], vec![0.0; lens.lse], vec![0.0; workspace]);
    let mut op = PagedAttention {
        shape: shape(),
        cache: cache.view(),
        k_scale: unit_scale(),
        v_scale: unit_scale(),
        params: AttentionParams::new(0.25),
        num_heads: 4,
        num_tokens: 2,
        max_query_len: None,
        query: &query[..],
        query_strides: RowStrides::contiguous(4, 16),
        query_starts: &starts[..],
        seq_lens: &seqs[..],
        block_tables: &tables[..],
        block_table_stride: 2,
        alibi_slopes: Some(&slopes[..]),
        sinks: Some(&slopes[..]),
        output: &mut output[..],
        output_strides: RowStrides::contiguous(4, 16),
        lse: Some(&mut lse[..]),
        workspace: &mut workspace[..],
        plan_is_ready: false,
    };
    change(&mut op);
    cpu.paged_attention(op)
}

#[test]
fn paged_attention_buffers() {
    use Error::*;
    attend(LENS, |_| {}).unwrap();
    refused!(attend(Lens { query: 127, ..LENS }, |_| {}), BufferTooSmall { .. }, "query", 128, 127);
    refused!(attend(Lens { output: 127, ..LENS }, |_| {}), BufferTooSmall { .. }, "output", 128, 127);
    refused!(attend(Lens { starts: 2, ..LENS }, |_| {}), BufferTooSmall { .. }, "query_starts", 3, 2);
    refused!(attend(Lens { tables: 3, ..LENS }, |_| {}), BufferTooSmall { .. }, "block_tables", 4, 3);
    refused!(attend(Lens { per_head: 3, ..LENS }, |op| op.sinks = None), BufferTooSmall { .. }, "alibi_slopes", 4, 3);
    refused!(attend(Lens { per_head: 3, ..LENS }, |op| op.alibi_slopes = None), BufferTooSmall { .. }, "sinks", 4, 3);
    refused!(attend(Lens { lse: 7, ..LENS }, |_| {}), BufferTooSmall { .. }, "LSE", 8, 7);
    let cpu = CpuBackend::new();
    let needed = cpu.attention_workspace_len(&shape(), 4, 2);
    if needed > 0 {
        let short = Lens { workspace: Some(needed - 1), ..LENS };
        refused!(attend(short, |_| {}), BufferTooSmall { .. }, "workspace", needed, needed - 1);
    }
    // A query of the workspace for absurd batches answers; it does not overflow.
    for (heads, tokens) in [(usize::MAX, usize::MAX), (1 << 40, 1 << 40), (0, 0), (usize::MAX, 1), (1, usize::MAX)] {
        cpu.attention_workspace_len(&shape(), heads, tokens);
    }
    refused!(attend(LENS, |op| op.cache.k = &[]), BufferTooSmall { .. }, "K cache", 1024);
    refused!(
        attend(LENS, |op| op.cache.v_dynamic = Some(&[1.0; 64])),
        DynamicScales { .. },
        "V dynamic scales",
        "given"
    );
    refused!(attend(LENS, |op| op.k_scale.values = &[]), BufferTooSmall { .. }, "K scales", 1);
    refused!(attend(LENS, |op| op.block_table_stride = usize::MAX), Overflow { .. }, "block_tables");
    refused!(attend(LENS, |op| op.block_table_stride = 3), BufferTooSmall { .. }, "block_tables", 6, 4);
    refused!(attend(LENS, |op| op.num_tokens = 3), BufferTooSmall { .. }, "query", 192, 128);
    refused!(attend(LENS, |op| op.num_tokens = usize::MAX), Overflow { .. }, "query");
    let broadcast = RowStrides { token: 0, head: 16 };
    attend(LENS, |op| op.query_strides = broadcast).unwrap();
    refused!(attend(LENS, |op| op.output_strides = broadcast), StrideTooSmall { .. }, "output", 0, 64);
    let overlapping = RowStrides { token: 64, head: 15 };
    refused!(attend(LENS, |op| op.output_strides = overlapping), StrideTooSmall { .. }, "output", 15, 16);
    let overflow = RowStrides { token: usize::MAX, head: 16 };
    refused!(attend(LENS, |op| op.output_strides = overflow), Overflow { .. }, "output");
}

#[test]
fn paged_attention_numbers() {
    use Error::*;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused!(attend(LENS, |op| op.params.softmax_scale = bad), InvalidNumber { .. }, "softmax_scale", bad);
        refused!(attend(LENS, |op| op.params.soft_cap = Some(bad)), InvalidNumber { .. }, "soft_cap", bad);
    }
    for bad in [0.0, -1.0] {
        refused!(attend(LENS, |op| op.params.soft_cap = Some(bad)), InvalidNumber { .. }, "soft_cap", bad, "greater");
    }
    refused!(attend(LENS, |op| op.params.sliding_window = Some(0)), Zero { .. }, "sliding_window");
    refused!(attend(LENS, |op| op.num_heads = 3), HeadsNotDivisible { .. }, "3 query heads", "2 KV heads");
    refused!(attend(LENS, |op| op.num_heads = 0), Zero { .. }, "query heads");
    refused!(attend(LENS, |op| op.shape.spec.v_head_dim = 513), Unsupported { .. }, "V head dim", 513);
    refused!(attend(LENS, |op| op.shape.num_blocks = usize::MAX), Unsupported { .. }, "blocks", usize::MAX);
    // vLLM: 16 query heads over 5 KV heads must be refused.
    let five = CacheSpec::new(5, 16, 8, KvFormat::Fp8E4M3).unwrap().shape(1).unwrap();
    refused!(
        attend(LENS, |op| (op.shape, op.num_heads) = (five, 16)),
        HeadsNotDivisible { .. },
        "16 query heads",
        "5 KV heads"
    );
}

#[test]
fn gathers() {
    use Error::*;
    let run = |key: usize, value: usize, change: &dyn Fn(&mut Gather<'_, CpuBackend, f32>)| {
        let cache = Cache::new();
        let (mut key, mut value) = (vec![0.0f32; key], vec![0.0f32; value]);
        let mut op = Gather {
            shape: shape(),
            cache: cache.view(),
            k_scale: unit_scale(),
            v_scale: unit_scale(),
            block_tables: &[0, 1],
            block_table_stride: 1,
            cu_seq_lens: &[0, 2, 3],
            starts: Some(&[0, 1]),
            num_tokens: 3,
            key: &mut key,
            key_strides: ROWS,
            value: &mut value,
            value_strides: ROWS,
        };
        change(&mut op);
        CpuBackend::new().gather(op)
    };
    run(96, 96, &|_| {}).unwrap();
    refused!(run(95, 96, &|_| {}), BufferTooSmall { .. }, "gathered key", 96, 95);
    refused!(run(96, 1, &|_| {}), BufferTooSmall { .. }, "gathered value", 96, 1);
    refused!(run(96, 96, &|op| op.cu_seq_lens = &[]), BufferTooSmall { .. }, "cu_seq_lens", 1, 0);
    refused!(run(96, 96, &|op| op.block_tables = &[0]), BufferTooSmall { .. }, "block_tables", 2, 1);
    refused!(run(96, 96, &|op| op.block_table_stride = usize::MAX), Overflow { .. }, "block_tables");
    refused!(run(96, 96, &|op| op.starts = Some(&[0])), BufferTooSmall { .. }, "starts", 2, 1);
    refused!(run(96, 96, &|op| op.key_strides.token = 31), StrideTooSmall { .. }, "gathered key", 31, 32);
    refused!(run(96, 96, &|op| op.value_strides.head = 0), StrideTooSmall { .. }, "gathered value", 0, 16);
    refused!(run(96, 96, &|op| op.num_tokens = usize::MAX), Overflow { .. }, "gathered key");
    refused!(run(96, 96, &|op| op.v_scale.values = &[]), BufferTooSmall { .. }, "V scales");
    refused!(run(96, 96, &|op| op.cache.v = &[0; 1023]), BufferTooSmall { .. }, "V cache", 1024, 1023);

    let bytes = |key: usize, value: usize, change: &dyn Fn(&mut GatherBytes<'_, CpuBackend>)| {
        let cache = Cache::new();
        let (mut key, mut value) = (vec![0; key], vec![0; value]);
        let mut op = GatherBytes {
            shape: shape(),
            cache: cache.view(),
            block_tables: &[0, 1],
            block_table_stride: 1,
            cu_seq_lens: &[0, 2, 3],
            starts: None,
            num_tokens: 3,
            key: &mut key,
            value: &mut value,
        };
        change(&mut op);
        CpuBackend::new().gather_bytes(op)
    };
    bytes(96, 96, &|_| {}).unwrap();
    refused!(bytes(95, 96, &|_| {}), BufferTooSmall { .. }, "gathered key bytes", 96, 95);
    refused!(bytes(96, 0, &|_| {}), BufferTooSmall { .. }, "gathered value bytes", 96, "has 0");
    refused!(bytes(96, 96, &|op| op.num_tokens = usize::MAX / 2), Overflow { .. }, "gathered key bytes");
    refused!(bytes(96, 96, &|op| op.cu_seq_lens = &[]), BufferTooSmall { .. }, "cu_seq_lens");
    refused!(bytes(96, 96, &|op| op.starts = Some(&[])), BufferTooSmall { .. }, "starts", 2);
    refused!(bytes(96, 96, &|op| op.block_table_stride = 2), BufferTooSmall { .. }, "block_tables", 4, 2);
}

#[test]
fn dense_operations() {
    use Error::*;
    let cpu = CpuBackend::new();
    fn quantize(input: usize, codes: usize, dims: (usize, usize, usize), strides: RowStrides) -> quantkv::Result<()> {
        let (input, mut codes) = (vec![0.0f32; input], vec![0u8; codes]);
        CpuBackend::new().quantize(Quantize {
            num_tokens: dims.0,
            num_heads: dims.1,
            head_dim: dims.2,
            format: KvFormat::Fp8E5M2,
            input: &input[..],
            strides,
            scale: unit_scale(),
            codes: &mut codes[..],
        })
    }
    fn dequantize(codes: usize, output: usize, strides: RowStrides, scale: ScaleStrides) -> quantkv::Result<()> {
        let (codes, mut output) = (vec![0u8; codes], vec![0.0f32; output]);
        CpuBackend::new().dequantize(Dequantize {
            num_tokens: 2,
            num_heads: 2,
            head_dim: 16,
            format: KvFormat::Fp8E4M3Fnuz,
            codes: &codes[..],
            scale: ScaleRef { values: &ONE[..], strides: scale },
            output: &mut output[..],
            strides,
        })
    }
    refused!(quantize(63, 64, (2, 2, 16), ROWS), BufferTooSmall { .. }, "quantize input", 64, 63);
    refused!(quantize(64, 63, (2, 2, 16), ROWS), BufferTooSmall { .. }, "codes", 64, 63);
    refused!(quantize(64, 64, (2, 0, 16), ROWS), Zero { .. }, "heads and head dim");
    refused!(quantize(64, 64, (2, 2, 0), ROWS), Zero { .. }, "heads and head dim");
    refused!(quantize(64, 64, (usize::MAX, 2, 16), ROWS), Overflow { .. }, "codes");
    let overflow = RowStrides { token: usize::MAX, head: 1 };
    refused!(quantize(64, 64, (2, 2, 16), overflow), Overflow { .. }, "quantize input");
    let plain = ScaleStrides::default();
    refused!(dequantize(63, 64, ROWS, plain), BufferTooSmall { .. }, "codes", 64, 63);
    refused!(dequantize(64, 63, ROWS, plain), BufferTooSmall { .. }, "dequantized output", 64, 63);
    let overlapping = RowStrides { token: 31, head: 16 };
    refused!(dequantize(64, 64, overlapping, plain), StrideTooSmall { .. }, "dequantized output", 31, 32);
    refused!(dequantize(64, 64, ROWS, ScaleStrides { head: 0, channel: 1 }), BufferTooSmall { .. }, "scales", 16, 1);

    let absmax = |input: usize, (heads, dim), running: usize, granularity| {
        let (input, mut running) = (vec![0.0f32; input], vec![0.0; running]);
        let strides = RowStrides::contiguous(heads, dim);
        let (num_tokens, num_heads, head_dim) = (2, heads, dim);
        let running = &mut running[..];
        let input = &input[..];
        cpu.absmax(Absmax { input, strides, num_tokens, num_heads, head_dim, granularity, running })
    };
    refused!(absmax(63, (2, 16), 1, Granularity::Tensor), BufferTooSmall { .. }, "absmax input", 64, 63);
    refused!(absmax(64, (2, 16), 3, Granularity::Head), LengthMismatch { .. }, "running maxima", 2, 3);
    refused!(absmax(64, (2, 16), 31, Granularity::Channel), LengthMismatch { .. }, "running maxima", 32, 31);
    refused!(absmax(64, (0, 16), 1, Granularity::Tensor), Zero { .. }, "absmax");

    let update = |divisor, scales: usize| {
        let mut scales = vec![0.0; scales];
        cpu.update_scales(UpdateScales { absmax: &[1.0, 2.0], divisor, scales: &mut scales })
    };
    for bad in [0.0, 0.5, -200.0, f32::NAN, f32::INFINITY] {
        refused!(update(bad, 2), InvalidNumber { .. }, "divisor", bad);
    }
    refused!(update(200.0, 3), LengthMismatch { .. }, "scales", 2, 3);

    let merge = |dims: (usize, usize, usize), strides, lens: [usize; 5], lse: Option<usize>| {
        let [a, b, a_lse, b_lse, output] = lens;
        let (a, b, mut output) = (vec![0.0f32; a], vec![0.0f32; b], vec![0.0f32; output]);
        let (a_lse, b_lse, mut lse) = (vec![0.0; a_lse], vec![0.0; b_lse], lse.map(|len| vec![0.0; len]));
        cpu.merge_states(MergeStates {
            num_tokens: dims.0,
            num_heads: dims.1,
            head_dim: dims.2,
            a: &a[..],
            a_lse: &a_lse[..],
            b: &b[..],
            b_lse: &b_lse[..],
            strides,
            output: &mut output[..],
            lse: lse.as_deref_mut(),
        })
    };
    let dims = (2, 2, 16);
    merge(dims, ROWS, [64, 64, 4, 4, 64], Some(4)).unwrap();
    refused!(merge(dims, ROWS, [63, 64, 4, 4, 64], None), BufferTooSmall { .. }, "a needs", 64, 63);
    refused!(merge(dims, ROWS, [64, 63, 4, 4, 64], None), BufferTooSmall { .. }, "b needs", 64, 63);
    refused!(merge(dims, ROWS, [64, 64, 3, 4, 64], None), BufferTooSmall { .. }, "LSE of a", 4, 3);
    refused!(merge(dims, ROWS, [64, 64, 4, 3, 64], None), BufferTooSmall { .. }, "LSE of b", 4, 3);
    refused!(merge(dims, ROWS, [64, 64, 4, 4, 63], None), BufferTooSmall { .. }, "merged output", 64, 63);
    refused!(merge(dims, ROWS, [64, 64, 4, 4, 64], Some(3)), BufferTooSmall { .. }, "merged LSE", 4, 3);
    refused!(merge((2, 0, 16), ROWS, [64, 64, 4, 4, 64], None), Zero { .. }, "merge_states");
    let overlapping = RowStrides { token: 32, head: 8 };
    refused!(merge(dims, overlapping, [64, 64, 4, 4, 64], None), StrideTooSmall { .. }, "merged output", 8, 16);
}

/// Nothing to do, or rows that all lie on one another, of sizes whose product does not fit: refused,
/// and no number on the way overflows.
#[test]
fn impossible_sizes_of_no_bytes() {
    use Error::*;
    let huge = 1usize << 60;
    assert_eq!(huge.wrapping_mul(16), 0, "the product a careless multiplication would see");
    for cpu in [CpuBackend::new(), CpuBackend::scalar()] {
        for (num_tokens, num_heads, head_dim) in [(0, huge, 16), (0, 16, huge), (0, huge, huge), (0, usize::MAX, 2)] {
            let strides = RowStrides::contiguous(num_heads, head_dim);
            let (format, scale) = (KvFormat::Fp8E4M3, unit_scale());
            let (input, codes) = (&[0.0f32; 0][..], &mut [0u8; 0][..]);
            let op = Quantize { num_tokens, num_heads, head_dim, format, input, strides, scale, codes };
            refused!(cpu.quantize(op), Overflow { .. }, "codes");
            let (codes, output) = (&[0u8; 0][..], &mut [0.0f32; 0][..]);
            let op = Dequantize { num_tokens, num_heads, head_dim, format, codes, scale, output, strides };
            refused!(cpu.dequantize(op), Overflow { .. }, "codes");
            for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Channel] {
                let (input, running) = (&[0.0f32; 0][..], &mut [0.0f32; 1][..]);
                let op = Absmax { input, strides, num_tokens, num_heads, head_dim, granularity, running };
                refused!(cpu.absmax(op), Overflow { .. }, "absmax input");
            }
        }
        let strides = RowStrides { token: 0, head: 0 };
        for (num_tokens, num_heads) in [(1, huge), (huge, 1), (huge, huge)] {
            let (input, granularity, running) = (&[0.0f32; 16][..], Granularity::Channel, &mut [0.0f32; 0][..]);
            let op = Absmax { input, strides, num_tokens, num_heads, head_dim: 16, granularity, running };
            refused!(cpu.absmax(op), Overflow { .. }, "absmax input");
        }
    }
}

/// Sizes a caller computes before anything has been validated.
#[test]
fn sizes_of_unvalidated_shapes_saturate() {
    let strides = RowStrides::contiguous(usize::MAX, 2);
    assert_eq!((strides.token, strides.head), (usize::MAX, 2));
    assert_eq!(Granularity::Channel.len(usize::MAX, 2), usize::MAX);
    assert_eq!(ScaleStrides { head: usize::MAX, channel: 1 }.len(3, 4), usize::MAX);
    let spec = CacheSpec { num_kv_heads: usize::MAX, k_head_dim: usize::MAX, ..spec() };
    refused!(spec.bytes_per_token(), Error::Overflow { .. }, "bytes per token");
    refused!(spec.bytes_per_block(), Error::Overflow { .. }, "bytes per token");
    for layout in CacheLayout::ALL {
        let map = CacheSpec { layout, ..spec }.address_map(Half::K);
        assert_eq!(map.block_stride, usize::MAX, "{layout:?}");
    }
}
