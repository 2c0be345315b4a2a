//! `PagedKvCache` against values worked out by hand.

#[path = "../testing/devices.rs"]
mod devices;

use std::sync::Arc;

use devices::devices;
use quantkv::args::{AttentionParams, BlockPair, Gather, RowStrides};
use quantkv::cache::{AttentionBatch, AttentionHeads, AttentionIo};
use quantkv::format::Pod;
use quantkv::layout::Half;
use quantkv::memory::BufferLen;
use quantkv::scale::{Granularity, LayerScales, StaticScale};
use quantkv::{Backend, CacheSpec, Error, HostPool, KvFormat, PagedKvCache};

const BLOCK: usize = 8;
const HEADS: usize = 2;
const DIM: usize = 4;

fn spec() -> CacheSpec {
    CacheSpec::new(HEADS, DIM, BLOCK, KvFormat::Fp8E4M3).unwrap()
}

fn rows() -> RowStrides {
    RowStrides::contiguous(HEADS, DIM)
}

/// Runs a test on every device.
macro_rules! on_all {
    ($test:ident) => {
        for device in devices() {
            on_device!(&device, move |backend| $test(backend));
        }
    };
}

fn upload<B: Backend, T: Pod>(backend: &B, data: &[T]) -> B::Buffer<T> {
    let mut buffer = backend.zeros("test data", data.len()).unwrap();
    backend.upload(data, &mut buffer).unwrap();
    buffer
}

fn download<B: Backend, T: Pod>(backend: &B, buffer: &B::Buffer<T>, len: usize) -> Vec<T> {
    let mut data = vec![T::default(); len];
    backend.download(buffer, &mut data).unwrap();
    data
}

/// Writes one token whose K is `k` and whose V is `v` in every channel.
fn write<B: Backend>(cache: &mut PagedKvCache<B>, layer: usize, slot: i64, k: f32, v: f32) {
    try_write(cache, layer, slot, &[k; HEADS * DIM], &[v; HEADS * DIM]).unwrap();
}

fn try_write<B: Backend>(
    cache: &mut PagedKvCache<B>,
    layer: usize,
    slot: i64,
    key: &[f32],
    value: &[f32],
) -> quantkv::Result<()> {
    let backend = Arc::clone(cache.backend());
    let (key, value, slots) = (upload(&*backend, key), upload(&*backend, value), upload(&*backend, &[slot]));
    cache.write(layer, backend.view(&key), rows(), backend.view(&value), rows(), backend.view(&slots))
}

/// New scales of one half from one maximum.
fn update_scales<B: Backend>(
    cache: &mut PagedKvCache<B>,
    layer: usize,
    half: Half,
    absmax: f32,
    divisor: f32,
) -> quantkv::Result<()> {
    let backend = Arc::clone(cache.backend());
    let absmax = upload(&*backend, &[absmax]);
    cache.update_scales(layer, half, backend.view(&absmax), divisor)
}

/// K and V codes of one layer.
fn codes<B: Backend>(cache: &PagedKvCache<B>, layer: usize) -> [Vec<u8>; 2] {
    // Blocks swapped to a pool of their own.
    let blocks = cache.shape().num_blocks as u32;
    let mut host = cache.host_pool(blocks as usize).unwrap();
    let pairs: Vec<_> = (0..blocks).map(|block| BlockPair::new(block, block)).collect();
    cache.swap_out(&mut host, &pairs).unwrap();
    let layer = host.layer_ref(layer).unwrap();
    [layer.k.to_vec(), layer.v.to_vec()]
}

/// The dequantized K and V rows of positions `0..tokens` of a sequence in `blocks`.
fn gather<B: Backend>(cache: &PagedKvCache<B>, layer: usize, blocks: &[i32], tokens: usize) -> (Vec<f32>, Vec<f32>) {
    let (backend, len) = (&**cache.backend(), tokens * HEADS * DIM);
    let (mut key, mut value) = (upload(backend, &vec![f32::NAN; len]), upload(backend, &vec![f32::NAN; len]));
    let (tables, cu_seq_lens) = (upload(backend, blocks), upload(backend, &[0, tokens as i32]));
    let op = Gather {
        shape: *cache.shape(),
        cache: cache.layer_ref(layer).unwrap(),
        k_scale: cache.scale(layer, Half::K).unwrap(),
        v_scale: cache.scale(layer, Half::V).unwrap(),
        block_tables: backend.view(&tables),
        block_table_stride: blocks.len(),
        cu_seq_lens: backend.view(&cu_seq_lens),
        starts: None,
        num_tokens: tokens,
        key: backend.view_mut(&mut key),
        key_strides: rows(),
        value: backend.view_mut(&mut value),
        value_strides: rows(),
    };
    backend.gather::<f32>(op).unwrap();
    (download(backend, &key, len), download(backend, &value, len))
}

#[test]
fn each_layer_rounds_by_its_own_scales() {
    on_all!(each_layer_rounds_by_its_own_scales_on);
}

fn each_layer_rounds_by_its_own_scales_on<B: Backend>(backend: Arc<B>) {
    // E4M3 has eight steps an octave. Nearest to 3.1 is 3.0 (code 0x44; next 3.25), to 3.1 / 16 =
    // 0.19375 it is 0.1875 (0x24; next 0.203125), to 3.1 / 0.7 = 4.43 it is 4.5 (0x49; next 4.0).
    let k = StaticScale::per_head("k", vec![1.0, 16.0]).unwrap();
    let v = StaticScale::per_tensor("v", 0.7).unwrap();
    let mut cache =
        PagedKvCache::new(backend, spec(), 3, &[LayerScales::one(), LayerScales { k: k.clone(), v: v.clone() }])
            .unwrap();
    for layer in [0, 1] {
        // Logical block 0 is block 2; slot 7 is its last.
        write(&mut cache, layer, 2 * 8 + 7, 3.1, 3.1);
    }
    let (key, value) = gather(&cache, 0, &[2], 8);
    assert_eq!((key[7 * 8], key[7 * 8 + 4], value[7 * 8]), (3.0, 3.0, 3.0));
    assert_eq!((key[6 * 8], value[6 * 8]), (0.0, 0.0), "a slot nobody wrote");
    let (key, value) = gather(&cache, 1, &[2], 8);
    assert_eq!((key[7 * 8], key[7 * 8 + 4]), (3.0, 0.1875 * 16.0));
    assert_eq!(value[7 * 8], 4.5 * 0.7);
    let [k_codes, v_codes] = codes(&cache, 1);
    // HND: ((block * heads + head) * block size + slot) * dim.
    let at = |head: usize| ((2 * HEADS + head) * BLOCK + 7) * DIM;
    assert_eq!((k_codes[at(0)], k_codes[at(1)], v_codes[at(1)]), (0x44, 0x24, 0x49));
    assert_eq!(cache.scales(1).unwrap(), LayerScales { k: k.clone(), v: v.clone() });
}

#[test]
fn attends_over_what_was_written() {
    on_all!(attends_over_what_was_written_on);
}

fn attends_over_what_was_written_on<B: Backend>(backend: Arc<B>) {
    let mut cache = PagedKvCache::new(Arc::clone(&backend), spec(), 2, &[LayerScales::one()]).unwrap();
    // Position 0 in block 1, position 8 in block 0, zeros between: their scores are 0, the
    // ninth's is 4 * 2 * scale = ln 8, so its weight is 8 of 16.
    for slot in 8..16 {
        write(&mut cache, 0, slot, 0.0, 1.0);
    }
    write(&mut cache, 0, 0, 2.0, 3.0);
    let heads = AttentionHeads::new(4, AttentionParams::new(8f32.ln() / 8.0));
    let (starts, lens, tables) = (upload(&*backend, &[0, 1]), upload(&*backend, &[9]), upload(&*backend, &[1, 0]));
    let batch = AttentionBatch::<B> {
        num_tokens: 1,
        max_query_len: None,
        query_starts: backend.view(&starts),
        seq_lens: backend.view(&lens),
        block_tables: backend.view(&tables),
        block_table_stride: 2,
    };
    let strides = RowStrides::contiguous(4, DIM);
    let query = upload(&*backend, &[1.0; 16]);
    let (mut output, mut lse) = (upload(&*backend, &[f32::NAN; 16]), upload(&*backend, &[f32::NAN; 4]));
    let mut workspace = backend.zeros("workspace", cache.workspace_len(4, 1)).unwrap();
    let io = AttentionIo::<B, f32> {
        query: backend.view(&query),
        query_strides: strides,
        output: backend.view_mut(&mut output),
        output_strides: strides,
        lse: Some(backend.view_mut(&mut lse)),
        workspace: backend.view_mut(&mut workspace),
        plan_is_ready: false,
    };
    cache.attend(0, &batch, &heads, io).unwrap();
    let (output, lse) = (download(&*backend, &output, 16), download(&*backend, &lse, 4));
    // A handful of f32 operations, each within one rounding.
    let close = |x: f32, y: f32| (x - y).abs() <= 8.0 * f32::EPSILON * y;
    assert!(output.iter().all(|&x| close(x, 2.0)), "{output:?}");
    assert!(lse.iter().all(|&x| close(x, 16f32.ln())), "{lse:?}");
}

#[test]
fn copies_and_swaps_move_all_layers_and_dynamic_scales() {
    on_all!(copies_and_swaps_move_all_layers_and_dynamic_scales_on);
}

fn copies_and_swaps_move_all_layers_and_dynamic_scales_on<B: Backend>(backend: Arc<B>) {
    let spec = spec().with_dynamic_scales().unwrap();
    let mut cache = PagedKvCache::new(backend, spec, 4, &[LayerScales::one(), LayerScales::one()]).unwrap();
    let mut host = cache.host_pool(2).unwrap();
    for slot in 0..16 {
        for layer in [0, 1] {
            write(&mut cache, layer, slot, 1.0 + slot as f32, -10.0 * (1 + layer) as f32 - slot as f32);
        }
    }
    // A row of equal values is the largest code times absmax/448: exact up to one rounding.
    let same = |got: &[f32], want: f32| got.iter().all(|x| (x - want).abs() <= f32::EPSILON * want.abs());
    let check = |cache: &PagedKvCache<B>, blocks: [i32; 2]| {
        for layer in [0, 1] {
            let (key, value) = gather(cache, layer, &blocks, 16);
            for slot in 0..16 {
                let row = slot * HEADS * DIM..(slot + 1) * HEADS * DIM;
                assert!(same(&key[row.clone()], 1.0 + slot as f32), "K of layer {layer} slot {slot}");
                assert!(same(&value[row], -10.0 * (1 + layer) as f32 - slot as f32), "V of {layer}, {slot}");
            }
        }
    };
    check(&cache, [0, 1]);
    cache.copy_blocks(&[BlockPair::new(1, 3)]).unwrap();
    check(&cache, [0, 3]);

    cache.swap_out(&mut host, &[BlockPair::new(0, 1), BlockPair::new(3, 0)]).unwrap();
    let saved: Vec<Vec<u8>> = (0..2).map(|layer| host.layer_ref(layer).unwrap().k.to_vec()).collect();
    for slot in 0..32 {
        for layer in [0, 1] {
            write(&mut cache, layer, slot, 99.0, 99.0);
        }
    }
    cache.swap_in(&host, &[BlockPair::new(1, 2), BlockPair::new(0, 0)]).unwrap();
    check(&cache, [2, 0]);
    let (key, _) = gather(&cache, 0, &[1, 3], 16);
    assert!(same(&key, 99.0), "blocks not named are left alone");
    assert_eq!(saved, (0..2).map(|layer| host.layer_ref(layer).unwrap().k.to_vec()).collect::<Vec<_>>());
}

#[test]
fn scales_are_replaced_and_computed_on_the_device() {
    on_all!(scales_are_replaced_and_computed_on_the_device_on);
}

fn scales_are_replaced_and_computed_on_the_device_on<B: Backend>(backend: Arc<B>) {
    let mut cache = PagedKvCache::new(backend, spec(), 1, &[LayerScales::one(), LayerScales::one()]).unwrap();
    write(&mut cache, 1, 0, 3.0, 3.0);
    // The bytes stay, so new scales change what they mean.
    let per_channel = StaticScale::per_channel("k", DIM, (1..=8).map(|x| x as f32).collect()).unwrap();
    let scales = LayerScales { k: per_channel.clone(), v: StaticScale::per_tensor("v", 0.5).unwrap() };
    cache.set_scales(1, &scales).unwrap();
    assert_eq!((cache.scales(0).unwrap(), cache.scales(1).unwrap()), (LayerScales::one(), scales));
    let (key, value) = gather(&cache, 1, &[0], 1);
    assert_eq!(key, [3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0, 24.0]);
    assert_eq!(value, [1.5; 8]);

    update_scales(&mut cache, 0, Half::K, 50.0, 200.0).unwrap();
    update_scales(&mut cache, 0, Half::V, 0.0, 100.0).unwrap();
    let computed = cache.scales(0).unwrap();
    assert_eq!((computed.k.values(), computed.v.values()), (&[0.25f32][..], &[1.0f32][..]));
    assert!(matches!(update_scales(&mut cache, 1, Half::K, 1.0, 200.0), Err(Error::LengthMismatch { .. })));
}

#[test]
fn counts_its_bytes() {
    on_all!(counts_its_bytes_on);
}

fn counts_its_bytes_on<B: Backend>(backend: Arc<B>) {
    let backend = &backend;
    let one = vec![LayerScales::one(); 3];
    // 2 heads * 4 channels * (K + V) = 16 bytes a token and layer.
    let cache = PagedKvCache::new(Arc::clone(backend), spec(), 5, &one).unwrap();
    assert_eq!((cache.bytes_per_token(), cache.bytes(), cache.num_layers()), (48, 48 * 5 * 8, 3));
    // Dynamic scales add 2 heads * 2 * 4 bytes.
    let dynamic = PagedKvCache::new(Arc::clone(backend), spec().with_dynamic_scales().unwrap(), 5, &one).unwrap();
    assert_eq!(dynamic.bytes_per_token(), 96);
    let held: usize = (0..3)
        .map(|layer| {
            let layer = dynamic.layer_ref(layer).unwrap();
            let floats = layer.k_dynamic.unwrap().buffer_len() + layer.v_dynamic.unwrap().buffer_len();
            layer.k.buffer_len() + layer.v.buffer_len() + 4 * floats
        })
        .sum();
    assert_eq!(dynamic.bytes(), held);
    assert_eq!(HostPool::new(spec(), 3, 7).unwrap().num_layers(), 3);
}

#[test]
fn errors_name_the_layer_and_the_tensor() {
    on_all!(errors_name_the_layer_and_the_tensor_on);
}

fn errors_name_the_layer_and_the_tensor_on<B: Backend + std::fmt::Debug>(backend: Arc<B>) {
    let backend = &backend;
    let bad_k = LayerScales { k: StaticScale::per_head("k", vec![1.0; 3]).unwrap(), v: StaticScale::one() };
    let bad_v = LayerScales {
        k: StaticScale::per_tensor("k", 9.0).unwrap(),
        v: StaticScale::per_channel("v", 2, vec![1.0; 8]).unwrap(),
    };
    let error = PagedKvCache::new(Arc::clone(backend), spec(), 1, &[LayerScales::one(), bad_k]).unwrap_err();
    assert_eq!(error.to_string(), "layer 1: the number of K scales must be 2, it is 3");
    let mut cache = PagedKvCache::new(Arc::clone(backend), spec(), 1, &[LayerScales::one()]).unwrap();
    let error = cache.set_scales(0, &bad_v).unwrap_err();
    assert!(matches!(&error, Error::InLayer { layer: 0, .. }), "{error:?}");
    assert!(error.to_string().starts_with("layer 0: ") && error.to_string().contains("V scales"), "{error}");
    assert_eq!(cache.scales(0).unwrap(), LayerScales::one(), "refused scales change neither half");
    assert_eq!(cache.scale(0, Half::K).unwrap().strides, Granularity::Tensor.strides(DIM));

    // A device may be told to compute scales from anything; reading them back checks them.
    update_scales(&mut cache, 0, Half::V, f32::MAX, 1.0).unwrap();
    assert_eq!(cache.scales(0).unwrap().v.values(), [f32::MAX]);

    assert!(matches!(PagedKvCache::new(Arc::clone(backend), spec(), 1, &[]), Err(Error::Zero { .. })));
    assert!(matches!(HostPool::new(spec(), 0, 1), Err(Error::Zero { .. })));
    assert!(matches!(HostPool::new(spec(), usize::MAX / 4, 1), Err(Error::Overflow { .. })));
    let beyond = |error| matches!(error, Error::LayerOutOfRange { layer: 1, num_layers: 1 });
    assert!(beyond(cache.layer_ref(1).unwrap_err()));
    assert!(beyond(cache.layer_mut(1).unwrap_err()));
    assert!(beyond(cache.scale(1, Half::K).unwrap_err()));
    assert!(beyond(cache.set_scales(1, &LayerScales::one()).unwrap_err()));
    assert!(beyond(try_write(&mut cache, 1, 0, &[0.0; 8], &[0.0; 8]).unwrap_err()));
    let short = try_write(&mut cache, 0, 0, &[0.0; 7], &[0.0; 8]).unwrap_err();
    assert!(matches!(short, Error::BufferTooSmall { what: "key", needed: 8, got: 7 }));

    let mut other = HostPool::new(CacheSpec::new(HEADS, DIM, 16, KvFormat::Fp8E4M3).unwrap(), 1, 1).unwrap();
    assert!(matches!(cache.swap_out(&mut other, &[]), Err(Error::GeometryMismatch { .. })));
    let mut layers = HostPool::new(spec(), 2, 1).unwrap();
    assert!(matches!(cache.swap_out(&mut layers, &[]), Err(Error::LengthMismatch { .. })));
    let mut host = HostPool::new(spec(), 1, 2).unwrap();
    let outside = cache.swap_out(&mut host, &[BlockPair::new(0, 2)]).unwrap_err();
    assert!(matches!(outside, Error::BlockOutOfRange { block: 2, num_blocks: 2, .. }));
    let outside = cache.swap_in(&host, &[BlockPair::new(1, 1)]).unwrap_err();
    assert!(matches!(outside, Error::BlockOutOfRange { block: 1, num_blocks: 1, .. }));
    let twice = cache.copy_blocks(&[BlockPair::new(0, 0)]).unwrap_err();
    assert!(matches!(twice, Error::OverlappingPairs { block: 0, .. }));
}
