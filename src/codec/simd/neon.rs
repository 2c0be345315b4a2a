//! NEON: 4 lanes.
//!
//! binary16 goes through the portable lane arithmetic: the conversion intrinsics need a type that
//! is not stable in the Rust versions this crate supports. On other machines the unit tests run
//! this file over `neon_twin`, which gives each intrinsic's meaning in plain Rust. CI has no
//! AArch64 machine; this file has run under emulation (QEMU), not on hardware.

#[cfg(not(target_arch = "aarch64"))]
use super::neon_twin::*;
#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;

use super::Simd;

#[cfg(target_arch = "aarch64")]
super::shells!(Neon(()), "neon");

/// Proof that NEON may be used.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

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

impl Simd for Neon {
    type F32 = float32x4_t;
    type U32 = uint32x4_t;
    const LANES: usize = 4;

    op! {
        splat(x: f32) -> float32x4_t { vdupq_n_f32(x) }
        splat_u32(x: u32) -> uint32x4_t { vdupq_n_u32(x) }
        bits(x: float32x4_t) -> uint32x4_t { vreinterpretq_u32_f32(x) }
        floats(x: uint32x4_t) -> float32x4_t { vreinterpretq_f32_u32(x) }

        add(a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
        mul(a: float32x4_t, b: float32x4_t) -> float32x4_t { vmulq_f32(a, b) }
        div(a: float32x4_t, b: float32x4_t) -> float32x4_t { vdivq_f32(a, b) }
        min(a: float32x4_t, b: float32x4_t) -> float32x4_t { vminq_f32(a, b) }
        max(a: float32x4_t, b: float32x4_t) -> float32x4_t { vmaxq_f32(a, b) }
        to_f32(x: uint32x4_t) -> float32x4_t { vcvtq_f32_u32(x) }

        and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vandq_u32(a, b) }
        or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vorrq_u32(a, b) }
        xor(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { veorq_u32(a, b) }
        add_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vaddq_u32(a, b) }
        sub_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vsubq_u32(a, b) }
        min_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vminq_u32(a, b) }
        max_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t { vmaxq_u32(a, b) }
        shl(x: uint32x4_t, bits: u32) -> uint32x4_t { vshlq_u32(x, vdupq_n_s32(bits as i32)) }
        shr(x: uint32x4_t, bits: u32) -> uint32x4_t { vshlq_u32(x, vdupq_n_s32(-(bits as i32))) }
        select_lt(a: uint32x4_t, b: uint32x4_t, yes: uint32x4_t, no: uint32x4_t) -> uint32x4_t {
            vbslq_u32(vcltq_u32(a, b), yes, no)
        }
    }

    #[inline(always)]
    fn load_u32(self, src: &[u8]) -> uint32x4_t {
        let src = &src[..16];
        // SAFETY: 16 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { vld1q_u32(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u16(self, src: &[u8]) -> uint32x4_t {
        let src = &src[..8];
        // SAFETY: 8 bytes are there; the load needs no alignment; the instruction set: `self`.
        unsafe { vmovl_u16(vld1_u16(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_u8(self, src: &[u8]) -> uint32x4_t {
        let four = u32::from_le_bytes([src[0], src[1], src[2], src[3]]);
        // SAFETY: `self` exists only where the instruction set does.
        unsafe { vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four.into())))) }
    }

    #[inline(always)]
    fn store_u32(self, x: uint32x4_t, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: 16 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { vst1q_u32(dst.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn store_u16(self, x: uint32x4_t, dst: &mut [u8]) {
        let dst = &mut dst[..8];
        // SAFETY: 8 bytes are there; the store needs no alignment; the instruction set: `self`.
        unsafe { vst1_u16(dst.as_mut_ptr().cast(), vmovn_u32(x)) }
    }
    #[inline(always)]
    fn store_u8(self, x: uint32x4_t, dst: &mut [u8]) {
        // SAFETY: `self` exists only where the instruction set does.
        let four = unsafe {
            let halves = vmovn_u32(x);
            vget_lane_u32::<0>(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))))
        };
        dst[..4].copy_from_slice(&four.to_le_bytes());
    }
}

#[cfg(test)]
pub(super) const NEON: Neon = Neon(());
