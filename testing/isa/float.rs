//! Formats and operations of floating point that Rust does not have: f16, bf16, FP8, and AMD's steps of a division.
//!
//! Conversions to a narrower format go through `narrow`, which rounds a f64 to nearest even: f32 and f64 are exact there.

/// A format of at most 16 bits: sign, exponent, mantissa.
#[derive(Clone, Copy)]
pub struct Narrow {
    pub exponent_bits: u32,
    pub mantissa_bits: u32,
    pub bias: i32,
    pub specials: Specials,
}

/// What the largest codes mean.
#[derive(Clone, Copy, PartialEq)]
pub enum Specials {
    /// The largest exponent is infinity and NaN.
    Ieee,
    /// All ones are NaN, there is no infinity (OCP E4M3).
    OnlyNan,
    /// Minus zero is NaN, there is no infinity (FNUZ).
    Fnuz,
}

pub const F16: Narrow = Narrow { exponent_bits: 5, mantissa_bits: 10, bias: 15, specials: Specials::Ieee };
pub const BF16: Narrow = Narrow { exponent_bits: 8, mantissa_bits: 7, bias: 127, specials: Specials::Ieee };
pub const E4M3: Narrow = Narrow { exponent_bits: 4, mantissa_bits: 3, bias: 7, specials: Specials::OnlyNan };
pub const E5M2: Narrow = Narrow { exponent_bits: 5, mantissa_bits: 2, bias: 15, specials: Specials::Ieee };
pub const E4M3_FNUZ: Narrow = Narrow { exponent_bits: 4, mantissa_bits: 3, bias: 8, specials: Specials::Fnuz };
pub const E5M2_FNUZ: Narrow = Narrow { exponent_bits: 5, mantissa_bits: 2, bias: 16, specials: Specials::Fnuz };

impl Narrow {
    fn sign(self) -> u32 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// The code of the largest finite value.
    fn largest(self) -> u32 {
        match self.specials {
            Specials::Ieee => (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1,
            Specials::OnlyNan => self.sign() - 2,
            Specials::Fnuz => self.sign() - 1,
        }
    }

    fn nan(self) -> u32 {
        match self.specials {
            Specials::Ieee => (((2 << self.exponent_bits) - 1) << self.mantissa_bits) >> 1 & (self.sign() - 1),
            Specials::OnlyNan => self.sign() - 1,
            Specials::Fnuz => self.sign(),
        }
    }

    /// What overflows is infinity, or NaN where there is none: the hardware does not saturate.
    fn overflow(self) -> u32 {
        if self.specials == Specials::Ieee { self.largest() + 1 } else { self.nan() }
    }

    pub fn widen(self, code: u32) -> f64 {
        let magnitude = code & (self.sign() - 1);
        let exponent = (magnitude >> self.mantissa_bits) as i32;
        let mantissa = f64::from(magnitude & ((1 << self.mantissa_bits) - 1));
        if self.specials == Specials::Fnuz && code & (2 * self.sign() - 1) == self.sign() {
            return f64::NAN;
        }
        if magnitude > self.largest() {
            let infinite = self.specials == Specials::Ieee && mantissa == 0.0;
            return if !infinite {
                f64::NAN
            } else {
                f64::INFINITY.copysign(if code & self.sign() == 0 { 1.0 } else { -1.0 })
            };
        }
        let unit = 2f64.powi(exponent.max(1) - self.bias - self.mantissa_bits as i32);
        let implicit = if exponent > 0 { f64::from(1u32 << self.mantissa_bits) } else { 0.0 };
        let value = (implicit + mantissa) * unit;
        if code & self.sign() == 0 { value } else { -value }
    }

    pub fn narrow(self, value: f64) -> u32 {
        let sign = if value.is_sign_negative() { self.sign() } else { 0 };
        if value.is_nan() {
            return if self.specials == Specials::Fnuz { self.nan() } else { sign | self.nan() };
        }
        if value.is_infinite() {
            return if self.specials == Specials::Fnuz { self.nan() } else { sign | self.overflow() };
        }
        let magnitude = value.abs();
        let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(1 - self.bias);
        let unit = 2f64.powi(exponent - self.mantissa_bits as i32);
        // Exact: a power of two. Carries into the exponent by itself, as codes are ordered like values.
        let steps = (magnitude / unit).round_ties_even() as u32;
        let code = steps + (((exponent + self.bias - 1) as u32) << self.mantissa_bits);
        if code > self.largest() {
            return if self.specials == Specials::Fnuz { self.nan() } else { sign | self.overflow() };
        }
        // FNUZ has no minus zero.
        if code == 0 && self.specials == Specials::Fnuz { 0 } else { sign | code }
    }
}

pub fn f16_to_f32(code: u32) -> f32 {
    let code = code & 0xffff;
    // A NaN keeps its mantissa.
    if code & 0x7fff > 0x7c00 {
        return f32::from_bits((code & 0x8000) << 16 | 0x7fc0_0000 | (code & 0x3ff) << 13);
    }
    F16.widen(code) as f32
}

pub fn f32_to_f16(value: f32) -> u32 {
    if value.is_nan() {
        let bits = value.to_bits();
        return (bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff);
    }
    F16.narrow(value.into())
}

/// `x * y + z` of f16, rounded once: the product is exact in f64, and the sum is rounded to odd before it is narrowed.
pub fn fma_f16(x: u32, y: u32, z: u32) -> u32 {
    let (product, addend) = (F16.widen(x & 0xffff) * F16.widen(y & 0xffff), F16.widen(z & 0xffff));
    F16.narrow(add_to_odd(product, addend))
}

/// A sum whose last bit says that something was cut off: narrowing it rounds as narrowing the exact sum would.
fn add_to_odd(x: f64, y: f64) -> f64 {
    let sum = x + y;
    let part = sum - x;
    to_odd(sum, (x - (sum - part)) + (y - part))
}

/// `value` lacks this much of the exact one.
fn to_odd(value: f64, lacks: f64) -> f64 {
    if !value.is_finite() || lacks == 0.0 || value.to_bits() & 1 == 1 {
        return value;
    }
    // Towards the exact one the odd neighbour is one step away from zero, or towards it.
    let away = (lacks > 0.0) == (value > 0.0);
    f64::from_bits(if away { value.to_bits() + 1 } else { value.to_bits() - 1 })
}

/// `v_div_fmas` where it scales: `(x * y + z) * scale`, rounded once to f32 by the caller.
pub fn fma_scaled_f32(x: f32, y: f32, z: f32, scale: f64) -> f64 {
    add_to_odd(f64::from(x) * f64::from(y), z.into()) * scale
}

/// The same of f64, rounded once. The addend is a quotient, the product its correction, and so the smaller one.
pub fn fma_scaled_f64(x: f64, y: f64, z: f64, scale: f64) -> f64 {
    let (product, sum) = (x * y, x.mul_add(y, z));
    let lacks = (product - (sum - z)) + x.mul_add(y, -product);
    // What is scaled up, or stays normal, is exact.
    let scaled = sum * scale;
    if scaled.is_normal() { scaled } else { to_odd(sum, lacks) * scale }
}

/// Subnormals become zero with their sign: what `v_exp_f32`, `v_log_f32`, `v_rcp_f32` do to arguments and results.
pub fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

pub fn median(x: f32, y: f32, z: f32) -> f32 {
    if x.is_nan() || y.is_nan() || z.is_nan() {
        return x.min(y).min(z);
    }
    x.min(y).max(x.max(y).min(z))
}

/// Where the steps of a division scale, by width of the format.
pub struct Division {
    bias: i32,
    /// Up to this exponent a numerator is tiny.
    tiny: i32,
    /// Exponents apart by this much: the quotient is near the largest number.
    apart: i32,
    /// By how many powers of two is scaled.
    shift: i32,
}
pub const DIVISION_F32: Division = Division { bias: 127, tiny: 23, apart: 96, shift: 64 };
pub const DIVISION_F64: Division = Division { bias: 1023, tiny: 53, apart: 768, shift: 128 };

impl Division {
    /// The biased exponent of a number that may be one of f32 held as f64, or a subnormal of f64.
    fn exponent(&self, x: f64) -> i32 {
        let smallest = 1 - self.bias;
        let raw = (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
        if raw < smallest || x == 0.0 || (self.bias == 1023 && raw == -1023) { 0 } else { raw + self.bias }
    }

    fn is_subnormal(&self, x: f64) -> bool {
        x != 0.0 && self.exponent(x) == 0
    }

    /// `v_div_scale`: one of denominator and numerator, scaled so that the steps between are exact; and whether
    /// `v_div_fmas` has to undo it. `x` is one of the two.
    pub fn scale(&self, x: f64, denominator: f64, numerator: f64) -> (f64, bool) {
        let (up, down) = (2f64.powi(self.shift), 2f64.powi(-self.shift));
        if numerator == 0.0 || denominator == 0.0 {
            return (f64::NAN, false);
        }
        let of_denominator = x.to_bits() == denominator.to_bits();
        let of_numerator = x.to_bits() == numerator.to_bits();
        // 2^-bias is the largest reciprocal that is subnormal; a quotient's exponent may be one less than the difference.
        let difference = self.exponent(numerator) - self.exponent(denominator);
        let reciprocal_small = self.exponent(denominator) > 2 * self.bias - 1
            || (self.exponent(denominator) == 2 * self.bias - 1 && denominator.abs() > 2f64.powi(self.bias - 1));
        let quotient_small = self.quotient_is_small(numerator, denominator);
        if difference >= self.apart {
            (if of_denominator { x * up } else { x }, true)
        } else if self.is_subnormal(denominator) {
            (x * up, false)
        } else if reciprocal_small && quotient_small {
            // Down: up, as some manuals have it, would be infinity.
            (if of_denominator { x * down } else { x }, true)
        } else if reciprocal_small {
            (x * down, false)
        } else if quotient_small {
            (if of_numerator { x * up } else { x }, true)
        } else if self.exponent(numerator) <= self.tiny {
            (x * up, false)
        } else {
            (x, false)
        }
    }

    fn quotient_is_small(&self, numerator: f64, denominator: f64) -> bool {
        if self.bias == 127 {
            return (numerator / denominator).abs() < 2f64.powi(-126);
        }
        // As f64 the quotient itself says it: it is rounded, but not across a power of two from below.
        (numerator / denominator).abs() < f64::MIN_POSITIVE
    }

    /// `v_div_fmas`: what the sum is multiplied by if the condition is set.
    pub fn unscale(&self, addend: f64) -> f64 {
        let up = self.exponent(addend) > self.bias;
        2f64.powi(if up { self.shift } else { -self.shift })
    }

    /// `v_div_fixup`: the quotient with its sign, or what the operands' special values make of it.
    pub fn fix_up(&self, quotient: f64, denominator: f64, numerator: f64) -> f64 {
        let sign = if denominator.is_sign_negative() == numerator.is_sign_negative() { 1.0 } else { -1.0f64 };
        if numerator.is_nan() {
            numerator
        } else if denominator.is_nan() {
            denominator
        } else if (denominator == 0.0 && numerator == 0.0) || (denominator.is_infinite() && numerator.is_infinite()) {
            -f64::NAN
        } else if denominator == 0.0 || numerator.is_infinite() {
            f64::INFINITY.copysign(sign)
        } else if denominator.is_infinite() || numerator == 0.0 {
            0f64.copysign(sign)
        } else if quotient.is_nan() {
            // The steps before overflowed.
            f64::INFINITY.copysign(sign)
        } else {
            quotient.abs().copysign(sign)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back() {
        for format in [F16, BF16, E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ] {
            for code in 0..2 * format.sign() {
                let value = format.widen(code);
                let back = format.narrow(value);
                if value.is_nan() {
                    assert!(format.widen(back).is_nan(), "{code:#x}");
                } else {
                    assert_eq!(back, code, "{value}");
                }
            }
        }
    }

    #[test]
    fn known_values() {
        // OCP 8-bit floating point, table 2: S.1111.110 = 448, S.0000.001 = 2^-9; E5M2: S.11110.11 = 57344.
        assert_eq!(E4M3.widen(0x7e), 448.0);
        assert_eq!(E4M3.widen(1), 2f64.powi(-9));
        assert_eq!(E5M2.widen(0x7b), 57344.0);
        assert_eq!(E4M3_FNUZ.widen(0x7f), 240.0);
        assert_eq!(E5M2_FNUZ.widen(0x7f), 57344.0);
        assert!(E4M3_FNUZ.widen(0x80).is_nan());
        // The middle between the largest and what would follow: a tie, which goes to the even code.
        assert_eq!(E4M3.narrow(464.0), 0x7e);
        assert_eq!(E4M3.narrow(464.1), 0x7f);
        assert_eq!(E5M2.narrow(61440.0), 0x7c);
        assert_eq!(E4M3_FNUZ.narrow(248.0), 0x80);
        assert_eq!(E4M3_FNUZ.narrow(-0.0), 0);
        assert_eq!(F16.narrow(65520.0), 0x7c00);
        assert_eq!(F16.narrow(65519.9), 0x7bff);
        assert_eq!(F16.narrow(2f64.powi(-25)), 0);
        assert_eq!(F16.narrow(2f64.powi(-25) * 1.01), 1);
        assert_eq!(f32_to_f16(f32::NAN), 0x7e00);
    }
}
