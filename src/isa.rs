//! Which vector instructions the CPU kernels use.
//!
//! One value, decided once when a [`crate::cpu::CpuBackend`] is made, instead of a feature test in
//! every kernel. All choices give the same bytes in the cache.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// A CPU instruction set the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust: the specification.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VBMI (Ice Lake, Zen 4 and later).
    Avx512,
    /// AArch64 with NEON.
    Neon,
}

impl Isa {
    /// Every choice, slowest first.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512];

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vbmi")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Itself, or [`Isa::Scalar`] where this machine cannot run it: the check, cheap enough for
    /// every call, that lets safe functions take an `Isa`.
    #[inline]
    pub fn or_scalar(self) -> Isa {
        // Bit 7: computed. Bit `isa`: available.
        static AVAILABLE: AtomicU8 = AtomicU8::new(0);
        let mut available = AVAILABLE.load(Ordering::Relaxed);
        if available == 0 {
            available =
                Isa::ALL.into_iter().filter(|isa| isa.is_available()).fold(0x80, |all, isa| all | 1 << isa as u8);
            AVAILABLE.store(available, Ordering::Relaxed);
        }
        if available & 1 << self as u8 != 0 { self } else { Isa::Scalar }
    }

    /// The fastest available choice.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The name shown to users.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
