//! OCP E4M3 codes as FNUZ codes, and back: a cache moves between a gfx94x device and any other.
//!
//! A FNUZ code means half of what the same OCP code means, so the conversion keeps bytes and changes the
//! scale: `scale_fnuz = 2 * scale_ocp` ([`StaticScale::doubled_for_fnuz`](crate::scale::StaticScale)).
//! Values `code * scale` are then the same numbers, but for the codes where the formats part:
//!
//! ```text
//! OCP            FNUZ           to FNUZ                       to OCP
//! 0x80  -0       NaN            0x00, +0                      0x7F, NaN
//! 0x7F  NaN      240            0x80, NaN                     0x7E: 240 is 448, not 480; saturates
//! 0xFF  NaN      -240           0x80, NaN                     0xFE, the same
//! ```
//! To FNUZ, nothing is lost but the sign of zero (and of NaN): 256 to 448 are 128 to 224. To OCP, the codes
//! of ±240 are lost: they come back as ±224, 1/15 less.
//!
//! With the scale left as it is, codes must change instead: that is `e4m3fnuz::encode(e4m3::decode(code))`,
//! which saturates 256 to 448 at 240, and back `e4m3::encode(e4m3fnuz::decode(code))`, which rounds the
//! odd multiples of 2^-10 below 2^-6.

/// The FNUZ code that means half of what the OCP E4M3 code `code` means.
#[inline]
pub const fn e4m3_to_fnuz(code: u8) -> u8 {
    match code {
        0x7f | 0xff => 0x80,
        0x80 => 0x00,
        same => same,
    }
}

/// The OCP E4M3 code that means twice what the FNUZ code `code` means; ±480 saturates to ±448.
#[inline]
pub const fn fnuz_to_e4m3(code: u8) -> u8 {
    match code {
        0x80 => 0x7f,
        0x7f => 0x7e,
        0xff => 0xfe,
        same => same,
    }
}

/// [`e4m3_to_fnuz`] of every byte, in place.
pub fn e4m3_to_fnuz_slice(codes: &mut [u8]) {
    for code in codes {
        *code = e4m3_to_fnuz(*code);
    }
}

/// [`fnuz_to_e4m3`] of every byte, in place; gives how many saturated, the only values that change.
pub fn fnuz_to_e4m3_slice(codes: &mut [u8]) -> usize {
    let mut saturated = 0;
    for code in codes {
        saturated += usize::from(matches!(*code, 0x7f | 0xff));
        *code = fnuz_to_e4m3(*code);
    }
    saturated
}
