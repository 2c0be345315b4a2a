//! What a cached element is stored as, and what activations arrive as.
//!
//! [`KvFormat`] is the *storage* format of one half (K or V) of a cache. [`KvCacheDtype`] is the
//! *request* a user types (`auto`, `fp8`, …), which becomes a [`KvFormat`] once the model's own
//! dtype is known. Keeping the two apart means that no kernel ever meets `auto`.
//!
//! To add a format: one type implementing [`crate::codec::Codec`], one variant and one row in
//! each `match` below, one arm in `codec::with_codec!`.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// The type of activations: queries, new keys and values, outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name users know: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }

    /// The cache format that stores this type unchanged.
    pub const fn as_kv_format(self) -> KvFormat {
        match self {
            DType::F32 => KvFormat::F32,
            DType::F16 => KvFormat::F16,
            DType::BF16 => KvFormat::BF16,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How one half (K or V) of a cache stores its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvFormat {
    /// Unquantized binary32; scales are not read.
    F32,
    /// Unquantized binary16; scales are not read.
    F16,
    /// Unquantized bfloat16; scales are not read.
    BF16,
    /// OCP FP8 E4M3 ("e4m3fn"): largest value 448, no infinities.
    Fp8E4M3,
    /// OCP FP8 E5M2: largest value 57344.
    Fp8E5M2,
    /// E4M3 as gfx94x computes it: largest value 240, no negative zero, NaN is 0x80. Its bytes
    /// mean half of what the same OCP bytes mean.
    Fp8E4M3Fnuz,
}

impl KvFormat {
    /// Every format, for tables and tests.
    pub const ALL: [KvFormat; 6] =
        [KvFormat::F32, KvFormat::F16, KvFormat::BF16, KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz];

    /// Bytes of one stored element.
    pub const fn bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::F16 | KvFormat::BF16 => 2,
            KvFormat::Fp8E4M3 | KvFormat::Fp8E5M2 | KvFormat::Fp8E4M3Fnuz => 1,
        }
    }

    /// Whether elements are codes that scales apply to. Unquantized formats never read a scale.
    pub const fn is_quantized(self) -> bool {
        match self {
            KvFormat::F32 | KvFormat::F16 | KvFormat::BF16 => false,
            KvFormat::Fp8E4M3 | KvFormat::Fp8E5M2 | KvFormat::Fp8E4M3Fnuz => true,
        }
    }

    /// The largest finite value a stored element can have before its scale.
    pub const fn max_finite(self) -> f32 {
        match self {
            KvFormat::F32 => f32::MAX,
            KvFormat::F16 => 65504.0,
            KvFormat::BF16 => 3.389_531_4e38,
            KvFormat::Fp8E4M3 => 448.0,
            KvFormat::Fp8E5M2 => 57344.0,
            KvFormat::Fp8E4M3Fnuz => 240.0,
        }
    }

    /// The name as vLLM spells it where vLLM has one.
    pub const fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::BF16 => "bf16",
            KvFormat::Fp8E4M3 => "fp8_e4m3",
            KvFormat::Fp8E5M2 => "fp8_e5m2",
            KvFormat::Fp8E4M3Fnuz => "fp8_e4m3_fnuz",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a user asks the cache to be: `auto`, or a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum KvCacheDtype {
    /// The model's own dtype.
    #[default]
    Auto,
    /// This format, whatever the model's dtype.
    Format(KvFormat),
}

impl KvCacheDtype {
    /// The storage format for a model of type `model`.
    pub const fn resolve(self, model: DType) -> KvFormat {
        match self {
            KvCacheDtype::Auto => model.as_kv_format(),
            KvCacheDtype::Format(format) => format,
        }
    }
}

impl From<KvFormat> for KvCacheDtype {
    fn from(format: KvFormat) -> Self {
        KvCacheDtype::Format(format)
    }
}

impl FromStr for KvCacheDtype {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self> {
        let format = match given {
            "auto" => return Ok(KvCacheDtype::Auto),
            "fp8" | "fp8_e4m3" => KvFormat::Fp8E4M3,
            "fp8_e5m2" => KvFormat::Fp8E5M2,
            "fp8_e4m3_fnuz" => KvFormat::Fp8E4M3Fnuz,
            "f32" | "float32" => KvFormat::F32,
            "f16" | "float16" => KvFormat::F16,
            "bf16" | "bfloat16" => KvFormat::BF16,
            _ => return Err(Error::UnknownKvCacheDtype { given: given.to_owned() }),
        };
        Ok(KvCacheDtype::Format(format))
    }
}

impl fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvCacheDtype::Auto => f.write_str("auto"),
            KvCacheDtype::Format(format) => format.fmt(f),
        }
    }
}

/// A plain number that may live in a buffer: any bit pattern is valid, no padding, no `Drop`.
///
/// # Safety
/// Implementors are `repr(transparent)` or primitive numbers for which every bit pattern of
/// `size_of::<Self>()` bytes is a valid value.
pub unsafe trait Pod: Copy + Default + Send + Sync + fmt::Debug + 'static {}

// SAFETY: primitive numbers, and `half`'s `repr(transparent)` wrappers of `u16`.
unsafe impl Pod for u8 {}
// SAFETY: as above.
unsafe impl Pod for i32 {}
// SAFETY: as above.
unsafe impl Pod for i64 {}
// SAFETY: as above.
unsafe impl Pod for f32 {}
// SAFETY: as above.
unsafe impl Pod for f16 {}
// SAFETY: as above.
unsafe impl Pod for bf16 {}

/// The bytes of a slice.
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) fn bytes_of<T: Pod>(slice: &[T]) -> &[u8] {
    // SAFETY: a `Pod` has no padding: all its bytes are initialized.
    unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), size_of_val(slice)) }
}

/// The bytes of a slice, for writing.
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) fn bytes_of_mut<T: Pod>(slice: &mut [T]) -> &mut [u8] {
    // SAFETY: a `Pod` has no padding, and any bytes are a value of it.
    unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), size_of_val(slice)) }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An activation type: `f32`, [`half::f16`] or [`half::bf16`]. Sealed: [`DType`] is its table.
pub trait Element: Pod + PartialOrd + sealed::Sealed {
    /// The tag of this type.
    const DTYPE: DType;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Narrowing, round to nearest even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for format in KvFormat::ALL {
            assert_eq!(format.name().parse::<KvCacheDtype>().unwrap(), KvCacheDtype::Format(format));
        }
        assert_eq!("fp8".parse::<KvCacheDtype>().unwrap(), KvCacheDtype::Format(KvFormat::Fp8E4M3));
        assert_eq!("auto".parse::<KvCacheDtype>().unwrap().resolve(DType::BF16), KvFormat::BF16);
        let error = "int3".parse::<KvCacheDtype>().unwrap_err().to_string();
        assert!(error.contains("int3") && error.contains("fp8_e5m2"), "{error}");
    }
}
