//! Random cases. Shapes are proptest strategies, so that a failure shrinks to a small one; the
//! numbers inside follow from a seed, so that a case prints in a few lines.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use quantkv::args::RowStrides;
use quantkv::layout::Half;
use quantkv::{CacheLayout, DType, KvFormat};

use super::formats::{bytes_of, round_to};
use super::geometry::{Geometry, Layer, Scales};
use super::rows::Rows;

/// `cases` cases from a fixed seed, so that `cargo test` is the same everywhere. To explore, set
/// `PROPTEST_CASES`, `PROPTEST_RNG_SEED` or both; with the first alone the seed is random.
pub fn config(cases: u32) -> Config {
    let explore = |name| std::env::var_os(name).is_some();
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if !explore("PROPTEST_CASES") {
        config.cases = cases;
    }
    if !explore("PROPTEST_CASES") && !explore("PROPTEST_RNG_SEED") {
        config.rng_seed = RngSeed::Fixed(0x51);
    }
    config
}

/// splitmix64: small, good enough, and the same on every platform.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.bits() % 100 < percent
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Roughly normal: the sum of four uniforms.
    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit()).sum::<f32>() * 0.87
    }

    /// Mostly ordinary numbers; one in four from where rounding, saturation and sign go wrong.
    pub fn any_activation(&mut self) -> f32 {
        if self.chance(75) {
            return self.normal() * 4.0;
        }
        const SPECIAL: [f32; 20] = [
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e-8,
            -3e-5,
            65504.0,
            -1e30,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-45,
            448.0,
            -464.0,
            465.0,
            57344.0,
            61441.0,
            -240.0,
            248.0,
            0.0009765625,
        ];
        match self.below(4) {
            0 => SPECIAL[self.below(SPECIAL.len())],
            // Any bit pattern: NaN payloads of both signs, subnormals, huge values.
            1 => f32::from_bits(self.bits() as u32),
            // Halfway between two E4M3 (17/16) or E5M2 (9/8) neighbours: ties.
            2 => (1.0 + self.below(16) as f32 / 16.0) * 2f32.powi(self.below(30) as i32 - 18),
            _ => -(1.0 + self.below(8) as f32 / 8.0) * 2f32.powi(self.below(36) as i32 - 20),
        }
    }

    /// A valid static scale: often ordinary, sometimes extreme.
    pub fn any_scale(&mut self) -> f32 {
        const ODD: [f32; 6] = [1.0, 0.0131, 3.0, f32::MIN_POSITIVE, 1e-45, 1e30];
        if self.chance(80) { 2f32.powf(self.unit() * 6.0) } else { ODD[self.below(ODD.len())] }
    }

    /// A scale that keeps attention scores of order one.
    pub fn mild_scale(&mut self) -> f32 {
        2f32.powf(self.unit() * 3.0)
    }
}

pub fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

pub fn format() -> impl Strategy<Value = KvFormat> {
    // FP8 twice as often as the rest.
    prop_oneof![
        6 => prop_oneof![Just(KvFormat::Fp8E4M3), Just(KvFormat::Fp8E5M2), Just(KvFormat::Fp8E4M3Fnuz)],
        3 => prop_oneof![Just(KvFormat::F32), Just(KvFormat::F16), Just(KvFormat::BF16)],
    ]
}

/// Head dims: small ones, the tuned ones and their neighbours, and 46 (13 heads x 46).
pub fn head_dim() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..=40,
        3 => prop::sample::select(vec![46usize, 64, 65, 80, 96, 127, 128]),
        1 => prop::sample::select(vec![192usize, 256, 511, 512]),
    ]
}

/// Any geometry the library supports, small enough to check by naive loops.
pub fn geometry() -> impl Strategy<Value = Geometry> {
    let layout = prop::sample::select(CacheLayout::ALL.to_vec());
    let block_size = prop_oneof![6 => prop::sample::select(vec![8usize, 16, 32]), 1 => Just(64usize), 1 => Just(256)];
    let heads = prop_oneof![8 => 1usize..=4, 1 => Just(13usize)];
    let dims = (head_dim(), head_dim(), any::<bool>());
    let gaps = prop_oneof![Just((0usize, 0usize)), (0usize..40, 0usize..40)];
    (layout, block_size, heads, dims, (format(), format()), any::<bool>(), 1usize..=6, gaps, any::<bool>()).prop_map(
        |(layout, block_size, heads, (k_dim, v_dim, same), (k_format, v_format), dynamic, blocks, gaps, tail)| {
            // The packed layout wants whole 16-byte chunks of K.
            let x = if layout == CacheLayout::VllmPacked { 16 / bytes_of(k_format) } else { 1 };
            let k_dim = k_dim.next_multiple_of(x).min(512);
            let v_dim = if same { k_dim } else { v_dim };
            // Bound the elements of a case.
            let row = heads * k_dim.max(v_dim);
            let num_blocks = blocks.min((60_000 / (block_size * row)).max(1));
            let dynamic = dynamic && (bytes_of(k_format) == 1 || bytes_of(v_format) == 1);
            Geometry {
                layout,
                block_size,
                heads,
                k_dim,
                v_dim,
                k_format,
                v_format,
                dynamic,
                num_blocks,
                k_gap: gaps.0,
                v_gap: gaps.1,
                tail: if tail { 64 } else { 0 },
            }
        },
    )
}

/// Padding of a `[tokens, heads, dim]` tensor: (after a head, after a token, after the last row).
pub type Padding = (usize, usize, usize);

pub fn padding() -> impl Strategy<Value = Padding> {
    prop_oneof![Just((0, 0, 0)), (0usize..5, 0usize..70, 0usize..9)]
}

/// A tensor with these paddings, every element (padding too) from `next`, rounded to `dtype`.
pub fn rows(
    (tokens, heads, dim): (usize, usize, usize),
    (head_gap, token_gap, tail): Padding,
    dtype: DType,
    mut next: impl FnMut() -> f32,
) -> Rows {
    let head = dim + head_gap;
    let token = heads * head + token_gap;
    // The last row ends with its last channel: a kernel may not assume the gap is there.
    let len = if tokens == 0 { 0 } else { (tokens - 1) * token + (heads - 1) * head + dim };
    let data = (0..len + tail).map(|_| round_to(dtype, next().into())).collect();
    Rows { data, strides: RowStrides { token, head } }
}

/// How static scales are laid out.
#[derive(Clone, Copy, Debug)]
pub enum ScaleKind {
    Tensor,
    Head,
    Channel,
    /// Per channel, the same for every head: strides (0, 1).
    SharedChannel,
    /// Per channel in a padded tensor: strides (2 dim + 3, 2).
    Padded,
}

pub fn scale_kind() -> impl Strategy<Value = ScaleKind> {
    use ScaleKind::*;
    prop::sample::select(vec![Tensor, Head, Channel, SharedChannel, Padded])
}

pub fn scales(kind: ScaleKind, heads: usize, dim: usize, mut next: impl FnMut() -> f32) -> Scales {
    let (head, channel) = match kind {
        ScaleKind::Tensor => (0, 0),
        ScaleKind::Head => (1, 0),
        ScaleKind::Channel => (dim, 1),
        ScaleKind::SharedChannel => (0, 1),
        ScaleKind::Padded => (2 * dim + 3, 2),
    };
    let len = (heads - 1) * head + (dim - 1) * channel + 1;
    Scales { values: (0..len).map(|_| next()).collect(), head, channel }
}

/// Random bytes everywhere: any code, NaN and infinities among them.
pub fn any_layer(geometry: &Geometry, rng: &mut Rng) -> Layer {
    let mut other = Rng::new(rng.bits());
    Layer::filled(geometry, || rng.bits() as u8, || other.any_scale())
}

/// Writes finite values of order one to a slot of every head, K and V, with dynamic scales.
pub fn fill_slot(geometry: &Geometry, layer: &mut Layer, (block, slot): (usize, usize), rng: &mut Rng) {
    for half in [Half::K, Half::V] {
        for head in 0..geometry.heads {
            let at = geometry.dynamic_index(block, head, slot);
            if let Some(scales) = layer.dynamic_mut(half) {
                scales[at] = rng.mild_scale();
            }
            for d in 0..geometry.dim(half) {
                let x = rng.normal();
                layer.store(geometry, half, (block, head, slot, d), x);
            }
        }
    }
}
