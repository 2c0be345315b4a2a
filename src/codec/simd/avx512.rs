//! AVX-512 (F, BW, DQ, VL, VBMI): 16 lanes.

use std::arch::x86_64::*;

use super::{Simd, shells};

shells!(Avx512(()), "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c");

/// Proof that these parts of AVX-512 may be used.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

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

impl Simd for Avx512 {
    type F32 = __m512;
    type U32 = __m512i;
    const LANES: usize = 16;

    op! {
        splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        splat_u32(x: u32) -> __m512i { _mm512_set1_epi32(x as i32) }
        bits(x: __m512) -> __m512i { _mm512_castps_si512(x) }
        floats(x: __m512i) -> __m512 { _mm512_castsi512_ps(x) }

        add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        to_f32(x: __m512i) -> __m512 { _mm512_cvtepi32_ps(x) }

        and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        xor(a: __m512i, b: __m512i) -> __m512i { _mm512_xor_si512(a, b) }
        add_u32(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        sub_u32(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        min_u32(a: __m512i, b: __m512i) -> __m512i { _mm512_min_epu32(a, b) }
        max_u32(a: __m512i, b: __m512i) -> __m512i { _mm512_max_epu32(a, b) }
        shl(x: __m512i, bits: u32) -> __m512i { _mm512_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
        shr(x: __m512i, bits: u32) -> __m512i { _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
        select_lt(a: __m512i, b: __m512i, yes: __m512i, no: __m512i) -> __m512i {
            _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(a, b), no, yes)
        }
    }

    #[inline(always)]
    fn load_u32(self, src: &[u8]) -> __m512i {
        let src = &src[..64];
        // SAFETY: 64 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u16(self, src: &[u8]) -> __m512i {
        let src = &src[..32];
        // SAFETY: 32 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8]) -> __m512i {
        let src = &src[..16];
        // SAFETY: 16 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_f16(self, src: &[u8]) -> __m512 {
        let src = &src[..32];
        // SAFETY: 32 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_u32(self, x: __m512i, dst: &mut [u8]) {
        let dst = &mut dst[..64];
        // SAFETY: 64 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm512_storeu_si512(dst.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn store_u16(self, x: __m512i, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        // SAFETY: 32 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(x)) }
    }
    #[inline(always)]
    fn store_u8(self, x: __m512i, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: 16 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) }
    }
    #[inline(always)]
    fn store_f16(self, x: __m512, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        // SAFETY: 32 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
}
