//! Hostile arguments, first half: specs, shapes, scales and `cache_write`. Every refusal is reached
//! by a concrete input, with the variant, the name of what is wrong and the numbers in the message.
//!
//! Host-side arguments only; hostile *contents* of device buffers are in `hostile_data.rs`.

mod hostile_support;

use hostile_support::*;
use quantkv::args::{Absmax, AttentionParams, CacheWrite, LayerMut, LayerRef, PagedAttention, RowStrides};
use quantkv::layout::{DynamicScales as Dynamic, Half};
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides, StaticScale};
use quantkv::{Backend, CacheLayout, CacheSpec, CpuBackend, Error, KvCacheDtype, KvFormat};

#[test]
fn specs() {
    use Error::*;
    let spec = |block_size, heads, k_head_dim, v_head_dim| {
        let spec = CacheSpec { block_size, num_kv_heads: heads, k_head_dim, v_head_dim, ..spec() };
        spec.validate().map(|()| spec.shape(1))
    };
    for block_size in [0, 1, 4, 7, 12, 512, usize::MAX, 1 << 63] {
        refused!(spec(block_size, 2, 16, 16), Unsupported { .. }, "block size", block_size, "8 to 256");
    }
    for dim in [0, 513, usize::MAX] {
        refused!(spec(16, 2, dim, 16), Unsupported { .. }, "K head dim", dim, "1 to 512");
        refused!(spec(16, 2, 16, dim), Unsupported { .. }, "V head dim", dim, "1 to 512");
    }
    refused!(spec(16, 0, 16, 16), Zero { .. }, "KV heads");
    for heads in [usize::MAX, usize::MAX / 16, 1 << 60] {
        refused!(spec(16, heads, 16, 16), Overflow { .. }, "bytes per");
        // Not validated before: must not overflow on the way either.
        refused!(CacheSpec { num_kv_heads: heads, ..self::spec() }.shape(1), Overflow { .. }, "overflows");
    }
    for (format, dim) in [(KvFormat::Fp8E4M3, 24), (KvFormat::BF16, 12), (KvFormat::F32, 46)] {
        let spec = CacheSpec { k_format: format, k_head_dim: dim, ..self::spec() };
        refused!(spec.with_layout(CacheLayout::VllmPacked), Unsupported { .. }, "K head dim", dim, "vLLM-packed");
    }
    let plain = CacheSpec::new(2, 16, 8, KvFormat::F16).unwrap();
    refused!(plain.with_dynamic_scales(), DynamicScales { .. }, "dynamic scales", "quantized");
    refused!(CacheSpec::new(1, 513, 16, KvFormat::F32), Unsupported { .. }, 513);
}

#[test]
fn halves_may_differ() {
    let spec = CacheSpec::new(2, 16, 8, KvFormat::F16).unwrap();
    let spec = spec.with_head_dims(192, 128).unwrap().with_formats(KvFormat::BF16, KvFormat::Fp8E4M3).unwrap();
    assert_eq!(spec.bytes_per_token().unwrap(), 2 * (192 * 2 + 128));
    let shape = spec.shape(4).unwrap();
    assert_eq!(shape.buffer_bytes(Half::K), 4 * 8 * 2 * 192 * 2);
    assert_eq!(shape.buffer_bytes(Half::V), 4 * 8 * 2 * 128);
    refused!(spec.with_head_dims(16, 0), Error::Unsupported { .. }, "V head dim", 0);
    let packed = CacheSpec::new(2, 24, 8, KvFormat::BF16).unwrap().with_layout(CacheLayout::VllmPacked).unwrap();
    refused!(
        packed.with_formats(KvFormat::Fp8E4M3, KvFormat::BF16),
        Error::Unsupported { .. },
        "K head dim",
        24,
        "vLLM-packed"
    );
}

#[test]
fn shapes_and_budgets() {
    use Error::*;
    refused!(spec().shape(0), Zero { .. }, "number of blocks");
    refused!(spec().shape(1 << 31), Unsupported { .. }, 1u64 << 31, "i32");
    refused!(spec().shape(usize::MAX), Unsupported { .. }, usize::MAX);
    let large = CacheSpec::new(1 << 40, 512, 256, KvFormat::F32).unwrap();
    refused!(large.shape(i32::MAX as usize), Overflow { .. }, "K cache bytes");
    refused!(shape().with_block_strides(255, 256), StrideTooSmall { .. }, "K block stride", 255, 256);
    refused!(shape().with_block_strides(256, 0), StrideTooSmall { .. }, "V block stride", 0, 256);
    refused!(shape().with_block_strides(usize::MAX, 256), Overflow { .. }, "K cache bytes");
    refused!(shape().with_block_strides(256, usize::MAX / 2), Overflow { .. }, "V cache bytes");
    let mut twisted = shape();
    twisted.k_map.slot_stride = 0;
    refused!(twisted.validate(), GeometryMismatch { .. }, "strides inside a block", "slot_stride: 0");
    let mut twisted = shape();
    twisted.v_map.chunk = 0;
    refused!(twisted.validate(), GeometryMismatch { .. }, "chunk: 0");
    refused!(spec().blocks_for_budget(0, 1 << 20), Zero { .. }, "layers");
    refused!(spec().blocks_for_budget(3, 1535), BudgetTooSmall { .. }, 1535, 1536);
    refused!(spec().blocks_for_budget(usize::MAX, 1 << 20), Overflow { .. }, "bytes per block");
    assert_eq!(spec().blocks_for_budget(3, 1536).unwrap(), 1);
}

#[test]
fn scales_and_names() {
    use Error::*;
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0] {
        refused!(StaticScale::per_tensor("layers.3.k_scale", bad), InvalidScale { .. }, "layers.3.k_scale", "index 0");
        refused!(StaticScale::per_head("v", vec![1.0, 2.0, bad]), InvalidScale { .. }, "v", "index 2", bad);
        refused!(StaticScale::per_channel("v", 2, vec![1.0, bad]), InvalidScale { .. }, "index 1");
    }
    refused!(StaticScale::per_head("k", vec![]), Zero { .. }, "scales");
    refused!(StaticScale::per_channel("k", 3, vec![1.0; 4]), LengthMismatch { .. }, 3, 4);
    refused!(StaticScale::per_channel("k", 0, vec![1.0; 4]), LengthMismatch { .. }, 4);
    let three = StaticScale::per_head("k", vec![1.0; 3]).unwrap();
    refused!(three.check_fits(&spec(), Half::K), LengthMismatch { .. }, "K scales", 2, 3);
    let swapped = StaticScale::per_channel("v", 2, vec![1.0; 32]).unwrap();
    refused!(swapped.check_fits(&spec(), Half::V), LengthMismatch { .. }, "V scales");
    let huge = StaticScale::per_tensor("k", f32::MAX).unwrap();
    refused!(huge.doubled_for_fnuz("layers.0.k_scale"), InvalidScale { .. }, "layers.0.k_scale", "inf");
    for given in ["", "fp4", "FP8", "auto ", "int8\0"] {
        refused!(given.parse::<KvCacheDtype>(), UnknownKvCacheDtype { .. }, "fp8_e4m3", format!("{given:?}"));
    }
}

#[test]
fn buffers() {
    use Error::*;
    let cpu = CpuBackend::new();
    refused!(cpu.zeros::<f32>("the pool", usize::MAX), Overflow { .. }, "the pool");
    refused!(cpu.zeros::<u8>("the pool", isize::MAX as usize), OutOfMemory { .. }, "the pool", isize::MAX);
    let mut buffer = cpu.zeros::<u8>("three", 3).unwrap();
    refused!(cpu.upload(&[1u8; 4], &mut buffer), BufferTooSmall { .. }, "upload", 4, 3);
    refused!(cpu.download(&buffer, &mut [0u8; 4]), BufferTooSmall { .. }, "download", 4, 3);
}

/// `cache_write` of `tokens` tokens after `change`.
fn write(
    mut cache: Cache,
    (key, value, slots): (usize, usize, usize),
    change: impl FnOnce(&mut CacheWrite<'_, CpuBackend, f32>),
) -> quantkv::Result<()> {
    let (key, value, slots) = (vec![0.0f32; key], vec![0.0f32; value], vec![0i64; slots]);
    let mut op = CacheWrite {
        shape: shape(),
        cache: cache.view_mut(),
        key: &key[..],
        key_strides: ROWS,
        value: &value[..],
        value_strides: ROWS,
        slot_mapping: &slots[..],
        k_scale: unit_scale(),
        v_scale: unit_scale(),
    };
    change(&mut op);
    CpuBackend::new().cache_write(op)
}

#[test]
fn cache_write() {
    use Error::*;
    let full = (64, 64, 2);
    write(Cache::new(), full, |_| {}).unwrap();
    refused!(write(Cache::new(), (63, 64, 2), |_| {}), BufferTooSmall { .. }, "key", 64, 63);
    refused!(write(Cache::new(), (64, 0, 2), |_| {}), BufferTooSmall { .. }, "value", 64, "has 0");
    let short = |k, v| Cache { k: vec![0; k], v: vec![0; v], dynamic: None };
    refused!(write(short(HALF_BYTES - 1, HALF_BYTES), full, |_| {}), BufferTooSmall { .. }, "K cache", 1024, 1023);
    refused!(write(short(HALF_BYTES, 0), full, |_| {}), BufferTooSmall { .. }, "V cache", 1024, "has 0");
    let extra = Cache { dynamic: Some(vec![1.0; 64]), ..Cache::new() };
    refused!(write(extra, full, |_| {}), DynamicScales { .. }, "K dynamic scales", "given");
    refused!(
        write(Cache::new(), full, |op| op.shape.spec.dynamic_scales = Dynamic::PerSlotHead),
        DynamicScales { .. },
        "K dynamic scales",
        "missing"
    );
    let few = Cache { dynamic: Some(vec![1.0; 63]), ..Cache::new() };
    refused!(
        write(few, full, |op| op.shape = spec().with_dynamic_scales().unwrap().shape(4).unwrap()),
        BufferTooSmall { .. },
        "K dynamic scales",
        64,
        63
    );
    for (token, head) in [(usize::MAX, 16), (32, usize::MAX), (usize::MAX / 2 + 1, usize::MAX / 2 + 1)] {
        let stride = RowStrides { token, head };
        refused!(
            write(Cache::new(), full, |op| op.key_strides = stride),
            Overflow { .. } | BufferTooSmall { .. },
            "key"
        );
        refused!(
            write(Cache::new(), full, |op| op.value_strides = stride),
            Overflow { .. } | BufferTooSmall { .. },
            "value"
        );
    }
    let far = ScaleStrides { head: 1, channel: 0 };
    refused!(write(Cache::new(), full, |op| op.k_scale.strides = far), BufferTooSmall { .. }, "K scales", 2, 1);
    let overflow = ScaleStrides { head: usize::MAX, channel: usize::MAX };
    refused!(write(Cache::new(), full, |op| op.v_scale.strides = overflow), Overflow { .. }, "V scales");
    refused!(write(Cache::new(), full, |op| op.v_scale.values = &[]), BufferTooSmall { .. }, "V scales", "has 0");
    refused!(write(Cache::new(), full, |op| op.shape.num_blocks = 0), Zero { .. }, "blocks");
    refused!(write(Cache::new(), full, |op| op.shape.spec.block_size = 12), Unsupported { .. }, "block size", 12);
    refused!(write(Cache::new(), full, |op| op.shape.k_map.head_stride = 1), GeometryMismatch { .. }, "head_stride: 1");
}

/// Strides that no row uses may be anything: one token, one head.
#[test]
fn unused_strides_may_be_anything() {
    let cpu = [CpuBackend::scalar(), CpuBackend::new()];
    let shape = CacheSpec::new(1, 16, 8, KvFormat::Fp8E4M3).unwrap().shape(2).unwrap();
    let max = RowStrides { token: usize::MAX, head: usize::MAX };
    // Made anew for each call: a `ScaleRef` ties the lifetimes of the buffers of one operation.
    fn scale<'a>() -> ScaleRef<'a, CpuBackend> {
        ScaleRef { values: &ONE, strides: ScaleStrides { head: usize::MAX, channel: 0 } }
    }
    for cpu in &cpu {
        let (mut k, mut v) = (vec![0u8; 256], vec![0u8; 256]);
        let input = [2.0f32; 16];
        cpu.cache_write(CacheWrite {
            shape,
            cache: LayerMut { k: &mut k, v: &mut v, k_dynamic: None, v_dynamic: None },
            key: &input[..],
            key_strides: max,
            value: &input[..],
            value_strides: max,
            slot_mapping: &[15],
            k_scale: scale(),
            v_scale: scale(),
        })
        .unwrap();
        assert_eq!(k[240..], [0x40; 16]);
        let mut output = [0.0f32; 16];
        let mut workspace = vec![0.0; cpu.attention_workspace_len(&shape, 1, 1)];
        cpu.paged_attention(PagedAttention {
            shape,
            cache: LayerRef { k: &k[..], v: &v[..], k_dynamic: None, v_dynamic: None },
            k_scale: scale(),
            v_scale: scale(),
            params: AttentionParams { sliding_window: Some(usize::MAX), ..AttentionParams::new(0.25) },
            num_heads: 1,
            num_tokens: 1,
            max_query_len: None,
            query: &input[..],
            query_strides: max,
            query_starts: &[0, 1],
            seq_lens: &[8],
            block_tables: &[1],
            block_table_stride: 1,
            alibi_slopes: None,
            sinks: None,
            output: &mut output[..],
            output_strides: max,
            lse: None,
            workspace: &mut workspace,
            plan_is_ready: false,
        })
        .unwrap();
        assert!(output.iter().all(|&x| x > 0.0 && x <= 2.0), "{output:?}");
        let mut running = [0.0];
        cpu.absmax(Absmax {
            input: &input[..],
            strides: max,
            num_tokens: 1,
            num_heads: 1,
            head_dim: 16,
            granularity: Granularity::Tensor,
            running: &mut running[..],
        })
        .unwrap();
        assert_eq!(running, [2.0]);
    }
}
