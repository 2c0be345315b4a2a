//! Vector operations on integers and bits, and the helpers that all vector operations use.
//!
//! A helper reads the sources of all lanes, applies the operation to each lane, and writes the lanes of EXEC. A result is
//! undefined where a source is.

use crate::context::{Context, Kind, each, reject_clamp, reject_halves};
use crate::handlers::Handler;
use crate::instruction::Operation;
use crate::wave::{Step, Value};

pub fn one(c: &mut Context, i: &Operation, f: impl Fn(u32) -> u32) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let a = c.source(i, 1, Kind::B32)?;
    c.write(i, 0, Value { lanes: each(|lane| f(a.lanes[lane])), undefined: a.undefined })
}

pub fn two(c: &mut Context, i: &Operation, f: impl Fn(u32, u32) -> u32) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let (a, b) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
    c.write(i, 0, Value { lanes: each(|lane| f(a.lanes[lane], b.lanes[lane])), undefined: a.undefined | b.undefined })
}

pub fn three(c: &mut Context, i: &Operation, f: impl Fn(u32, u32, u32) -> u32) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let (a, b, d) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?, c.source(i, 3, Kind::B32)?);
    let lanes = each(|lane| f(a.lanes[lane], b.lanes[lane], d.lanes[lane]));
    c.write(i, 0, Value { lanes, undefined: a.undefined | b.undefined | d.undefined })
}

/// 16 bits into the lower half of a register. gfx9 clears the upper one, later devices keep it.
pub fn lower_half(c: &mut Context, i: &Operation, lanes: impl Fn(usize) -> u32, undefined: u64) -> Step {
    let crate::instruction::Operand::Vector(register) = Context::operand(i, 0)?.operand else {
        return Err("the destination is no vector register".into());
    };
    let old = c.wave.raw_vector(register)?;
    let keeps = c.target.generation > 9;
    let kept = |lane: usize| if keeps { old.lanes[lane] & 0xffff_0000 } else { 0 };
    c.write(i, 0, Value { lanes: each(|lane| kept(lane) | lanes(lane) & 0xffff), undefined })
}

fn two_16(c: &mut Context, i: &Operation, f: impl Fn(u16, u16) -> u16) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let (a, b) = (c.source(i, 1, Kind::F16)?, c.source(i, 2, Kind::F16)?);
    lower_half(c, i, |lane| f(a.lanes[lane] as u16, b.lanes[lane] as u16).into(), a.undefined | b.undefined)
}

pub fn join(low: &Value, high: &Value, lane: usize) -> u64 {
    u64::from(low.lanes[lane]) | u64::from(high.lanes[lane]) << 32
}

/// Which lanes of the two halves of a result are undefined.
pub type Halves = (u64, u64);

pub fn write_64(c: &mut Context, i: &Operation, undefined: Halves, f: impl Fn(usize) -> u64) -> Step {
    let results: [u64; 64] = std::array::from_fn(f);
    let low = Value { lanes: each(|lane| results[lane] as u32), undefined: undefined.0 };
    let high = Value { lanes: each(|lane| (results[lane] >> 32) as u32), undefined: undefined.1 };
    c.write_64(i, 0, &low, &high)
}

/// `d = f(a, b)`: a shift of 64 bits, the amount first. One half gets bits of the other.
fn shift_64(c: &mut Context, i: &Operation, left: bool, f: impl Fn(u64, u32) -> u64) -> Step {
    let amount = c.source(i, 1, Kind::B32)?;
    let (low, high) = c.source_64(i, 2, Kind::U64)?;
    let both = amount.undefined | low.undefined | high.undefined;
    let undefined =
        if left { (amount.undefined | low.undefined, both) } else { (both, amount.undefined | high.undefined) };
    write_64(c, i, undefined, |lane| f(join(&low, &high, lane), amount.lanes[lane] & 63))
}

/// Condition of an addition or subtraction: the second operand. `d, carry = f(a, b, carry)`.
fn with_carry(c: &mut Context, i: &Operation, takes: bool, f: impl Fn(u64, u64, u64) -> u64) -> Step {
    let (a, b) = (c.source(i, 2, Kind::B32)?, c.source(i, 3, Kind::B32)?);
    let carry = if takes { c.wave.mask(Context::operand(i, 4)?.operand)? } else { crate::wave::Word::of(0) };
    let undefined = a.undefined | b.undefined | carry.undefined;
    let results: [u64; 64] =
        std::array::from_fn(|lane| f(a.lanes[lane].into(), b.lanes[lane].into(), carry.value >> lane & 1));
    c.write(i, 0, Value { lanes: each(|lane| results[lane] as u32), undefined })?;
    let out = (0..64).fold(0u64, |mask, lane| mask | u64::from(results[lane] >> 32 != 0) << lane);
    let exec = c.writes;
    c.wave
        .set_mask(Context::operand(i, 1)?.operand, crate::wave::Word { value: out & exec, undefined: undefined & exec })
}

/// `d, carry = a * b + c` of 64 bits. The carry of these is used by nobody that we know: it is written as undefined.
fn multiply_add_64(c: &mut Context, i: &Operation, f: impl Fn(u32, u32, u64) -> u64) -> Step {
    let (a, b) = (c.source(i, 2, Kind::B32)?, c.source(i, 3, Kind::B32)?);
    let (low, high) = c.source_64(i, 4, Kind::U64)?;
    // The lower half does not depend on the addend's upper one, which compilers leave undefined.
    let lower = a.undefined | b.undefined | low.undefined;
    write_64(c, i, (lower, lower | high.undefined), |lane| f(a.lanes[lane], b.lanes[lane], join(&low, &high, lane)))?;
    let carry = crate::wave::Word { value: 0, undefined: c.writes };
    c.wave.set_mask(Context::operand(i, 1)?.operand, carry)
}

fn low_24(a: u32) -> u32 {
    a & 0xff_ffff
}
fn low_24_signed(a: u32) -> u32 {
    ((a << 8) as i32 >> 8) as u32
}

fn field(a: u32, at: u32, width: u32) -> u32 {
    (a >> (at & 31)) & ((1u32 << (width & 31)) - 1)
}

/// `v_perm_b32`: each byte of the selector names one of eight, or a constant.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(a) << 32 | u64::from(b);
    let byte = |selector: u32| -> u32 {
        match selector {
            0..=7 => (bytes >> (8 * selector) & 0xff) as u32,
            // The sign of b's halves, then of a's.
            8..=11 => {
                if bytes >> (16 * (selector - 8) + 15) & 1 == 1 {
                    0xff
                } else {
                    0
                }
            }
            12 => 0,
            _ => 0xff,
        }
    };
    (0..4).fold(0, |result, at| result | byte(selector >> (8 * at) & 0xff) << (8 * at))
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let handler: Handler = match mnemonic {
        "v_mov_b32" => |c, i| one(c, i, |a| a),
        "v_accvgpr_read_b32" | "v_accvgpr_write_b32" | "v_accvgpr_mov_b32" => |c, i| one(c, i, |a| a),
        "v_not_b32" => |c, i| one(c, i, |a| !a),
        "v_bfrev_b32" => |c, i| one(c, i, u32::reverse_bits),
        "v_ffbh_u32" | "v_clz_i32_u32" => |c, i| one(c, i, |a| if a == 0 { !0 } else { a.leading_zeros() }),
        "v_ffbl_b32" | "v_ctz_i32_b32" => |c, i| one(c, i, |a| if a == 0 { !0 } else { a.trailing_zeros() }),
        "v_add_u32" | "v_add_nc_u32" => |c, i| two(c, i, u32::wrapping_add),
        "v_sub_u32" | "v_sub_nc_u32" => |c, i| two(c, i, u32::wrapping_sub),
        "v_subrev_u32" | "v_subrev_nc_u32" => |c, i| two(c, i, |a, b| b.wrapping_sub(a)),
        "v_and_b32" => |c, i| two(c, i, |a, b| a & b),
        "v_or_b32" => |c, i| two(c, i, |a, b| a | b),
        "v_xor_b32" => |c, i| two(c, i, |a, b| a ^ b),
        "v_xnor_b32" => |c, i| two(c, i, |a, b| !(a ^ b)),
        "v_lshlrev_b32" => |c, i| two(c, i, |a, b| b << (a & 31)),
        "v_lshrrev_b32" => |c, i| two(c, i, |a, b| b >> (a & 31)),
        "v_ashrrev_i32" => |c, i| two(c, i, |a, b| (b as i32 >> (a & 31)) as u32),
        "v_mul_lo_u32" => |c, i| two(c, i, u32::wrapping_mul),
        "v_mul_hi_u32" => |c, i| two(c, i, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        "v_mul_hi_i32" => |c, i| two(c, i, |a, b| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32),
        "v_mul_u32_u24" => |c, i| two(c, i, |a, b| low_24(a).wrapping_mul(low_24(b))),
        "v_mul_i32_i24" => |c, i| two(c, i, |a, b| low_24_signed(a).wrapping_mul(low_24_signed(b))),
        "v_min_u32" => |c, i| two(c, i, u32::min),
        "v_max_u32" => |c, i| two(c, i, u32::max),
        "v_min_i32" => |c, i| two(c, i, |a, b| (a as i32).min(b as i32) as u32),
        "v_max_i32" => |c, i| two(c, i, |a, b| (a as i32).max(b as i32) as u32),
        "v_bcnt_u32_b32" => |c, i| two(c, i, |a, b| a.count_ones().wrapping_add(b)),
        "v_bfm_b32" => |c, i| two(c, i, |a, b| ((1u32 << (a & 31)) - 1) << (b & 31)),
        "v_add3_u32" => |c, i| three(c, i, |a, b, d| a.wrapping_add(b).wrapping_add(d)),
        "v_lshl_add_u32" => |c, i| three(c, i, |a, b, d| (a << (b & 31)).wrapping_add(d)),
        "v_add_lshl_u32" => |c, i| three(c, i, |a, b, d| a.wrapping_add(b) << (d & 31)),
        "v_lshl_or_b32" => |c, i| three(c, i, |a, b, d| a << (b & 31) | d),
        "v_and_or_b32" => |c, i| three(c, i, |a, b, d| a & b | d),
        "v_or3_b32" => |c, i| three(c, i, |a, b, d| a | b | d),
        "v_xor3_b32" => |c, i| three(c, i, |a, b, d| a ^ b ^ d),
        "v_xad_u32" => |c, i| three(c, i, |a, b, d| (a ^ b).wrapping_add(d)),
        "v_bfi_b32" => |c, i| three(c, i, |a, b, d| a & b | !a & d),
        "v_bfe_u32" => |c, i| three(c, i, field),
        "v_bfe_i32" => |c, i| {
            three(c, i, |a, b, d| {
                let unused = 32 - (d & 31);
                if unused == 32 { 0 } else { ((field(a, b, d) << unused) as i32 >> unused) as u32 }
            })
        },
        "v_alignbit_b32" => |c, i| three(c, i, |a, b, d| ((u64::from(a) << 32 | u64::from(b)) >> (d & 31)) as u32),
        "v_alignbyte_b32" => {
            |c, i| three(c, i, |a, b, d| ((u64::from(a) << 32 | u64::from(b)) >> (8 * (d & 3))) as u32)
        }
        "v_perm_b32" => |c, i| three(c, i, permute),
        "v_mad_u32_u24" => |c, i| three(c, i, |a, b, d| low_24(a).wrapping_mul(low_24(b)).wrapping_add(d)),
        "v_mad_i32_i24" => {
            |c, i| three(c, i, |a, b, d| low_24_signed(a).wrapping_mul(low_24_signed(b)).wrapping_add(d))
        }
        "v_min3_u32" => |c, i| three(c, i, |a, b, d| a.min(b).min(d)),
        "v_max3_u32" => |c, i| three(c, i, |a, b, d| a.max(b).max(d)),
        "v_min3_i32" => |c, i| three(c, i, |a, b, d| (a as i32).min(b as i32).min(d as i32) as u32),
        "v_max3_i32" => |c, i| three(c, i, |a, b, d| (a as i32).max(b as i32).max(d as i32) as u32),
        "v_maxmin_i32" => |c, i| three(c, i, |a, b, d| (a as i32).max(b as i32).min(d as i32) as u32),
        "v_minmax_i32" => |c, i| three(c, i, |a, b, d| (a as i32).min(b as i32).max(d as i32) as u32),
        "v_maxmin_u32" => |c, i| three(c, i, |a, b, d| a.max(b).min(d)),
        "v_minmax_u32" => |c, i| three(c, i, |a, b, d| a.min(b).max(d)),
        "v_med3_i32" => |c, i| {
            three(c, i, |a, b, d| {
                let [a, b, d] = [a as i32, b as i32, d as i32];
                a.min(b).max(a.max(b).min(d)) as u32
            })
        },
        "v_med3_u32" => |c, i| three(c, i, |a, b, d| a.min(b).max(a.max(b).min(d))),
        "v_add_u16" | "v_add_nc_u16" => |c, i| two_16(c, i, u16::wrapping_add),
        "v_sub_u16" | "v_sub_nc_u16" => |c, i| two_16(c, i, u16::wrapping_sub),
        "v_mul_lo_u16" => |c, i| two_16(c, i, u16::wrapping_mul),
        "v_lshlrev_b16" => |c, i| two_16(c, i, |a, b| b << (a & 15)),
        "v_lshrrev_b16" => |c, i| two_16(c, i, |a, b| b >> (a & 15)),
        "v_and_b16" => |c, i| two_16(c, i, |a, b| a & b),
        "v_or_b16" => |c, i| two_16(c, i, |a, b| a | b),
        "v_min_u16" => |c, i| two_16(c, i, u16::min),
        "v_max_u16" => |c, i| two_16(c, i, u16::max),
        "v_mov_b64" => |c, i| {
            let (low, high) = c.source_64(i, 1, Kind::U64)?;
            c.write_64(i, 0, &low, &high)
        },
        "v_lshlrev_b64" => |c, i| shift_64(c, i, true, |a, by| a << by),
        "v_lshrrev_b64" => |c, i| shift_64(c, i, false, |a, by| a >> by),
        "v_ashrrev_i64" => |c, i| shift_64(c, i, false, |a, by| (a as i64 >> by) as u64),
        "v_lshl_add_u64" => |c, i| {
            let (low, high) = c.source_64(i, 1, Kind::U64)?;
            let amount = c.source(i, 2, Kind::B32)?;
            let (addend_low, addend_high) = c.source_64(i, 3, Kind::I64)?;
            let lower = low.undefined | amount.undefined | addend_low.undefined;
            let undefined = (lower, lower | high.undefined | addend_high.undefined);
            write_64(c, i, undefined, |lane| {
                (join(&low, &high, lane) << (amount.lanes[lane] & 7)).wrapping_add(join(
                    &addend_low,
                    &addend_high,
                    lane,
                ))
            })
        },
        "v_add_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| a + b),
        "v_sub_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| a.wrapping_sub(b)),
        "v_subrev_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| b.wrapping_sub(a)),
        "v_addc_co_u32" | "v_add_co_ci_u32" => |c, i| with_carry(c, i, true, |a, b, carry| a + b + carry),
        "v_subb_co_u32" | "v_sub_co_ci_u32" => {
            |c, i| with_carry(c, i, true, |a, b, carry| a.wrapping_sub(b).wrapping_sub(carry))
        }
        "v_subbrev_co_u32" | "v_subrev_co_ci_u32" => {
            |c, i| with_carry(c, i, true, |a, b, carry| b.wrapping_sub(a).wrapping_sub(carry))
        }
        "v_mad_u64_u32" | "v_mad_co_u64_u32" => {
            |c, i| multiply_add_64(c, i, |a, b, d| (u64::from(a) * u64::from(b)).wrapping_add(d))
        }
        "v_mad_i64_i32" | "v_mad_co_i64_i32" => |c, i| {
            multiply_add_64(c, i, |a, b, d| (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(d as i64) as u64)
        },
        _ => return None,
    };
    Some(handler)
}
