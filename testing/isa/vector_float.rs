//! Vector operations on f32, f64 and f16, and conversions between numbers.

use crate::context::{Context, Kind, each, reject_clamp, reject_halves};
use crate::float::{self, DIVISION_F32, DIVISION_F64, Division, F16, f16_to_f32, f32_to_f16, flush};
use crate::handlers::Handler;
use crate::instruction::{Operand, Operation, VCC};
use crate::vector::{join, lower_half, one, write_64};
use crate::wave::{Step, Value, Word};

fn floats(value: &Value) -> [f32; 64] {
    std::array::from_fn(|lane| f32::from_bits(value.lanes[lane]))
}

/// The result with what the instruction does to it at last: a factor, and clamping to [0, 1], of NaN to 0.
fn finish(c: &mut Context, i: &Operation, undefined: u64, f: impl Fn(usize) -> f32) -> Step {
    reject_halves(i)?;
    let (scale, clamp) = (i.modifiers.scale, i.modifiers.clamp);
    let lanes = each(|lane| {
        let mut x = f(lane);
        if scale != 1.0 {
            x *= scale;
        }
        if clamp {
            x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) };
        }
        x.to_bits()
    });
    c.write(i, 0, Value { lanes, undefined })
}

fn f32_1(c: &mut Context, i: &Operation, f: impl Fn(f32) -> f32) -> Step {
    let a = c.source(i, 1, Kind::B32)?;
    let x = floats(&a);
    finish(c, i, a.undefined, |lane| f(x[lane]))
}

fn f32_2(c: &mut Context, i: &Operation, f: impl Fn(f32, f32) -> f32) -> Step {
    let (a, b) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
    let (x, y) = (floats(&a), floats(&b));
    finish(c, i, a.undefined | b.undefined, |lane| f(x[lane], y[lane]))
}

/// Operands in this order: the destination may be one.
fn f32_3(c: &mut Context, i: &Operation, order: [usize; 3], f: impl Fn(f32, f32, f32) -> f32) -> Step {
    let [a, b, d] =
        [c.source(i, order[0], Kind::B32)?, c.source(i, order[1], Kind::B32)?, c.source(i, order[2], Kind::B32)?];
    let (x, y, z) = (floats(&a), floats(&b), floats(&d));
    finish(c, i, a.undefined | b.undefined | d.undefined, |lane| f(x[lane], y[lane], z[lane]))
}

/// f16 operations compute in f64 and round once.
fn f16_n<const N: usize>(c: &mut Context, i: &Operation, f: impl Fn([u32; N]) -> u32) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let mut sources = Vec::with_capacity(N);
    for index in 1..=N {
        sources.push(c.source(i, index, Kind::F16)?);
    }
    let undefined = sources.iter().fold(0, |undefined, source| undefined | source.undefined);
    lower_half(c, i, |lane| f(std::array::from_fn(|index| sources[index].lanes[lane] & 0xffff)), undefined)
}

fn f16_2(c: &mut Context, i: &Operation, f: impl Fn(f64, f64) -> f64) -> Step {
    f16_n(c, i, |[a, b]| F16.narrow(f(F16.widen(a), F16.widen(b))))
}

fn f64_n<const N: usize>(c: &mut Context, i: &Operation, order: [usize; N], f: impl Fn([f64; N]) -> f64) -> Step {
    reject_halves(i)?;
    reject_clamp(i)?;
    let mut sources = Vec::with_capacity(N);
    for index in order {
        sources.push(c.source_64(i, index, Kind::F64)?);
    }
    let undefined = sources.iter().fold(0, |undefined, (low, high)| undefined | low.undefined | high.undefined);
    let of = |index: usize, lane| {
        let (low, high): &(Value, Value) = &sources[index];
        f64::from_bits(join(low, high, lane))
    };
    write_64(c, i, (undefined, undefined), |lane| f(std::array::from_fn(|index| of(index, lane))).to_bits())
}

/// From f64 to 32 bits.
fn from_f64(c: &mut Context, i: &Operation, f: impl Fn(f64) -> u32) -> Step {
    let (low, high) = c.source_64(i, 1, Kind::F64)?;
    let lanes = each(|lane| f(f64::from_bits(join(&low, &high, lane))));
    c.write(i, 0, Value { lanes, undefined: low.undefined | high.undefined })
}

/// From 32 bits to f64.
fn to_f64(c: &mut Context, i: &Operation, f: impl Fn(u32) -> f64) -> Step {
    let a = c.source(i, 1, Kind::B32)?;
    write_64(c, i, (a.undefined, a.undefined), |lane| f(a.lanes[lane]).to_bits())
}

/// `v_div_scale`: operands are the value, the denominator, the numerator.
fn div_scale_f32(c: &mut Context, i: &Operation) -> Step {
    let [a, b, d] = [c.source(i, 2, Kind::B32)?, c.source(i, 3, Kind::B32)?, c.source(i, 4, Kind::B32)?];
    let undefined = a.undefined | b.undefined | d.undefined;
    let of = |value: &Value, lane: usize| f64::from(f32::from_bits(value.lanes[lane]));
    let results: [(f64, bool); 64] =
        std::array::from_fn(|lane| DIVISION_F32.scale(of(&a, lane), of(&b, lane), of(&d, lane)));
    c.write(i, 0, Value { lanes: each(|lane| (results[lane].0 as f32).to_bits()), undefined })?;
    set_condition(c, i, &results, undefined)
}

fn div_scale_f64(c: &mut Context, i: &Operation) -> Step {
    let [a, b, d] = [c.source_64(i, 2, Kind::F64)?, c.source_64(i, 3, Kind::F64)?, c.source_64(i, 4, Kind::F64)?];
    let undefined = [&a, &b, &d].iter().fold(0, |all, (low, high)| all | low.undefined | high.undefined);
    let of = |(low, high): &(Value, Value), lane: usize| f64::from_bits(join(low, high, lane));
    let results: [(f64, bool); 64] =
        std::array::from_fn(|lane| DIVISION_F64.scale(of(&a, lane), of(&b, lane), of(&d, lane)));
    write_64(c, i, (undefined, undefined), |lane| results[lane].0.to_bits())?;
    set_condition(c, i, &results, undefined)
}

fn set_condition(c: &mut Context, i: &Operation, results: &[(f64, bool); 64], undefined: u64) -> Step {
    let mask = (0..64).fold(0u64, |mask, lane| mask | u64::from(results[lane].1) << lane);
    let exec = c.writes;
    c.wave.set_mask(Context::operand(i, 1)?.operand, Word { value: mask & exec, undefined: undefined & exec })
}

/// The condition that `v_div_fmas` reads without naming it.
fn vcc(c: &Context) -> Result<Word, String> {
    c.wave.mask(Operand::Scalar(VCC))
}

fn div_fmas_f32(c: &mut Context, i: &Operation) -> Step {
    let condition = vcc(c)?;
    let [a, b, d] = [c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?, c.source(i, 3, Kind::B32)?];
    let (x, y, z) = (floats(&a), floats(&b), floats(&d));
    finish(c, i, a.undefined | b.undefined | d.undefined | condition.undefined, |lane| {
        let scale = scale_of(&DIVISION_F32, condition, lane, z[lane].into());
        float::fma_scaled_f32(x[lane], y[lane], z[lane], scale) as f32
    })
}

fn scale_of(division: &Division, condition: Word, lane: usize, addend: f64) -> f64 {
    if condition.value >> lane & 1 == 1 { division.unscale(addend) } else { 1.0 }
}

fn div_fmas_f64(c: &mut Context, i: &Operation) -> Step {
    let condition = vcc(c)?;
    let [a, b, d] = [c.source_64(i, 1, Kind::F64)?, c.source_64(i, 2, Kind::F64)?, c.source_64(i, 3, Kind::F64)?];
    let undefined =
        [&a, &b, &d].iter().fold(condition.undefined, |all, (low, high)| all | low.undefined | high.undefined);
    let of = |(low, high): &(Value, Value), lane: usize| f64::from_bits(join(low, high, lane));
    write_64(c, i, (undefined, undefined), |lane| {
        let z = of(&d, lane);
        let scale = scale_of(&DIVISION_F64, condition, lane, z);
        float::fma_scaled_f64(of(&a, lane), of(&b, lane), z, scale).to_bits()
    })
}

/// Which half of a source is a f16, or f32: `v_fma_mix` and its narrow forms.
fn mix(c: &mut Context, i: &Operation) -> Result<([f32; 64], u64), String> {
    let (low, halves) = (i.modifiers.op_sel, i.modifiers.op_sel_hi.unwrap_or(0));
    let mut sources = [[0f32; 64]; 3];
    let mut undefined = 0;
    for (index, source) in sources.iter_mut().enumerate() {
        let is_half = halves >> index & 1 == 1;
        let own = Context::operand(i, index + 1)?;
        let kind = if is_half { Kind::F16 } else { Kind::B32 };
        let value = c.plain(own, 0, kind)?;
        undefined |= value.undefined;
        for (lane, x) in source.iter_mut().enumerate() {
            let bits = value.lanes[lane];
            *x = match (is_half, low >> index & 1) {
                (false, _) => f32::from_bits(bits),
                (true, half) => f16_to_f32(bits >> (16 * half)),
            };
            *x = if own.absolute { x.abs() } else { *x };
            *x = if own.negate { -*x } else { *x };
        }
    }
    reject_clamp(i)?;
    let [x, y, z] = sources;
    Ok((std::array::from_fn(|lane| x[lane].mul_add(y[lane], z[lane])), undefined))
}

/// The result as f16 into a half of the destination; the other half stays.
fn mix_half(c: &mut Context, i: &Operation, upper: bool) -> Step {
    let (results, undefined) = mix(c, i)?;
    let Operand::Vector(register) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let old = c.wave.raw_vector(register)?;
    let lanes = each(|lane| {
        let half = f32_to_f16(results[lane]);
        if upper { old.lanes[lane] & 0xffff | half << 16 } else { old.lanes[lane] & 0xffff_0000 | half }
    });
    // The second of the two makes the register whole.
    c.write(i, 0, Value { lanes, undefined: undefined | if upper { old.undefined } else { 0 } })
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let handler: Handler = match mnemonic {
        "v_add_f32" => |c, i| f32_2(c, i, |a, b| a + b),
        "v_sub_f32" => |c, i| f32_2(c, i, |a, b| a - b),
        "v_subrev_f32" => |c, i| f32_2(c, i, |a, b| b - a),
        "v_mul_f32" => |c, i| f32_2(c, i, |a, b| a * b),
        "v_max_f32" | "v_max_num_f32" => |c, i| f32_2(c, i, f32::max),
        "v_min_f32" | "v_min_num_f32" => |c, i| f32_2(c, i, f32::min),
        "v_fma_f32" => |c, i| f32_3(c, i, [1, 2, 3], f32::mul_add),
        "v_fmac_f32" => |c, i| f32_3(c, i, [1, 2, 0], f32::mul_add),
        "v_fmaak_f32" | "v_fmamk_f32" => |c, i| f32_3(c, i, [1, 2, 3], f32::mul_add),
        // Not fused: both roundings.
        "v_mac_f32" => |c, i| f32_3(c, i, [1, 2, 0], |a, b, d| flush(flush(a) * flush(b)) + flush(d)),
        "v_mad_f32" | "v_madak_f32" | "v_madmk_f32" => {
            |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| flush(flush(flush(a) * flush(b)) + flush(d)))
        }
        "v_max3_f32" | "v_max3_num_f32" => |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| a.max(b).max(d)),
        "v_min3_f32" | "v_min3_num_f32" => |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| a.min(b).min(d)),
        "v_maxmin_f32" | "v_maxmin_num_f32" => |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| a.max(b).min(d)),
        "v_minmax_f32" | "v_minmax_num_f32" => |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| a.min(b).max(d)),
        "v_med3_f32" | "v_med3_num_f32" => |c, i| f32_3(c, i, [1, 2, 3], float::median),
        "v_exp_f32" | "v_s_exp_f32" => |c, i| of_either(c, i, |a| flush(flush(a).exp2())),
        "v_log_f32" | "v_s_log_f32" => |c, i| of_either(c, i, |a| flush(flush(a).log2())),
        "v_rcp_f32" | "v_rcp_iflag_f32" | "v_s_rcp_f32" => |c, i| of_either(c, i, |a| flush(1.0 / flush(a))),
        "v_rsq_f32" | "v_s_rsq_f32" => |c, i| of_either(c, i, |a| flush((1.0 / f64::from(flush(a)).sqrt()) as f32)),
        "v_sqrt_f32" | "v_s_sqrt_f32" => |c, i| of_either(c, i, |a| flush(flush(a).sqrt())),
        "v_trunc_f32" => |c, i| f32_1(c, i, f32::trunc),
        "v_floor_f32" => |c, i| f32_1(c, i, f32::floor),
        "v_ceil_f32" => |c, i| f32_1(c, i, f32::ceil),
        "v_rndne_f32" => |c, i| f32_1(c, i, f32::round_ties_even),
        "v_fract_f32" => |c, i| f32_1(c, i, |a| (a - a.floor()).min(0.999_999_94)),
        "v_frexp_exp_i32_f32" => |c, i| {
            one(c, i, |a| {
                let x = f64::from(f32::from_bits(a));
                if x == 0.0 || !x.is_finite() { 0 } else { ((x.to_bits() >> 52 & 0x7ff) as i32 - 1022) as u32 }
            })
        },
        "v_frexp_mant_f32" => |c, i| {
            f32_1(c, i, |a| {
                if a == 0.0 || !a.is_finite() {
                    return a;
                }
                let x = f64::from(a);
                (x * 2f64.powi(1022 - (x.to_bits() >> 52 & 0x7ff) as i32)) as f32
            })
        },
        "v_ldexp_f32" => |c, i| {
            let (a, b) = (c.source(i, 1, Kind::B32)?, c.source(i, 2, Kind::B32)?);
            let x = floats(&a);
            finish(c, i, a.undefined | b.undefined, |lane| {
                (f64::from(x[lane]) * 2f64.powi((b.lanes[lane] as i32).clamp(-400, 400))) as f32
            })
        },
        "v_div_scale_f32" => div_scale_f32,
        "v_div_scale_f64" => div_scale_f64,
        "v_div_fmas_f32" => div_fmas_f32,
        "v_div_fmas_f64" => div_fmas_f64,
        "v_div_fixup_f32" => {
            |c, i| f32_3(c, i, [1, 2, 3], |a, b, d| DIVISION_F32.fix_up(a.into(), b.into(), d.into()) as f32)
        }
        "v_div_fixup_f64" => |c, i| f64_n(c, i, [1, 2, 3], |[a, b, d]| DIVISION_F64.fix_up(a, b, d)),
        "v_add_f64" => |c, i| f64_n(c, i, [1, 2], |[a, b]| a + b),
        "v_mul_f64" => |c, i| f64_n(c, i, [1, 2], |[a, b]| a * b),
        "v_max_f64" | "v_max_num_f64" => |c, i| f64_n(c, i, [1, 2], |[a, b]| a.max(b)),
        "v_min_f64" | "v_min_num_f64" => |c, i| f64_n(c, i, [1, 2], |[a, b]| a.min(b)),
        "v_fma_f64" => |c, i| f64_n(c, i, [1, 2, 3], |[a, b, d]| a.mul_add(b, d)),
        "v_fmac_f64" => |c, i| f64_n(c, i, [1, 2, 0], |[a, b, d]| a.mul_add(b, d)),
        "v_rcp_f64" => |c, i| f64_n(c, i, [1], |[a]| 1.0 / a),
        "v_floor_f64" => |c, i| f64_n(c, i, [1], |[a]| a.floor()),
        "v_trunc_f64" => |c, i| f64_n(c, i, [1], |[a]| a.trunc()),
        "v_ldexp_f64" => |c, i| {
            reject_clamp(i)?;
            let ((low, high), by) = (c.source_64(i, 1, Kind::F64)?, c.source(i, 2, Kind::B32)?);
            let undefined = low.undefined | high.undefined | by.undefined;
            write_64(c, i, (undefined, undefined), |lane| {
                let by = (by.lanes[lane] as i32).clamp(-2200, 2200);
                // In two steps, as the power alone may not be a number.
                let x = f64::from_bits(join(&low, &high, lane));
                (x * 2f64.powi(by / 2) * 2f64.powi(by - by / 2)).to_bits()
            })
        },
        "v_cvt_f32_f64" => |c, i| from_f64(c, i, |a| (a as f32).to_bits()),
        "v_cvt_u32_f64" => |c, i| from_f64(c, i, |a| a as u32),
        "v_cvt_i32_f64" => |c, i| from_f64(c, i, |a| a as i32 as u32),
        "v_cvt_f64_f32" => |c, i| to_f64(c, i, |a| f32::from_bits(a).into()),
        "v_cvt_f64_u32" => |c, i| to_f64(c, i, f64::from),
        "v_cvt_f64_i32" => |c, i| to_f64(c, i, |a| (a as i32).into()),
        "v_cvt_f32_u32" => |c, i| one(c, i, |a| (a as f32).to_bits()),
        "v_cvt_f32_i32" => |c, i| one(c, i, |a| (a as i32 as f32).to_bits()),
        "v_cvt_u32_f32" => |c, i| one(c, i, |a| f32::from_bits(a) as u32),
        "v_cvt_i32_f32" => |c, i| one(c, i, |a| f32::from_bits(a) as i32 as u32),
        "v_cvt_f32_ubyte0" => |c, i| one(c, i, |a| ((a & 0xff) as f32).to_bits()),
        "v_cvt_f32_ubyte1" => |c, i| one(c, i, |a| ((a >> 8 & 0xff) as f32).to_bits()),
        "v_cvt_f32_ubyte2" => |c, i| one(c, i, |a| ((a >> 16 & 0xff) as f32).to_bits()),
        "v_cvt_f32_ubyte3" => |c, i| one(c, i, |a| ((a >> 24) as f32).to_bits()),
        "v_cvt_f32_f16" => |c, i| {
            let a = c.source(i, 1, Kind::F16)?;
            finish(c, i, a.undefined, |lane| f16_to_f32(a.lanes[lane]))
        },
        "v_cvt_f16_f32" => |c, i| {
            reject_halves(i)?;
            reject_clamp(i)?;
            let a = c.source(i, 1, Kind::B32)?;
            lower_half(c, i, |lane| f32_to_f16(f32::from_bits(a.lanes[lane])), a.undefined)
        },
        "v_add_f16" => |c, i| f16_2(c, i, |a, b| a + b),
        "v_sub_f16" => |c, i| f16_2(c, i, |a, b| a - b),
        "v_subrev_f16" => |c, i| f16_2(c, i, |a, b| b - a),
        "v_mul_f16" => |c, i| f16_2(c, i, |a, b| a * b),
        "v_max_f16" | "v_max_num_f16" => |c, i| f16_2(c, i, f64::max),
        "v_min_f16" | "v_min_num_f16" => |c, i| f16_2(c, i, f64::min),
        "v_fma_f16" => |c, i| f16_n(c, i, |[a, b, d]| float::fma_f16(a, b, d)),
        "v_fma_mix_f32" => |c, i| {
            let (results, undefined) = mix(c, i)?;
            c.write(i, 0, Value { lanes: each(|lane| results[lane].to_bits()), undefined })
        },
        "v_fma_mixlo_f16" => |c, i| mix_half(c, i, false),
        "v_fma_mixhi_f16" => |c, i| mix_half(c, i, true),
        _ => return None,
    };
    Some(handler)
}

/// Transcendental operations: gfx12 has them for scalar registers too.
fn of_either(c: &mut Context, i: &Operation, f: impl Fn(f32) -> f32) -> Step {
    if !i.mnemonic.starts_with("v_s_") {
        return f32_1(c, i, f);
    }
    reject_clamp(i)?;
    let source = Context::operand(i, 1)?;
    let a = c.scalar(i, 1, 1)?;
    let x = f32::from_bits(a.value as u32);
    let x = if source.absolute { x.abs() } else { x };
    let result = f(if source.negate { -x } else { x });
    c.set_scalar(i, 0, Word::with(result.to_bits().into(), a.undefined as u32 != 0), 1)
}
