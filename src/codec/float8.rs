//! Feature `float8`: our E4M3 and E5M2 codes as those of the `float8` crate (the storage type of
//! candle's `DType::F8E4M3`) and back.
//!
//! The bits are kept, every one of the 256. Values agree too, but not everything around them:
//! `float8` 0.7's `MAX`, `INFINITY`, `is_nan` (E5M2), `is_infinite`, `is_finite` and `classify` do
//! not follow OCP, and its own encoding keeps the sign of NaN.

use super::{E4M3, E5M2};

macro_rules! convert {
    ($ours:ty, $theirs:ty) => {
        impl From<$ours> for $theirs {
            fn from(code: $ours) -> Self {
                <$theirs>::from_bits(code.to_bits())
            }
        }

        impl From<$theirs> for $ours {
            fn from(code: $theirs) -> Self {
                <$ours>::from_bits(code.to_bits())
            }
        }
    };
}

convert!(E4M3, ::float8::F8E4M3);
convert!(E5M2, ::float8::F8E5M2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_keeps_its_bits_and_value() {
        for bits in 0..=255u8 {
            let (e4m3, e5m2) = (E4M3::from_bits(bits), E5M2::from_bits(bits));
            let (f8e4m3, f8e5m2) = (::float8::F8E4M3::from(e4m3), ::float8::F8E5M2::from(e5m2));
            assert_eq!((f8e4m3.to_bits(), f8e5m2.to_bits()), (bits, bits));
            assert_eq!((E4M3::from(f8e4m3).to_bits(), E5M2::from(f8e5m2).to_bits()), (bits, bits));
            for (ours, theirs) in [(e4m3.to_f32(), f8e4m3.to_f32()), (e5m2.to_f32(), f8e5m2.to_f32())] {
                assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{bits:#x}: {ours} {theirs}");
            }
        }
    }
}
