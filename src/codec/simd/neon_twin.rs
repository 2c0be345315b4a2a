//! What the NEON intrinsics that `neon.rs` uses mean, in plain Rust, under their names in
//! `core::arch::aarch64`: so that its logic is compiled and tested on machines without NEON.
//! Semantics from Arm's intrinsics reference.
#![allow(non_camel_case_types)]

macro_rules! vector {
    ($($name:ident = [$lane:ty; $n:literal];)*) => {$(
        #[derive(Clone, Copy, Debug)]
        pub struct $name([$lane; $n]);
    )*};
}

vector! {
    float32x4_t = [f32; 4];
    uint32x4_t = [u32; 4];
    int32x4_t = [i32; 4];
    uint16x4_t = [u16; 4];
    uint16x8_t = [u16; 8];
    uint8x8_t = [u8; 8];
    uint32x2_t = [u32; 2];
}

fn zip<T: Copy, U>(a: [T; 4], b: [T; 4], f: impl Fn(T, T) -> U) -> [U; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Lane-by-lane functions of two vectors. Unsafe to call, as the intrinsics are from code that
/// does not enable NEON.
macro_rules! binary {
    ($($name:ident: $ty:ident, |$a:ident, $b:ident| $body:expr;)*) => {$(
        /// # Safety
        /// None here; the intrinsic needs NEON.
        pub unsafe fn $name(a: $ty, b: $ty) -> $ty {
            $ty(zip(a.0, b.0, |$a, $b| $body))
        }
    )*};
}

binary! {
    vaddq_f32: float32x4_t, |a, b| a + b;
    vmulq_f32: float32x4_t, |a, b| a * b;
    vdivq_f32: float32x4_t, |a, b| a / b;
    // FMIN and FMAX give NaN where either operand is NaN.
    vminq_f32: float32x4_t, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.min(b) };
    vmaxq_f32: float32x4_t, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) };
    vandq_u32: uint32x4_t, |a, b| a & b;
    vorrq_u32: uint32x4_t, |a, b| a | b;
    veorq_u32: uint32x4_t, |a, b| a ^ b;
    vaddq_u32: uint32x4_t, |a, b| a.wrapping_add(b);
    vsubq_u32: uint32x4_t, |a, b| a.wrapping_sub(b);
    vminq_u32: uint32x4_t, |a, b| a.min(b);
    vmaxq_u32: uint32x4_t, |a, b| a.max(b);
    vcltq_u32: uint32x4_t, |a, b| if a < b { u32::MAX } else { 0 };
}

macro_rules! twins {
    ($($name:ident$(<const $n:ident: $nt:ty>)?($($arg:ident: $ty:ty),*) $(-> $ret:ty)? { $body:expr })*) => {$(
        /// # Safety
        /// Pointers must be good for the vector's bytes; the intrinsic needs NEON.
        pub unsafe fn $name$(<const $n: $nt>)?($($arg: $ty),*) $(-> $ret)? {
            $body
        }
    )*};
}

twins! {
    vdupq_n_f32(value: f32) -> float32x4_t { float32x4_t([value; 4]) }
    vdupq_n_u32(value: u32) -> uint32x4_t { uint32x4_t([value; 4]) }
    vdupq_n_s32(value: i32) -> int32x4_t { int32x4_t([value; 4]) }
    vreinterpretq_u32_f32(a: float32x4_t) -> uint32x4_t { uint32x4_t(a.0.map(f32::to_bits)) }
    vreinterpretq_f32_u32(a: uint32x4_t) -> float32x4_t { float32x4_t(a.0.map(f32::from_bits)) }
    vreinterpret_u32_u8(a: uint8x8_t) -> uint32x2_t {
        uint32x2_t(std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| a.0[4 * i + j]))))
    }
    vcvtq_f32_u32(a: uint32x4_t) -> float32x4_t { float32x4_t(a.0.map(|x| x as f32)) }
    // Left by b where it is positive, right by -b where it is negative (only the low byte of b
    // counts; this crate stays within -31..=31).
    vshlq_u32(a: uint32x4_t, b: int32x4_t) -> uint32x4_t {
        uint32x4_t(std::array::from_fn(|i| if b.0[i] < 0 { a.0[i] >> -b.0[i] } else { a.0[i] << b.0[i] }))
    }
    vbslq_u32(a: uint32x4_t, b: uint32x4_t, c: uint32x4_t) -> uint32x4_t {
        uint32x4_t(std::array::from_fn(|i| (a.0[i] & b.0[i]) | (!a.0[i] & c.0[i])))
    }
    vmovl_u8(a: uint8x8_t) -> uint16x8_t { uint16x8_t(a.0.map(u16::from)) }
    vmovl_u16(a: uint16x4_t) -> uint32x4_t { uint32x4_t(a.0.map(u32::from)) }
    vmovn_u16(a: uint16x8_t) -> uint8x8_t { uint8x8_t(a.0.map(|x| x as u8)) }
    vmovn_u32(a: uint32x4_t) -> uint16x4_t { uint16x4_t(a.0.map(|x| x as u16)) }
    vget_low_u16(a: uint16x8_t) -> uint16x4_t { uint16x4_t(std::array::from_fn(|i| a.0[i])) }
    vcombine_u16(low: uint16x4_t, high: uint16x4_t) -> uint16x8_t {
        uint16x8_t(std::array::from_fn(|i| if i < 4 { low.0[i] } else { high.0[i - 4] }))
    }
    vcreate_u8(a: u64) -> uint8x8_t { uint8x8_t(a.to_le_bytes()) }
    vget_lane_u32<const IMM5: i32>(v: uint32x2_t) -> u32 { v.0[IMM5 as usize] }
    vld1q_u32(ptr: *const u32) -> uint32x4_t {
        // SAFETY: the caller's promise is the pointer's.
        uint32x4_t(unsafe { ptr.cast::<[u32; 4]>().read_unaligned() })
    }
    vld1_u16(ptr: *const u16) -> uint16x4_t {
        // SAFETY: the caller's promise is the pointer's.
        uint16x4_t(unsafe { ptr.cast::<[u16; 4]>().read_unaligned() })
    }
    vst1q_u32(ptr: *mut u32, a: uint32x4_t) {
        // SAFETY: the caller's promise is the pointer's.
        unsafe { ptr.cast::<[u32; 4]>().write_unaligned(a.0) }
    }
    vst1_u16(ptr: *mut u16, a: uint16x4_t) {
        // SAFETY: the caller's promise is the pointer's.
        unsafe { ptr.cast::<[u16; 4]>().write_unaligned(a.0) }
    }
}
