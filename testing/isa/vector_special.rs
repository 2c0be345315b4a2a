//! Vector operations that are neither of one lane alone nor of one number: selection by a mask, between lanes and scalar
//! registers, packed pairs, FP8.

use crate::context::{Context, Kind, each, reject_clamp, reject_halves};
use crate::float::{self, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, F16, Narrow};
use crate::handlers::Handler;
use crate::instruction::{Operand, Operation, VCC};
use crate::wave::{Step, Value, Word};

/// `d = mask ? b : a`: undefined where the mask is, or the chosen one.
fn choose(c: &mut Context, i: &Operation) -> Step {
    reject_halves(i)?;
    let mask = i.operands.get(3).map_or(Operand::Scalar(VCC), |source| source.operand);
    let mask = c.wave.mask(mask)?;
    let (a, b) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
    let lanes = each(|lane| if mask.value >> lane & 1 == 1 { b.lanes[lane] } else { a.lanes[lane] });
    let undefined = mask.undefined | (mask.value & b.undefined) | (!mask.value & a.undefined);
    c.write(i, 0, Value { lanes, undefined })
}

fn read_lane(c: &mut Context, i: &Operation, lane: usize) -> Step {
    let value = c.source(i, 1, Kind::B32)?;
    let word = Word::with(value.lanes[lane].into(), value.undefined >> lane & 1 == 1);
    c.set_scalar(i, 0, word, 1)
}

/// A lane named by a scalar.
fn lane_of(c: &Context, i: &Operation) -> Result<usize, String> {
    let lane = c.scalar(i, 2, 1)?;
    if lane.undefined as u32 != 0 {
        return Err("the lane is undefined".into());
    }
    Ok(lane.value as usize % c.wave.width)
}

fn write_lane(c: &mut Context, i: &Operation) -> Step {
    let lane = lane_of(c, i)?;
    let word = c.scalar(i, 1, 1)?;
    let undefined = if word.undefined as u32 != 0 { !0 } else { 0 };
    let Operand::Vector(register) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    c.wave.set_vector(register, &Value { lanes: [word.value as u32; 64], undefined }, 1 << lane)
}

/// Bits of a mask below each lane, of the lanes from `first` on.
fn count_below(c: &mut Context, i: &Operation, first: usize) -> Step {
    let (mask, base) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
    let lanes = each(|lane| {
        let below = lane.saturating_sub(first).min(32);
        let counted = u64::from(mask.lanes[lane]) & ((1u64 << below) - 1);
        base.lanes[lane].wrapping_add(counted.count_ones())
    });
    c.write(i, 0, Value { lanes, undefined: mask.undefined | base.undefined })
}

/// A bit of op_sel, op_sel_hi and the like.
fn bit(bits: u8, index: usize) -> u16 {
    u16::from(bits >> index & 1)
}

/// Two f32 at a time, in pairs of registers; each half of the result takes which half of each source it is told.
fn pair_f32<const N: usize>(c: &mut Context, i: &Operation, f: impl Fn([f32; N]) -> f32) -> Step {
    reject_clamp(i)?;
    let modifiers = &i.modifiers;
    let chosen = [modifiers.op_sel, modifiers.op_sel_hi.unwrap_or(7)];
    let negated = [modifiers.neg_lo, modifiers.neg_hi];
    let mut halves = Vec::with_capacity(2);
    for half in 0..2 {
        let mut sources = Vec::with_capacity(N);
        for index in 0..N {
            let mut value = c.plain(Context::operand(i, index + 1)?, bit(chosen[half], index), Kind::B32)?;
            if bit(negated[half], index) == 1 {
                value.lanes.iter_mut().for_each(|lane| *lane ^= 0x8000_0000);
            }
            sources.push(value);
        }
        let undefined = sources.iter().fold(0, |all, source| all | source.undefined);
        let lanes = each(|lane| f(std::array::from_fn(|index| f32::from_bits(sources[index].lanes[lane]))).to_bits());
        halves.push(Value { lanes, undefined });
    }
    c.write_64(i, 0, &halves[0], &halves[1])
}

fn pair_move(c: &mut Context, i: &Operation) -> Step {
    let chosen = i.modifiers.op_sel;
    let low = c.plain(Context::operand(i, 1)?, bit(chosen, 0), Kind::B32)?;
    let high = c.plain(Context::operand(i, 2)?, bit(chosen, 1), Kind::B32)?;
    c.write_64(i, 0, &low, &high)
}

/// Two f16 at a time, in one register.
fn pair_f16<const N: usize>(c: &mut Context, i: &Operation, f: impl Fn([u32; N]) -> u32) -> Step {
    reject_clamp(i)?;
    let modifiers = &i.modifiers;
    let chosen = [modifiers.op_sel, modifiers.op_sel_hi.unwrap_or(7)];
    let negated = [modifiers.neg_lo, modifiers.neg_hi];
    let mut sources = Vec::with_capacity(N);
    for index in 0..N {
        sources.push(c.plain(Context::operand(i, index + 1)?, 0, Kind::F16)?);
    }
    let undefined = sources.iter().fold(0, |all, source| all | source.undefined);
    let lanes = each(|lane| {
        (0..2).fold(0, |result, half| {
            let of = |index: usize| {
                let bits = sources[index].lanes[lane] >> (16 * bit(chosen[half], index)) & 0xffff;
                bits ^ u32::from(bit(negated[half], index)) << 15
            };
            result | f(std::array::from_fn(of)) << (16 * half)
        })
    });
    c.write(i, 0, Value { lanes, undefined })
}

fn pair_f16_2(c: &mut Context, i: &Operation, f: impl Fn(f64, f64) -> f64) -> Step {
    pair_f16(c, i, |[a, b]| F16.narrow(f(F16.widen(a), F16.widen(b))))
}

/// Two f16 into one register, each from the half that op_sel names.
fn pack(c: &mut Context, i: &Operation) -> Step {
    let (a, b) = (c.source(i, 1, Kind::F16)?, c.source(i, 2, Kind::F16)?);
    let chosen = i.modifiers.op_sel;
    if chosen != 0 && i.operands[1..].iter().any(|source| source.negate || source.absolute) {
        return Err("a sign of an upper half is not known here".into());
    }
    let of = |value: &Value, lane: usize, index: usize| value.lanes[lane] >> (16 * bit(chosen, index)) & 0xffff;
    let lanes = each(|lane| of(&a, lane, 0) | of(&b, lane, 1) << 16);
    c.write(i, 0, Value { lanes, undefined: a.undefined | b.undefined })
}

fn fp8(c: &Context, mantissa_bits: u32) -> Narrow {
    match (mantissa_bits, c.target.fnuz) {
        (3, false) => E4M3,
        (3, true) => E4M3_FNUZ,
        (_, false) => E5M2,
        (_, true) => E5M2_FNUZ,
    }
}

/// Two codes of the half that op_sel or SDWA names, to two f32.
fn decode_pair(c: &mut Context, i: &Operation, mantissa_bits: u32) -> Step {
    let format = fp8(c, mantissa_bits);
    let a = c.source(i, 1, Kind::B32)?;
    let shift = 16 * bit(i.modifiers.op_sel, 0);
    let of = |lane: usize, at: u16| (format.widen(a.lanes[lane] >> (shift + at) & 0xff) as f32).to_bits();
    let low = Value { lanes: each(|lane| of(lane, 0)), undefined: a.undefined };
    let high = Value { lanes: each(|lane| of(lane, 8)), undefined: a.undefined };
    c.write_64(i, 0, &low, &high)
}

/// The lowest code, or the byte that SDWA or op_sel names, to f32.
fn decode_one(c: &mut Context, i: &Operation, mantissa_bits: u32) -> Step {
    let format = fp8(c, mantissa_bits);
    let a = c.source(i, 1, Kind::B32)?;
    // op_sel counts bytes here, its first bit the upper half.
    let shift = 16 * bit(i.modifiers.op_sel, 0) + 8 * bit(i.modifiers.op_sel, 1);
    let lanes = each(|lane| (format.widen(a.lanes[lane] >> shift & 0xff) as f32).to_bits());
    c.write(i, 0, Value { lanes, undefined: a.undefined })
}

/// Two f32 to two codes, in the half of the destination that the last bit of op_sel names; the other half stays. What is
/// too large is not saturated.
fn encode_pair(c: &mut Context, i: &Operation, mantissa_bits: u32) -> Step {
    reject_clamp(i)?;
    let format = fp8(c, mantissa_bits);
    let (a, b) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
    let Operand::Vector(register) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let old = c.wave.raw_vector(register)?;
    let upper = i.modifiers.op_sel >> 2 & 1 == 1;
    let lanes = each(|lane| {
        let code = |value: &Value| format.narrow(f32::from_bits(value.lanes[lane]).into());
        let both = code(&a) | code(&b) << 8;
        if upper { old.lanes[lane] & 0xffff | both << 16 } else { old.lanes[lane] & 0xffff_0000 | both }
    });
    c.write(i, 0, Value { lanes, undefined: a.undefined | b.undefined | if upper { old.undefined } else { 0 } })
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let handler: Handler = match mnemonic {
        "v_cndmask_b32" => choose,
        "v_readfirstlane_b32" => |c, i| {
            let lane = if c.wave.exec == 0 { 0 } else { c.wave.exec.trailing_zeros() as usize };
            read_lane(c, i, lane)
        },
        "v_readlane_b32" => |c, i| {
            let lane = lane_of(c, i)?;
            read_lane(c, i, lane)
        },
        "v_writelane_b32" => write_lane,
        "v_mbcnt_lo_u32_b32" => |c, i| count_below(c, i, 0),
        "v_mbcnt_hi_u32_b32" => |c, i| count_below(c, i, 32),
        "v_pk_mul_f32" => |c, i| pair_f32(c, i, |[a, b]| a * b),
        "v_pk_add_f32" => |c, i| pair_f32(c, i, |[a, b]| a + b),
        "v_pk_fma_f32" => |c, i| pair_f32(c, i, |[a, b, d]| a.mul_add(b, d)),
        "v_pk_mov_b32" => pair_move,
        "v_pk_mul_f16" => |c, i| pair_f16_2(c, i, |a, b| a * b),
        "v_pk_add_f16" => |c, i| pair_f16_2(c, i, |a, b| a + b),
        "v_pk_max_f16" | "v_pk_max_num_f16" => |c, i| pair_f16_2(c, i, f64::max),
        "v_pk_min_f16" | "v_pk_min_num_f16" => |c, i| pair_f16_2(c, i, f64::min),
        "v_pk_fma_f16" => |c, i| pair_f16(c, i, |[a, b, d]| float::fma_f16(a, b, d)),
        "v_pack_b32_f16" => pack,
        "v_cvt_pk_f32_fp8" => |c, i| decode_pair(c, i, 3),
        "v_cvt_pk_f32_bf8" => |c, i| decode_pair(c, i, 2),
        "v_cvt_f32_fp8" => |c, i| decode_one(c, i, 3),
        "v_cvt_f32_bf8" => |c, i| decode_one(c, i, 2),
        "v_cvt_pk_fp8_f32" => |c, i| encode_pair(c, i, 3),
        "v_cvt_pk_bf8_f32" => |c, i| encode_pair(c, i, 2),
        _ => return None,
    };
    Some(handler)
}
