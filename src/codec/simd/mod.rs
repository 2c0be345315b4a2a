//! The codecs on vector lanes: one algorithm, written once over the operations in [`Simd`].
//!
//! ```text
//! lanes.rs    load and store LANES elements of each format as f32 lanes: the codec itself
//! rows.rs     whole rows: encode, decode, absmax, with their scales and tails
//! avx2.rs avx512.rs neon.rs     [`Simd`] for one instruction set, and `#[target_feature]` shells
//! ```
//! A value of a `Simd` type is the proof that its instruction set may be used: only a shell,
//! itself unsafe to call, makes one. So everything generic is safe code. All of it is
//! `inline(always)`, to end up inside a shell and be compiled for that instruction set.

mod lanes;
mod rows;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "aarch64", test))]
mod neon;
#[cfg(all(test, not(target_arch = "aarch64")))]
mod neon_twin;
#[cfg(test)]
mod tests;

use super::{Codec, Fp8, ScaleRow};
use crate::isa::Isa;
pub(super) use lanes::Lanes;

/// `dst[i] = B(A(src[i]) / scale[i])`; `false` if `isa` has no form here and nothing was done.
///
/// # Safety
/// This machine must be able to run `isa`.
#[inline(always)]
pub(super) unsafe fn encode<A: Lanes, B: Lanes>(isa: Isa, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) -> bool {
    // SAFETY: the caller's promise is the shells' condition.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::encode::<A, B>(src, scale, dst),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::encode::<A, B>(src, scale, dst),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::encode::<A, B>(src, scale, dst),
            _ => return false,
        }
    }
    true
}

/// `dst[i] = B(A(src[i]) * scale[i])`; `false` if `isa` has no form here and nothing was done.
///
/// # Safety
/// This machine must be able to run `isa`.
#[inline(always)]
pub(super) unsafe fn decode<A: Lanes, B: Lanes>(isa: Isa, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) -> bool {
    // SAFETY: the caller's promise is the shells' condition.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::decode::<A, B>(src, scale, dst),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::decode::<A, B>(src, scale, dst),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::decode::<A, B>(src, scale, dst),
            _ => return false,
        }
    }
    true
}

/// The largest |A(src[i]) / scale[i]|; `None` if `isa` has no form here.
///
/// # Safety
/// This machine must be able to run `isa`.
#[inline(always)]
pub(super) unsafe fn absmax<A: Lanes>(isa: Isa, src: &[u8], scale: ScaleRow<'_>) -> Option<f32> {
    // SAFETY: the caller's promise is the shells' condition.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(avx2::absmax::<A>(src, scale)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(avx512::absmax::<A>(src, scale)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Some(neon::absmax::<A>(src, scale)),
            _ => None,
        }
    }
}

/// The vector operations the codecs need, on `LANES` lanes of f32 or u32.
///
/// Memory is bytes, little-endian, unaligned. Arithmetic is IEEE 754 round to nearest even,
/// lane by lane; nothing is fused or flushed.
pub(in crate::codec) trait Simd: Copy {
    /// Lanes of f32.
    type F32: Copy;
    /// Lanes of u32.
    type U32: Copy;
    /// How many.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::F32;
    fn splat_u32(self, x: u32) -> Self::U32;
    fn bits(self, x: Self::F32) -> Self::U32;
    fn floats(self, x: Self::U32) -> Self::F32;

    fn load_u32(self, src: &[u8]) -> Self::U32;
    /// Zero-extends.
    fn load_u16(self, src: &[u8]) -> Self::U32;
    /// Zero-extends.
    fn load_u8(self, src: &[u8]) -> Self::U32;
    fn store_u32(self, x: Self::U32, dst: &mut [u8]);
    /// Every lane must be below 2^16.
    fn store_u16(self, x: Self::U32, dst: &mut [u8]);
    /// Every lane must be below 2^8.
    fn store_u8(self, x: Self::U32, dst: &mut [u8]);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Converts lanes below 2^24, exactly.
    fn to_f32(self, x: Self::U32) -> Self::F32;

    fn and(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn or(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn xor(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn add_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn sub_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn min_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn max_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn shl(self, x: Self::U32, bits: u32) -> Self::U32;
    fn shr(self, x: Self::U32, bits: u32) -> Self::U32;
    /// `if a < b { yes } else { no }`, lane by lane; `a` and `b` must be below 2^31.
    fn select_lt(self, a: Self::U32, b: Self::U32, yes: Self::U32, no: Self::U32) -> Self::U32;

    /// Loads binary16 as [`half::f16::to_f32`] does.
    #[inline(always)]
    fn load_f16(self, src: &[u8]) -> Self::F32 {
        lanes::f16_to_f32(self, self.load_u16(src))
    }
    /// Stores binary16 as [`half::f16::from_f32`] does.
    #[inline(always)]
    fn store_f16(self, x: Self::F32, dst: &mut [u8]) {
        self.store_u16(lanes::f32_to_f16(self, x), dst);
    }
    /// Loads and decodes FP8 codes.
    #[inline(always)]
    fn load_fp8<F: Fp8>(self, src: &[u8]) -> Self::F32 {
        lanes::decode_fp8::<Self, F>(self, self.load_u8(src))
    }
}

/// The `#[target_feature]` functions of one instruction set: where the token is made and the
/// generic code is compiled with the instructions enabled.
macro_rules! shells {
    ($token:expr, $features:literal) => {
        use super::{Lanes, ScaleRow, rows};

        /// # Safety
        /// This machine must have the instruction set.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn encode<A: Lanes, B: Lanes>(src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
            rows::encode::<_, A, B>($token, src, scale, dst);
        }

        /// # Safety
        /// This machine must have the instruction set.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn decode<A: Lanes, B: Lanes>(src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
            rows::decode::<_, A, B>($token, src, scale, dst);
        }

        /// # Safety
        /// This machine must have the instruction set.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn absmax<A: Lanes>(src: &[u8], scale: ScaleRow<'_>) -> f32 {
            rows::absmax::<_, A>($token, src, scale)
        }
    };
}
use shells;
