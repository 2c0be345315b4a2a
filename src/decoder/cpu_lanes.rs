//! Sixteen f32 lanes, the unit [`super::cpu_linear`] computes in: one AVX-512 register, two AVX2
//! registers, or an array. All give the same bits: fused multiply-add lane by lane, and a fold that
//! adds the upper half to the lower until one is left.

#[cfg(target_arch = "x86_64")]
use crate::format::DType;
use crate::format::Element;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// Sixteen f32.
pub(super) trait Lanes: Copy {
    /// # Safety
    /// The instructions exist.
    unsafe fn zero() -> Self;

    /// Loads and widens 16 elements; no alignment needed.
    ///
    /// # Safety
    /// The instructions exist; `from` is readable for 16 elements.
    unsafe fn load<T: Element>(from: *const T) -> Self;

    /// `a * b + c`, rounded once.
    ///
    /// # Safety
    /// The instructions exist.
    unsafe fn fma(a: Self, b: Self, c: Self) -> Self;

    /// The sum: lanes `l` and `l + 8`, then `l + 4`, `l + 2`, `l + 1`.
    ///
    /// # Safety
    /// The instructions exist.
    unsafe fn fold(self) -> f32;
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load<T: Element>(from: *const T) -> Self {
        // SAFETY: the caller's promise.
        Portable(std::array::from_fn(|lane| unsafe { from.add(lane).read_unaligned() }.to_f32()))
    }

    #[inline(always)]
    unsafe fn fma(a: Self, b: Self, c: Self) -> Self {
        Portable(std::array::from_fn(|lane| a.0[lane].mul_add(b.0[lane], c.0[lane])))
    }

    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{DType, Element, Lanes};

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    /// Two 256-bit registers: lanes 0-7 and 8-15.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    /// The fold from eight lanes on.
    ///
    /// # Safety
    /// AVX exists.
    #[inline(always)]
    unsafe fn fold8(eight: __m256) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            let one = _mm_add_ss(two, _mm_movehdup_ps(two));
            _mm_cvtss_f32(one)
        }
    }

    /// Loads and widens eight elements.
    ///
    /// # Safety
    /// AVX2 and F16C exist; `from` is readable for 8 elements.
    #[inline(always)]
    unsafe fn load8<T: Element>(from: *const T) -> __m256 {
        // SAFETY: the caller's promise; unaligned loads of the element's width.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm256_loadu_ps(from.cast()),
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                DType::BF16 => {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                }
            }
        }
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn load<T: Element>(from: *const T) -> Self {
            // SAFETY: the caller's promise; unaligned loads of the element's width.
            unsafe {
                Avx512(match T::DTYPE {
                    DType::F32 => _mm512_loadu_ps(from.cast()),
                    DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                    DType::BF16 => {
                        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                    }
                })
            }
        }

        #[inline(always)]
        unsafe fn fma(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_fmadd_ps(a.0, b.0, c.0) })
        }

        #[inline(always)]
        unsafe fn fold(self) -> f32 {
            // SAFETY: the caller's promise.
            unsafe { fold8(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn load<T: Element>(from: *const T) -> Self {
            // SAFETY: the caller's promise, for each half.
            unsafe { Avx2(load8(from), load8(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn fma(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }

        #[inline(always)]
        unsafe fn fold(self) -> f32 {
            // SAFETY: the caller's promise.
            unsafe { fold8(_mm256_add_ps(self.0, self.1)) }
        }
    }
}
