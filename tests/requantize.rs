//! Requantizing blocks to new static scales, on every device: the codes are the oracle's to the bit, values
//! move by no more than `docs/numerics.md` says, in f64, and what was not named stays.

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use std::sync::Arc;

use devices::{devices, emulated};
use oracle::formats::{bytes_of, encode_fp8, load, quantized};
use oracle::geometry::Geometry;
use oracle::strategy::Rng;
use quantkv::args::BlockPair;
use quantkv::layout::Half;
use quantkv::scale::{Granularity, LayerScales, StaticScale, covering_scale};
use quantkv::{Backend, CacheLayout, Error, HostPool, KvFormat, PagedKvCache};

const FP8: [KvFormat; 3] = [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz];

/// Mantissa bits, exponent of the smallest normal and of the smallest subnormal: `docs/numerics.md`.
fn bits_of(format: KvFormat) -> (i32, i32, i32) {
    match format {
        KvFormat::Fp8E4M3 => (3, -6, -9),
        KvFormat::Fp8E5M2 => (2, -14, -16),
        KvFormat::Fp8E4M3Fnuz => (3, -7, -10),
        other => panic!("{other}"),
    }
}

/// How far a finite element may move, in f64: see "Requantize" in `docs/numerics.md`.
fn bound(format: KvFormat, value: f64, old: f32, new: f32) -> f64 {
    let (mantissa, normal, subnormal) = bits_of(format);
    let [old, new] = [old, new].map(f64::from);
    let is_power_of_two = (new / old).log2().fract() == 0.0;
    if value.abs() >= new * 2f64.powi(normal) && is_power_of_two {
        return 0.0;
    }
    let half_step = (value.abs() * 2f64.powi(-mantissa - 1)).max(new * 2f64.powi(subnormal - 1));
    // The product and the quotient are each rounded to f32 before they are encoded.
    half_step + value.abs() * 3.0 * 2f64.powi(-24)
}

struct Case {
    geometry: Geometry,
    /// The codes of K and V of the only layer.
    codes: [Vec<u8>; 2],
    old: LayerScales,
    new: LayerScales,
}

/// Scales of `granularity`, powers of two or any, around 0.05.
fn scales(rng: &mut Rng, granularity: Granularity, g: &Geometry, half: Half, power_of_two: bool) -> StaticScale {
    let count = granularity.len(g.heads, g.dim(half));
    let values = (0..count).map(|_| {
        let power = 2f32.powi(rng.below(6) as i32 - 7);
        if power_of_two { power } else { power * (1.0 + rng.below(1000) as f32 / 1000.0) }
    });
    let values: Vec<f32> = values.collect();
    match granularity {
        Granularity::Tensor => StaticScale::per_tensor("test", values[0]).unwrap(),
        Granularity::Head => StaticScale::per_head("test", values).unwrap(),
        Granularity::Channel => StaticScale::per_channel("test", g.dim(half), values).unwrap(),
    }
}

/// Scales times a growth of their own each.
fn grown(rng: &mut Rng, scale: &StaticScale, power_of_two: bool) -> StaticScale {
    let values = scale.values().iter().map(|value| {
        let power = 2f32.powi(rng.below(5) as i32);
        value * if power_of_two { power } else { power * (1.0 + rng.below(1000) as f32 / 1000.0) }
    });
    scale.with_values("test", values.collect()).unwrap()
}

impl Case {
    fn new(rng: &mut Rng, geometry: Geometry, granularity: Granularity, power_of_two: bool) -> Self {
        let mut codes = |half| {
            let format = geometry.format(half);
            let bytes = geometry.num_slots() * geometry.heads * geometry.dim(half) * bytes_of(format);
            // What cache_write writes: any code but infinities; in an unquantized half any finite value.
            let mut codes: Vec<u8> = (0..bytes).map(|_| rng.bits() as u8).collect();
            for code in codes.chunks_exact_mut(bytes_of(format)) {
                if quantized(format) {
                    code[0] = encode_fp8(format, load(format, code));
                } else {
                    code[bytes_of(format) - 1] &= 0x3f;
                }
            }
            codes
        };
        let codes = [codes(Half::K), codes(Half::V)];
        let old = LayerScales {
            k: scales(rng, granularity, &geometry, Half::K, power_of_two),
            v: scales(rng, granularity, &geometry, Half::V, power_of_two),
        };
        let new = LayerScales { k: grown(rng, &old.k, power_of_two), v: grown(rng, &old.v, power_of_two) };
        Case { geometry, codes, old, new }
    }

    /// Checks the codes of K and V afterwards; how many are others than before.
    fn check(&self, after: &[Vec<u8>; 2], blocks: &[u32]) -> usize {
        let g = &self.geometry;
        let mut moved = 0;
        for (half, before, after) in [(Half::K, &self.codes[0], &after[0]), (Half::V, &self.codes[1], &after[1])] {
            let format = g.format(half);
            let (old, new) = if half == Half::K { (&self.old.k, &self.new.k) } else { (&self.old.v, &self.new.v) };
            for block in 0..g.num_blocks {
                for (head, slot, d) in elements(g, half) {
                    let at = g.element(half, block, head, slot, d);
                    let (was, is) = (&before[at.clone()], &after[at]);
                    if !quantized(format) || !blocks.contains(&(block as u32)) {
                        assert_eq!(was, is, "{half:?} of block {block} is not to change");
                        continue;
                    }
                    let (old, new) = (old.get(head, d), new.get(head, d));
                    let value = load(format, was);
                    assert_eq!(is[0], encode_fp8(format, value * old / new), "{format} {value} * {old} / {new}");
                    if value.is_nan() {
                        assert!(load(format, is).is_nan());
                        continue;
                    }
                    let value = f64::from(value) * f64::from(old);
                    let error = (f64::from(load(format, is)) * f64::from(new) - value).abs();
                    let bound = bound(format, value, old, new);
                    assert!(error <= bound, "{format} {value} under {old}, then {new}: {error} > {bound}");
                    moved += usize::from(is != was);
                }
            }
        }
        moved
    }
}

fn elements(g: &Geometry, half: Half) -> impl Iterator<Item = (usize, usize, usize)> {
    let (heads, block_size, dim) = (g.heads, g.block_size, g.dim(half));
    (0..heads).flat_map(move |h| (0..block_size).flat_map(move |s| (0..dim).map(move |d| (h, s, d))))
}

fn cases() -> Vec<Case> {
    let mut rng = Rng::new(2026);
    let mut cases = Vec::new();
    let formats = FP8.into_iter().map(|format| (format, format));
    for (index, (k_format, v_format)) in formats.chain([(KvFormat::Fp8E4M3, KvFormat::BF16)]).enumerate() {
        for (layout, granularity) in
            CacheLayout::ALL.into_iter().zip([Granularity::Head, Granularity::Channel, Granularity::Tensor])
        {
            // 1024 rows are dense at a time: in blocks of 256 there are more.
            let (block_size, num_blocks) = if index == 0 && !emulated() { (256, 7) } else { (16, 5) };
            let plain = Geometry::plain(layout, (2, 16), (block_size, num_blocks), k_format);
            let geometry = Geometry { v_dim: 24, v_format, ..plain };
            for power_of_two in [true, false] {
                cases.push(Case::new(&mut rng, geometry, granularity, power_of_two));
            }
        }
    }
    cases
}

/// A host pool with the case's codes, block for block.
fn host(case: &Case) -> HostPool {
    let shape = case.geometry.shape();
    let mut host = HostPool::new(shape.spec, 1, shape.num_blocks).unwrap();
    let layer = host.layer_mut(0).unwrap();
    layer.k.copy_from_slice(&case.codes[0]);
    layer.v.copy_from_slice(&case.codes[1]);
    host
}

fn all_pairs(blocks: usize) -> Vec<BlockPair> {
    (0..blocks as u32).map(|block| BlockPair::new(block, block)).collect()
}

fn held(host: &HostPool) -> [Vec<u8>; 2] {
    let layer = host.layer_ref(0).unwrap();
    [layer.k.to_vec(), layer.v.to_vec()]
}

#[test]
fn codes_are_the_oracles_and_values_stay_within_the_bound() {
    for device in devices() {
        on_device!(&device, move |backend| check_cases(backend));
    }
}

fn check_cases<B: Backend>(backend: Arc<B>) {
    let (cases, mut changed) = (cases(), 0);
    for case in &cases {
        let blocks = case.geometry.num_blocks;
        let spec = case.geometry.shape().spec;
        let mut cache = PagedKvCache::new(Arc::clone(&backend), spec, blocks, std::slice::from_ref(&case.old)).unwrap();
        cache.swap_in(&host(case), &all_pairs(blocks)).unwrap();
        let identity = Arc::clone(cache.identity());
        // In no order, one of them twice, and not block 1.
        let named: Vec<u32> = (0..blocks as u32).rev().filter(|block| *block != 1).chain([0]).collect();
        cache.requantize(0, &case.new, &named).unwrap();
        assert_eq!(cache.scales(0).unwrap(), case.new);
        assert!(Arc::ptr_eq(&identity, cache.identity()), "scales keep their buffers: graphs read them");
        let mut after = HostPool::new(spec, 1, blocks).unwrap();
        cache.swap_out(&mut after, &all_pairs(blocks)).unwrap();
        changed += usize::from(case.check(&held(&after), &named) > 0);
        assert!(backend.faults().unwrap().is_empty());

        // Blocks in host memory get the same codes.
        let mut swapped = host(case);
        swapped.requantize(0, &case.old, &case.new, &named).unwrap();
        assert!(held(&swapped) == held(&after), "host memory and the device differ");
    }
    // Where a scale is for the whole tensor it may have grown by a factor of one.
    assert!(changed * 4 > cases.len() * 3, "{changed} of {} cases requantized anything", cases.len());
}

/// From every value any number of growths, one binade or several at a time, costs less than a subnormal
/// step of the last scale against what was first written; what ends normal is what the last scale would
/// have made of the original.
#[test]
fn growing_again_and_again_costs_less_than_one_subnormal_step() {
    for device in devices() {
        on_device!(&device, move |backend| grow_again_and_again(backend));
    }
}

fn grow_again_and_again<B: Backend>(backend: Arc<B>) {
    let mut rng = Rng::new(7);
    for format in FP8 {
        let (_, normal, subnormal) = bits_of(format);
        let geometry = Geometry::plain(CacheLayout::Hnd, (2, 64), (16, 3), format);
        let spec = geometry.shape().spec;
        let mut scale = 2f32.powi(-9);
        let layer = |scale: f32| {
            let scale = StaticScale::per_tensor("test", scale).unwrap();
            LayerScales { k: scale.clone(), v: scale }
        };
        let original: Vec<f32> = (0..3 * 16 * 2 * 64)
            .map(|_| {
                format.max_finite()
                    * scale
                    * 2f32.powi(-(rng.below(28) as i32))
                    * (rng.below(2001) as f32 / 1000.0 - 1.0)
            })
            .collect();
        // HND and a block's tokens in order: the codes lie as `original` does.
        let first: Vec<u8> = original.iter().map(|x| encode_fp8(format, x / scale)).collect();
        let case = Case { geometry, codes: [first.clone(), first.clone()], old: layer(scale), new: layer(scale) };
        let mut cache = PagedKvCache::new(Arc::clone(&backend), spec, 3, &[layer(scale)]).unwrap();
        cache.swap_in(&host(&case), &all_pairs(3)).unwrap();
        for binades in [1, 1, 2, 1, 3] {
            scale *= 2f32.powi(binades);
            cache.requantize(0, &layer(scale), &[0, 1, 2]).unwrap();
        }
        let mut after = HostPool::new(spec, 1, 3).unwrap();
        cache.swap_out(&mut after, &all_pairs(3)).unwrap();
        let [k, v] = held(&after);
        assert_eq!(k, v);
        let step = f64::from(scale) * 2f64.powi(subnormal);
        let (mut normals, mut subnormals) = (0, 0);
        for ((&x, &was), &is) in original.iter().zip(&first).zip(&k) {
            let value = f64::from(load(format, &[was])) * f64::from(2f32.powi(-9));
            let kept = f64::from(load(format, &[is])) * f64::from(scale);
            assert!((kept - value).abs() < step, "{format}: {value} became {kept}");
            if value.abs() >= f64::from(scale) * 2f64.powi(normal) {
                assert_eq!((is, kept), (encode_fp8(format, x / scale), value), "{format}: {x}");
                normals += 1;
            } else {
                subnormals += 1;
            }
        }
        assert!(normals > 100 && subnormals > 100, "{normals} {subnormals}");
    }
}

#[test]
fn what_is_wrong_changes_nothing() {
    for device in devices() {
        on_device!(&device, move |backend| refuse(backend));
    }
}

fn refuse<B: Backend>(backend: Arc<B>) {
    let case = &cases()[2];
    let spec = case.geometry.shape().spec;
    let blocks = case.geometry.num_blocks;
    let mut cache = PagedKvCache::new(backend, spec, blocks, std::slice::from_ref(&case.old)).unwrap();
    cache.swap_in(&host(case), &all_pairs(blocks)).unwrap();
    let three = LayerScales { k: StaticScale::per_head("k", vec![1.0; 3]).unwrap(), v: case.new.v.clone() };
    let outside = blocks as u32;
    let mut swapped = host(case);
    assert!(matches!(cache.requantize(1, &case.new, &[0]), Err(Error::LayerOutOfRange { .. })));
    assert!(matches!(swapped.requantize(1, &case.old, &case.new, &[0]), Err(Error::LayerOutOfRange { .. })));
    assert!(matches!(cache.requantize(0, &three, &[0]), Err(Error::InLayer { layer: 0, .. })));
    assert!(matches!(swapped.requantize(0, &three, &case.new, &[0]), Err(Error::InLayer { layer: 0, .. })));
    let error = cache.requantize(0, &case.new, &[0, outside]).unwrap_err();
    assert!(matches!(error, Error::BlockOutOfRange { what: "requantize", .. }), "{error}");
    assert!(swapped.requantize(0, &case.old, &case.new, &[outside]).is_err());
    assert_eq!(cache.scales(0).unwrap(), case.old);
    let mut after = HostPool::new(spec, 1, blocks).unwrap();
    cache.swap_out(&mut after, &all_pairs(blocks)).unwrap();
    assert!(held(&after) == case.codes && held(&swapped) == case.codes);
    // No block: scales alone, as before the first write; another granularity is another buffer.
    let heads = LayerScales { k: StaticScale::per_head("k", vec![0.5, 0.25]).unwrap(), v: StaticScale::one() };
    cache.requantize(0, &heads, &[]).unwrap();
    assert_eq!(cache.scales(0).unwrap(), heads);
}

#[test]
fn a_covering_scale_is_the_smallest_power_of_two_that_covers() {
    let mut rng = Rng::new(3);
    for format in FP8 {
        for headroom in [1.0f32, 1.25, 3.0] {
            for _ in 0..2000 {
                let absmax = 2f32.powi(rng.below(60) as i32 - 30) * (1.0 + rng.unit());
                let scale = covering_scale(absmax, format, headroom);
                assert_eq!(f64::from(scale).log2().fract(), 0.0, "{scale} is no power of two");
                let wanted = f64::from(absmax) * f64::from(headroom);
                let reach = f64::from(scale) * f64::from(format.max_finite());
                assert!(reach >= wanted && reach < 2.0 * wanted, "{format}: {absmax} * {headroom}, {scale}");
            }
        }
        // Exactly reached is reached; nothing seen is 1; never 0 or infinite.
        assert_eq!(covering_scale(format.max_finite() * 0.25, format, 1.0), 0.25);
        assert_eq!(covering_scale(0.0, format, 1.25), 1.0);
        assert_eq!(covering_scale(f32::MIN_POSITIVE, format, 1.0), f32::MIN_POSITIVE);
        assert!(covering_scale(f32::MAX, format, f32::MAX).is_finite());
    }
}

#[test]
fn granularities_repeat_or_take_the_largest() {
    let heads = StaticScale::per_head("k", vec![0.5, 2.0]).unwrap();
    let tensor = heads.with_granularity(Granularity::Tensor, 2, 3).unwrap();
    assert_eq!((tensor.granularity(), tensor.values()), (Granularity::Tensor, &[2.0][..]));
    let channels = heads.with_granularity(Granularity::Channel, 2, 3).unwrap();
    assert_eq!(channels.values(), [0.5, 0.5, 0.5, 2.0, 2.0, 2.0]);
    let channels = StaticScale::per_channel("k", 3, vec![1.0, 3.0, 2.0, 0.1, 0.2, 0.3]).unwrap();
    assert_eq!(channels.with_granularity(Granularity::Head, 2, 3).unwrap().values(), [3.0, 0.3]);
    assert_eq!(heads.with_granularity(Granularity::Head, 2, 3).unwrap(), heads);
    assert!(matches!(heads.with_granularity(Granularity::Tensor, 3, 3), Err(Error::LengthMismatch { .. })));
    assert!(channels.with_granularity(Granularity::Head, 3, 2).is_err());
}
