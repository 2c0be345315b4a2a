//! From f32 to a stored element and back.
//!
//! One type per format implements [`Codec`]; `with_codec!` is the one
//! table that turns a run-time [`KvFormat`] into such a type. The scalar functions here are the
//! specification (`docs/numerics.md`); SIMD forms must give the same bits.

use crate::format::KvFormat;
use half::{bf16, f16};

#[cfg(target_endian = "big")]
compile_error!("cached elements are little-endian in memory; big-endian machines are not supported");

mod fp8;

pub mod e4m3;
pub mod e4m3fnuz;
pub mod e5m2;
#[cfg(feature = "float8")]
mod float8;
mod fnuz;
mod simd;
mod slice;

pub use e4m3::E4M3;
pub use e4m3fnuz::E4M3Fnuz;
pub use e5m2::E5M2;
pub use fnuz::{e4m3_to_fnuz, e4m3_to_fnuz_slice, fnuz_to_e4m3, fnuz_to_e4m3_slice};
pub use fp8::Fp8;
pub use slice::{ScaleRow, absmax_scaled_slice, absmax_slice, decode_slice, encode_slice};
pub(crate) use slice::{as_bytes, as_bytes_mut};

mod sealed {
    pub trait Sealed {}
}

/// A storage format: how one f32 becomes one stored element, and back. Sealed: [`KvFormat`] is its
/// table.
pub trait Codec: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The tag of this format.
    const FORMAT: KvFormat;
    /// Bytes of a stored element.
    const BYTES: usize;
    /// Whether scales apply.
    const QUANTIZED: bool;
    /// The stored bits: `u8`, `u16` or `u32`.
    type Bits: Copy;

    /// Round to nearest even, saturating to the largest finite value; every NaN becomes the
    /// canonical one. Unquantized 16-bit formats round as IEEE 754 does and do not saturate.
    fn encode(x: f32) -> Self::Bits;

    /// Exact.
    fn decode(bits: Self::Bits) -> f32;

    /// Writes the element at `dst[..BYTES]`, little-endian.
    fn store(x: f32, dst: &mut [u8]);

    /// Reads the element at `src[..BYTES]`, little-endian.
    fn load(src: &[u8]) -> f32;
}

/// f32 stored as itself.
#[derive(Clone, Copy, Debug)]
pub struct PlainF32;
/// f32 stored as binary16.
#[derive(Clone, Copy, Debug)]
pub struct PlainF16;
/// f32 stored as bfloat16.
#[derive(Clone, Copy, Debug)]
pub struct PlainBF16;

macro_rules! plain_codec {
    ($ty:ty, $format:expr, $bits:ty, $bytes:literal, |$x:ident| $encode:expr, |$b:ident| $decode:expr) => {
        impl sealed::Sealed for $ty {}

        impl Codec for $ty {
            const FORMAT: KvFormat = $format;
            const BYTES: usize = $bytes;
            const QUANTIZED: bool = false;
            type Bits = $bits;

            #[inline(always)]
            fn encode($x: f32) -> $bits {
                $encode
            }
            #[inline(always)]
            fn decode($b: $bits) -> f32 {
                $decode
            }
            #[inline(always)]
            fn store(x: f32, dst: &mut [u8]) {
                dst[..$bytes].copy_from_slice(&Self::encode(x).to_le_bytes());
            }
            #[inline(always)]
            fn load(src: &[u8]) -> f32 {
                let mut bytes = [0; $bytes];
                bytes.copy_from_slice(&src[..$bytes]);
                Self::decode(<$bits>::from_le_bytes(bytes))
            }
        }
    };
}

plain_codec!(PlainF32, KvFormat::F32, u32, 4, |x| x.to_bits(), |b| f32::from_bits(b));
plain_codec!(PlainF16, KvFormat::F16, u16, 2, |x| f16::from_f32(x).to_bits(), |b| f16::from_bits(b).to_f32());
plain_codec!(PlainBF16, KvFormat::BF16, u16, 2, |x| bf16::from_f32(x).to_bits(), |b| bf16::from_bits(b).to_f32());

/// Runs `$body` with `$C` naming the [`Codec`] of a run-time [`KvFormat`]: the one table of
/// storage formats.
macro_rules! with_codec {
    ($format:expr, $C:ident => $body:expr) => {
        match $format {
            $crate::KvFormat::F32 => {
                type $C = $crate::codec::PlainF32;
                $body
            }
            $crate::KvFormat::F16 => {
                type $C = $crate::codec::PlainF16;
                $body
            }
            $crate::KvFormat::BF16 => {
                type $C = $crate::codec::PlainBF16;
                $body
            }
            $crate::KvFormat::Fp8E4M3 => {
                type $C = $crate::codec::E4M3;
                $body
            }
            $crate::KvFormat::Fp8E5M2 => {
                type $C = $crate::codec::E5M2;
                $body
            }
            $crate::KvFormat::Fp8E4M3Fnuz => {
                type $C = $crate::codec::E4M3Fnuz;
                $body
            }
        }
    };
}
pub(crate) use with_codec;
