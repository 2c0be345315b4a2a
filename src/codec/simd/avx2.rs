//! AVX2 with F16C: 8 lanes.

use std::arch::x86_64::*;

use super::{Simd, shells};

shells!(Avx2(()), "avx2,fma,f16c");

/// Proof that AVX2, FMA and F16C may be used.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// One register operation. The intrinsics are safe but for needing the instruction set.
macro_rules! op {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $ret {
            // SAFETY: `self` exists only where the instruction set does.
            unsafe { $body }
        }
    )*};
}

impl Simd for Avx2 {
    type F32 = __m256;
    type U32 = __m256i;
    const LANES: usize = 8;

    op! {
        splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
        splat_u32(x: u32) -> __m256i { _mm256_set1_epi32(x as i32) }
        bits(x: __m256) -> __m256i { _mm256_castps_si256(x) }
        floats(x: __m256i) -> __m256 { _mm256_castsi256_ps(x) }

        add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        div(a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        min(a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
        max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        to_f32(x: __m256i) -> __m256 { _mm256_cvtepi32_ps(x) }

        and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        xor(a: __m256i, b: __m256i) -> __m256i { _mm256_xor_si256(a, b) }
        add_u32(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        sub_u32(a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi32(a, b) }
        min_u32(a: __m256i, b: __m256i) -> __m256i { _mm256_min_epu32(a, b) }
        max_u32(a: __m256i, b: __m256i) -> __m256i { _mm256_max_epu32(a, b) }
        shl(x: __m256i, bits: u32) -> __m256i { _mm256_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
        shr(x: __m256i, bits: u32) -> __m256i { _mm256_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
        select_lt(a: __m256i, b: __m256i, yes: __m256i, no: __m256i) -> __m256i {
            _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a))
        }
    }

    #[inline(always)]
    fn load_u32(self, src: &[u8]) -> __m256i {
        let src = &src[..32];
        // SAFETY: 32 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm256_loadu_si256(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u16(self, src: &[u8]) -> __m256i {
        let src = &src[..16];
        // SAFETY: 16 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8]) -> __m256i {
        let src = &src[..8];
        // SAFETY: 8 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_f16(self, src: &[u8]) -> __m256 {
        let src = &src[..16];
        // SAFETY: 16 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_u32(self, x: __m256i, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        // SAFETY: 32 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn store_u16(self, x: __m256i, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: 16 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe {
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            _mm_storeu_si128(dst.as_mut_ptr().cast(), packed);
        }
    }
    #[inline(always)]
    fn store_u8(self, x: __m256i, dst: &mut [u8]) {
        let dst = &mut dst[..8];
        // SAFETY: 8 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe {
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            _mm_storel_epi64(dst.as_mut_ptr().cast(), _mm_packus_epi16(packed, packed));
        }
    }
    #[inline(always)]
    fn store_f16(self, x: __m256, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: 16 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
}
