//! Scalar operations, branches and waits.

use crate::context::Context;
use crate::handlers::Handler;
use crate::instruction::{EXEC, Operand, Operation, VCC};
use crate::waits::Counter;
use crate::wave::{Step, Wave, Word};

const SCC_KEPT: Option<bool> = None;

/// `d = f(a, b)` of 32 bits, with what the scalar condition becomes.
fn two(c: &mut Context, i: &Operation, f: impl Fn(u32, u32) -> (u32, Option<bool>)) -> Step {
    let (a, b) = (c.scalar(i, 1, 1)?, c.scalar(i, 2, 1)?);
    finish(c, i, 1, f(a.value as u32, b.value as u32), a.undefined as u32 != 0 || b.undefined as u32 != 0)
}

/// `d = f(a)` of 32 bits.
fn one(c: &mut Context, i: &Operation, f: impl Fn(u32) -> (u32, Option<bool>)) -> Step {
    let a = c.scalar(i, 1, 1)?;
    finish(c, i, 1, f(a.value as u32), a.undefined as u32 != 0)
}

/// `d = f(d, constant)` of 32 bits: a constant of 16 bits.
fn with_constant(c: &mut Context, i: &Operation, f: impl Fn(u32, u32) -> (u32, Option<bool>)) -> Step {
    let (a, b) = (c.scalar(i, 0, 1)?, c.scalar(i, 1, 1)?.value as u16 as i16 as u32);
    finish(c, i, 1, f(a.value as u32, b), a.undefined as u32 != 0)
}

/// `d = f(a, b)` of 64 bits; `b` has `width` registers.
fn two_64(c: &mut Context, i: &Operation, width: usize, f: impl Fn(u64, u64) -> (u64, Option<bool>)) -> Step {
    let (a, b) = (c.scalar(i, 1, 2)?, c.scalar(i, 2, width)?);
    finish(c, i, 2, f(a.value, b.value), a.undefined != 0 || b.undefined != 0)
}

fn finish(
    c: &mut Context,
    i: &Operation,
    count: usize,
    (value, scc): (impl Into<u64>, Option<bool>),
    undefined: bool,
) -> Step {
    c.set_scalar(i, 0, Word::with(value.into(), undefined), count)?;
    if let Some(scc) = scc {
        (c.wave.scc, c.wave.scc_undefined) = (scc, undefined);
    }
    Ok(())
}

fn f32s(c: &mut Context, i: &Operation, f: impl Fn(f32, f32) -> f32) -> Step {
    two(c, i, |a, b| (f(f32::from_bits(a), f32::from_bits(b)).to_bits(), SCC_KEPT))
}

/// `and`, `or` and the like: bit by bit, the scalar condition says whether anything is left.
fn logic(c: &mut Context, i: &Operation, count: usize, f: impl Fn(Word, Word) -> Word) -> Step {
    let result = f(c.scalar(i, 1, count)?, c.scalar(i, 2, count)?);
    c.set_scalar(i, 0, result, count)?;
    (c.wave.scc, c.wave.scc_undefined) = result.is_not_zero(32 * count as u32);
    Ok(())
}

/// `d = EXEC; EXEC = f(a, EXEC)`.
fn save_exec(c: &mut Context, i: &Operation, f: impl Fn(Word, Word) -> Word) -> Step {
    let count = c.wave.mask_registers();
    let (a, exec) = (c.scalar(i, 1, count)?, Word::of(c.wave.exec));
    let result = f(a, exec);
    c.set_scalar(i, 0, exec, count)?;
    c.wave.set_scalar(EXEC, result, count)?;
    (c.wave.scc, c.wave.scc_undefined) = result.is_not_zero(32 * count as u32);
    Ok(())
}

/// Moves and the like keep which bits are undefined.
fn keep(c: &mut Context, i: &Operation, count: usize, f: impl Fn(u64) -> u64) -> Step {
    let a = c.scalar(i, 1, count)?;
    c.set_scalar(i, 0, Word { value: f(a.value), undefined: f(a.undefined) }, count)
}

fn compare<T>(c: &mut Context, i: &Operation, count: usize, of: impl Fn(u64) -> T, f: impl Fn(T, T) -> bool) -> Step {
    let (a, b) = (c.scalar(i, 0, count)?, c.scalar(i, 1, count)?);
    let mask = if count == 1 { 0xffff_ffff } else { !0 };
    c.wave.scc = f(of(a.value), of(b.value));
    c.wave.scc_undefined = (a.undefined | b.undefined) & mask != 0;
    Ok(())
}

fn select(c: &mut Context, i: &Operation, count: usize) -> Step {
    let (a, b) = (c.scalar(i, 1, count)?, c.scalar(i, 2, count)?);
    let chosen = if c.wave.scc { a } else { b };
    let undefined = if c.wave.scc_undefined { !0 } else { chosen.undefined };
    c.set_scalar(i, 0, Word { value: chosen.value, undefined }, count)
}

fn add(a: u32, b: u32, carry: bool) -> (u32, Option<bool>) {
    let sum = u64::from(a) + u64::from(b) + u64::from(carry);
    (sum as u32, Some(sum >> 32 != 0))
}

fn subtract(a: u32, b: u32, borrow: bool) -> (u32, Option<bool>) {
    let difference = i64::from(a) - i64::from(b) - i64::from(borrow);
    (difference as u32, Some(difference < 0))
}

/// Both operands and the condition before.
fn with_carry(c: &mut Context, i: &Operation, f: fn(u32, u32, bool) -> (u32, Option<bool>)) -> Step {
    let carry = c.wave.condition()?;
    two(c, i, |a, b| f(a, b, carry))
}

fn signed(pair: (i32, bool)) -> (u32, Option<bool>) {
    (pair.0 as u32, Some(pair.1))
}

fn nonzero(value: u32) -> (u32, Option<bool>) {
    (value, Some(value != 0))
}

fn bit_compare(c: &mut Context, i: &Operation, wanted: u32) -> Step {
    let (a, b) = (c.scalar(i, 0, 1)?, c.scalar(i, 1, 1)?);
    let at = b.value & 31;
    (c.wave.scc, c.wave.scc_undefined) =
        ((a.value >> at & 1) as u32 == wanted, (a.undefined >> at & 1) != 0 || b.undefined as u32 != 0);
    Ok(())
}

/// Bits from the sign on that are equal to it, -1 if all are.
fn leading_sign_bits(a: u32) -> (u32, Option<bool>) {
    let same = if a as i32 >= 0 { a.leading_zeros() } else { (!a).leading_zeros() };
    (if same == 32 { !0 } else { same }, SCC_KEPT)
}

fn float_compare(c: &mut Context, i: &Operation, f: impl Fn(f32, f32) -> bool) -> Step {
    compare(c, i, 1, |bits| f32::from_bits(bits as u32), f)
}

/// To an integer: NaN is 0, what does not fit is the nearest that does; as Rust converts.
pub fn to_u32(x: f32) -> u32 {
    x as u32
}

fn wait(c: &mut Context, i: &Operation) -> Step {
    use Counter::{Load, Scalar, Shared, Store};
    for (name, limit) in &i.counters {
        let limit = *limit as usize;
        match (name.as_str(), c.target.generation) {
            ("vmcnt", 9) => c.wave.waits.wait(&[Load, Store], limit),
            ("vmcnt", _) => c.wave.waits.wait(&[Load], limit),
            ("lgkmcnt", _) => c.wave.waits.wait(&[Shared, Scalar], limit),
            ("expcnt", _) => {}
            _ => return Err(format!("counter {name} is not known here")),
        }
    }
    Ok(())
}

fn wait_for(c: &mut Context, counter: Counter, word: i64) -> Step {
    c.wave.waits.wait(&[counter], (word & 0x3f) as usize);
    Ok(())
}

fn immediate(i: &Operation, index: usize) -> Result<i64, String> {
    match Context::operand(i, index)?.operand {
        Operand::Integer(number) => Ok(number),
        _ => Err("no constant".into()),
    }
}

pub fn is_branch(mnemonic: &str) -> bool {
    mnemonic == "s_branch" || mnemonic.starts_with("s_cbranch_")
}

/// Whether a branch is taken.
pub fn takes(wave: &Wave, mnemonic: &str) -> Result<bool, String> {
    let vcc = || -> Result<bool, String> {
        let (is_not_zero, undefined) = wave.scalar(VCC, wave.mask_registers())?.is_not_zero(wave.width as u32);
        if undefined { Err("VCC is undefined and decides".into()) } else { Ok(is_not_zero) }
    };
    match mnemonic {
        "s_branch" => Ok(true),
        "s_cbranch_scc0" => Ok(!wave.condition()?),
        "s_cbranch_scc1" => wave.condition(),
        "s_cbranch_execz" => Ok(wave.exec == 0),
        "s_cbranch_execnz" => Ok(wave.exec != 0),
        "s_cbranch_vccz" => Ok(!vcc()?),
        "s_cbranch_vccnz" => vcc(),
        _ => Err("a branch that is not known here".into()),
    }
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let handler: Handler = match mnemonic {
        "s_mov_b32" => |c, i| keep(c, i, 1, |a| a),
        "s_mov_b64" => |c, i| keep(c, i, 2, |a| a),
        // The address after it, in the code object: `Wave::pc` is that of the instruction being done.
        "s_getpc_b64" => |c, i| c.set_scalar(i, 0, Word::of(c.wave.pc + 4), 2),
        "s_setpc_b64" => |_, _| Ok(()), // launch.rs does it
        "s_not_b32" => |c, i| one_logic(c, i, 1),
        "s_not_b64" => |c, i| one_logic(c, i, 2),
        "s_brev_b32" => |c, i| keep(c, i, 1, |a| (a as u32).reverse_bits().into()),
        "s_movk_i32" => |c, i| one(c, i, |a| (a as u16 as i16 as u32, SCC_KEPT)),
        "s_and_b32" => |c, i| logic(c, i, 1, Word::and),
        "s_and_b64" => |c, i| logic(c, i, 2, Word::and),
        "s_or_b32" => |c, i| logic(c, i, 1, Word::or),
        "s_or_b64" => |c, i| logic(c, i, 2, Word::or),
        "s_xor_b32" => |c, i| logic(c, i, 1, Word::xor),
        "s_xor_b64" => |c, i| logic(c, i, 2, Word::xor),
        "s_andn2_b32" | "s_and_not1_b32" => |c, i| logic(c, i, 1, |a, b| a.and(b.not())),
        "s_andn2_b64" | "s_and_not1_b64" => |c, i| logic(c, i, 2, |a, b| a.and(b.not())),
        "s_orn2_b32" | "s_or_not1_b32" => |c, i| logic(c, i, 1, |a, b| a.or(b.not())),
        "s_orn2_b64" | "s_or_not1_b64" => |c, i| logic(c, i, 2, |a, b| a.or(b.not())),
        "s_nand_b32" => |c, i| logic(c, i, 1, |a, b| a.and(b).not()),
        "s_nand_b64" => |c, i| logic(c, i, 2, |a, b| a.and(b).not()),
        "s_nor_b32" => |c, i| logic(c, i, 1, |a, b| a.or(b).not()),
        "s_nor_b64" => |c, i| logic(c, i, 2, |a, b| a.or(b).not()),
        "s_xnor_b32" => |c, i| logic(c, i, 1, |a, b| a.xor(b).not()),
        "s_xnor_b64" => |c, i| logic(c, i, 2, |a, b| a.xor(b).not()),
        "s_and_saveexec_b32" | "s_and_saveexec_b64" => |c, i| save_exec(c, i, Word::and),
        "s_or_saveexec_b32" | "s_or_saveexec_b64" => |c, i| save_exec(c, i, Word::or),
        "s_xor_saveexec_b32" | "s_xor_saveexec_b64" => |c, i| save_exec(c, i, Word::xor),
        "s_andn2_saveexec_b32" | "s_andn2_saveexec_b64" | "s_and_not1_saveexec_b32" | "s_and_not1_saveexec_b64" => {
            |c, i| save_exec(c, i, |a, exec| a.and(exec.not()))
        }
        "s_andn1_saveexec_b64" | "s_and_not0_saveexec_b32" | "s_and_not0_saveexec_b64" => {
            |c, i| save_exec(c, i, |a, exec| a.not().and(exec))
        }
        "s_lshl_b32" => |c, i| two(c, i, |a, b| nonzero(a << (b & 31))),
        "s_lshr_b32" => |c, i| two(c, i, |a, b| nonzero(a >> (b & 31))),
        "s_ashr_i32" => |c, i| two(c, i, |a, b| nonzero((a as i32 >> (b & 31)) as u32)),
        "s_lshl_b64" => |c, i| two_64(c, i, 1, |a, b| (a << (b & 63), Some(a << (b & 63) != 0))),
        "s_lshr_b64" => |c, i| two_64(c, i, 1, |a, b| (a >> (b & 63), Some(a >> (b & 63) != 0))),
        "s_ashr_i64" => |c, i| two_64(c, i, 1, |a, b| ((a as i64 >> (b & 63)) as u64, Some(a as i64 >> (b & 63) != 0))),
        "s_add_u32" | "s_add_co_u32" => |c, i| two(c, i, |a, b| add(a, b, false)),
        "s_addc_u32" | "s_add_co_ci_u32" => |c, i| with_carry(c, i, add),
        "s_sub_u32" | "s_sub_co_u32" => |c, i| two(c, i, |a, b| subtract(a, b, false)),
        "s_subb_u32" | "s_sub_co_ci_u32" => |c, i| with_carry(c, i, subtract),
        "s_add_i32" | "s_add_co_i32" => |c, i| two(c, i, |a, b| signed((a as i32).overflowing_add(b as i32))),
        "s_sub_i32" | "s_sub_co_i32" => |c, i| two(c, i, |a, b| signed((a as i32).overflowing_sub(b as i32))),
        "s_addk_i32" | "s_addk_co_i32" => {
            |c, i| with_constant(c, i, |a, b| signed((a as i32).overflowing_add(b as i32)))
        }
        "s_mulk_i32" => |c, i| with_constant(c, i, |a, b| (a.wrapping_mul(b), SCC_KEPT)),
        "s_add_nc_u64" | "s_add_u64" => |c, i| two_64(c, i, 2, |a, b| (a.wrapping_add(b), SCC_KEPT)),
        "s_sub_nc_u64" | "s_sub_u64" => |c, i| two_64(c, i, 2, |a, b| (a.wrapping_sub(b), SCC_KEPT)),
        "s_mul_i32" => |c, i| two(c, i, |a, b| (a.wrapping_mul(b), SCC_KEPT)),
        "s_mul_u64" => |c, i| two_64(c, i, 2, |a, b| (a.wrapping_mul(b), SCC_KEPT)),
        "s_mul_hi_u32" => |c, i| two(c, i, |a, b| (((u64::from(a) * u64::from(b)) >> 32) as u32, SCC_KEPT)),
        "s_mul_hi_i32" => {
            |c, i| two(c, i, |a, b| (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32, SCC_KEPT))
        }
        "s_lshl1_add_u32" => |c, i| two(c, i, |a, b| shift_add(a, b, 1)),
        "s_lshl2_add_u32" => |c, i| two(c, i, |a, b| shift_add(a, b, 2)),
        "s_lshl3_add_u32" => |c, i| two(c, i, |a, b| shift_add(a, b, 3)),
        "s_lshl4_add_u32" => |c, i| two(c, i, |a, b| shift_add(a, b, 4)),
        "s_min_i32" => |c, i| two(c, i, |a, b| ((a as i32).min(b as i32) as u32, Some((a as i32) < b as i32))),
        "s_max_i32" => |c, i| maximum(c, i, |a| i64::from(a as i32)),
        "s_min_u32" => |c, i| two(c, i, |a, b| (a.min(b), Some(a < b))),
        "s_max_u32" => |c, i| maximum(c, i, i64::from),
        "s_abs_i32" => |c, i| one(c, i, |a| nonzero((a as i32).unsigned_abs())),
        "s_sext_i32_i8" => |c, i| one(c, i, |a| (a as i8 as u32, SCC_KEPT)),
        "s_sext_i32_i16" => |c, i| one(c, i, |a| (a as i16 as u32, SCC_KEPT)),
        "s_bfe_u32" => |c, i| two(c, i, |a, b| nonzero(extract(a, b))),
        "s_bfe_i32" => |c, i| two(c, i, |a, b| nonzero(extract_signed(a, b))),
        "s_bfm_b32" => |c, i| two(c, i, |a, b| (((1u32 << (a & 31)) - 1) << (b & 31), SCC_KEPT)),
        "s_pack_ll_b32_b16" => |c, i| two(c, i, |a, b| (a & 0xffff | b << 16, SCC_KEPT)),
        "s_pack_lh_b32_b16" => |c, i| two(c, i, |a, b| (a & 0xffff | b & 0xffff_0000, SCC_KEPT)),
        "s_pack_hh_b32_b16" => |c, i| two(c, i, |a, b| (a >> 16 | b & 0xffff_0000, SCC_KEPT)),
        "s_bitcmp0_b32" => |c, i| bit_compare(c, i, 0),
        "s_bitcmp1_b32" => |c, i| bit_compare(c, i, 1),
        "s_bcnt1_i32_b32" => |c, i| one(c, i, |a| nonzero(a.count_ones())),
        "s_bcnt1_i32_b64" => |c, i| of_64(c, i, |a| nonzero(a.count_ones())),
        "s_ff1_i32_b32" | "s_ctz_i32_b32" => {
            |c, i| one(c, i, |a| (if a == 0 { !0 } else { a.trailing_zeros() }, SCC_KEPT))
        }
        "s_ff1_i32_b64" | "s_ctz_i32_b64" => {
            |c, i| of_64(c, i, |a| (if a == 0 { !0 } else { a.trailing_zeros() }, SCC_KEPT))
        }
        "s_flbit_i32_b32" | "s_clz_i32_u32" => {
            |c, i| one(c, i, |a| (if a == 0 { !0 } else { a.leading_zeros() }, SCC_KEPT))
        }
        "s_flbit_i32" | "s_cls_i32" => |c, i| one(c, i, leading_sign_bits),
        "s_cselect_b32" => |c, i| select(c, i, 1),
        "s_cselect_b64" => |c, i| select(c, i, 2),
        "s_cvt_f32_u32" => |c, i| one(c, i, |a| ((a as f32).to_bits(), SCC_KEPT)),
        "s_cvt_f32_i32" => |c, i| one(c, i, |a| ((a as i32 as f32).to_bits(), SCC_KEPT)),
        "s_cvt_u32_f32" => |c, i| one(c, i, |a| (to_u32(f32::from_bits(a)), SCC_KEPT)),
        "s_cvt_i32_f32" => |c, i| one(c, i, |a| (f32::from_bits(a) as i32 as u32, SCC_KEPT)),
        "s_trunc_f32" => |c, i| one(c, i, |a| (f32::from_bits(a).trunc().to_bits(), SCC_KEPT)),
        "s_rndne_f32" => |c, i| one(c, i, |a| (f32::from_bits(a).round_ties_even().to_bits(), SCC_KEPT)),
        "s_add_f32" => |c, i| f32s(c, i, |a, b| a + b),
        "s_sub_f32" => |c, i| f32s(c, i, |a, b| a - b),
        "s_mul_f32" => |c, i| f32s(c, i, |a, b| a * b),
        "s_max_f32" | "s_max_num_f32" => |c, i| f32s(c, i, f32::max),
        "s_min_f32" | "s_min_num_f32" => |c, i| f32s(c, i, f32::min),
        "s_fmac_f32" => |c, i| fused(c, i, [1, 2, 0]),
        "s_fmaak_f32" | "s_fmamk_f32" => |c, i| fused(c, i, [1, 2, 3]),
        "s_cmp_eq_u32" | "s_cmp_eq_i32" | "s_cmpk_eq_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a == b),
        "s_cmp_lg_u32" | "s_cmp_lg_i32" | "s_cmpk_lg_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a != b),
        "s_cmp_gt_u32" | "s_cmpk_gt_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a > b),
        "s_cmp_ge_u32" | "s_cmpk_ge_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a >= b),
        "s_cmp_lt_u32" | "s_cmpk_lt_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a < b),
        "s_cmp_le_u32" | "s_cmpk_le_u32" => |c, i| compare(c, i, 1, |a| a as u32, |a, b| a <= b),
        "s_cmp_gt_i32" => |c, i| compare(c, i, 1, |a| a as i32, |a, b| a > b),
        "s_cmp_ge_i32" => |c, i| compare(c, i, 1, |a| a as i32, |a, b| a >= b),
        "s_cmp_lt_i32" => |c, i| compare(c, i, 1, |a| a as i32, |a, b| a < b),
        "s_cmp_le_i32" => |c, i| compare(c, i, 1, |a| a as i32, |a, b| a <= b),
        "s_cmpk_eq_i32" => |c, i| compare_constant(c, i, |a, b| a == b),
        "s_cmpk_lg_i32" => |c, i| compare_constant(c, i, |a, b| a != b),
        "s_cmpk_gt_i32" => |c, i| compare_constant(c, i, |a, b| a > b),
        "s_cmpk_ge_i32" => |c, i| compare_constant(c, i, |a, b| a >= b),
        "s_cmpk_lt_i32" => |c, i| compare_constant(c, i, |a, b| a < b),
        "s_cmpk_le_i32" => |c, i| compare_constant(c, i, |a, b| a <= b),
        "s_cmp_eq_u64" => |c, i| compare(c, i, 2, |a| a, |a, b| a == b),
        "s_cmp_lg_u64" => |c, i| compare(c, i, 2, |a| a, |a, b| a != b),
        "s_cmp_eq_f32" => |c, i| float_compare(c, i, |a, b| a == b),
        "s_cmp_neq_f32" => |c, i| float_compare(c, i, |a, b| a != b),
        "s_cmp_lt_f32" => |c, i| float_compare(c, i, |a, b| a < b),
        "s_cmp_le_f32" => |c, i| float_compare(c, i, |a, b| a <= b),
        "s_cmp_gt_f32" => |c, i| float_compare(c, i, |a, b| a > b),
        "s_cmp_ge_f32" => |c, i| float_compare(c, i, |a, b| a >= b),
        "s_cmp_ngt_f32" => |c, i| float_compare(c, i, |a, b| !f32::gt(&a, &b)),
        "s_cmp_nlt_f32" => |c, i| float_compare(c, i, |a, b| !f32::lt(&a, &b)),
        "s_cmp_nge_f32" => |c, i| float_compare(c, i, |a, b| !f32::ge(&a, &b)),
        "s_cmp_nle_f32" => |c, i| float_compare(c, i, |a, b| !f32::le(&a, &b)),
        "s_cmp_u_f32" => |c, i| float_compare(c, i, |a, b| a.is_nan() || b.is_nan()),
        "s_cmp_o_f32" => |c, i| float_compare(c, i, |a, b| !a.is_nan() && !b.is_nan()),
        "s_waitcnt" => wait,
        "s_waitcnt_vscnt" => |c, i| wait_for(c, Counter::Store, immediate(i, 1)?),
        "s_waitcnt_vmcnt" => |c, i| wait_for(c, Counter::Load, immediate(i, 1)?),
        "s_wait_loadcnt" => |c, i| wait_for(c, Counter::Load, immediate(i, 0)?),
        "s_wait_storecnt" => |c, i| wait_for(c, Counter::Store, immediate(i, 0)?),
        "s_wait_dscnt" => |c, i| wait_for(c, Counter::Shared, immediate(i, 0)?),
        "s_wait_kmcnt" => |c, i| wait_for(c, Counter::Scalar, immediate(i, 0)?),
        "s_wait_loadcnt_dscnt" => |c, i| {
            wait_for(c, Counter::Load, immediate(i, 0)? >> 8)?;
            wait_for(c, Counter::Shared, immediate(i, 0)?)
        },
        "s_wait_storecnt_dscnt" => |c, i| {
            wait_for(c, Counter::Store, immediate(i, 0)? >> 8)?;
            wait_for(c, Counter::Shared, immediate(i, 0)?)
        },
        _ => return None,
    };
    Some(handler)
}

fn one_logic(c: &mut Context, i: &Operation, count: usize) -> Step {
    let result = c.scalar(i, 1, count)?.not();
    c.set_scalar(i, 0, result, count)?;
    (c.wave.scc, c.wave.scc_undefined) = result.is_not_zero(32 * count as u32);
    Ok(())
}

fn of_64(c: &mut Context, i: &Operation, f: impl Fn(u64) -> (u32, Option<bool>)) -> Step {
    let a = c.scalar(i, 1, 2)?;
    finish(c, i, 1, f(a.value), a.undefined != 0)
}

/// Of equal numbers manuals disagree on which is the larger one: the condition is undefined.
fn maximum(c: &mut Context, i: &Operation, of: impl Fn(u32) -> i64) -> Step {
    let (a, b) = (c.scalar(i, 1, 1)?.value as u32, c.scalar(i, 2, 1)?.value as u32);
    two(c, i, |a, b| (if of(a) > of(b) { a } else { b }, Some(of(a) > of(b))))?;
    c.wave.scc_undefined |= a == b;
    Ok(())
}

fn shift_add(a: u32, b: u32, by: u32) -> (u32, Option<bool>) {
    let sum = (u64::from(a) << by) + u64::from(b);
    (sum as u32, Some(sum >> 32 != 0))
}

fn extract(a: u32, b: u32) -> u32 {
    let (at, width) = (b & 31, (b >> 16 & 127).min(32));
    if width == 0 { 0 } else { ((u64::from(a) >> at) & ((1u64 << width) - 1)) as u32 }
}

fn extract_signed(a: u32, b: u32) -> u32 {
    let width = (b >> 16 & 127).min(32);
    if width == 0 { 0 } else { ((extract(a, b) << (32 - width)) as i32 >> (32 - width)) as u32 }
}

fn compare_constant(c: &mut Context, i: &Operation, f: impl Fn(i32, i32) -> bool) -> Step {
    let (a, b) = (c.scalar(i, 0, 1)?, c.scalar(i, 1, 1)?.value as u16 as i16);
    (c.wave.scc, c.wave.scc_undefined) = (f(a.value as u32 as i32, b.into()), a.undefined as u32 != 0);
    Ok(())
}

fn fused(c: &mut Context, i: &Operation, order: [usize; 3]) -> Step {
    let [a, b, d] = [c.scalar(i, order[0], 1)?, c.scalar(i, order[1], 1)?, c.scalar(i, order[2], 1)?];
    let of = |word: Word| f32::from_bits(word.value as u32);
    let undefined = (a.undefined | b.undefined | d.undefined) as u32 != 0;
    finish(c, i, 1, (of(a).mul_add(of(b), of(d)).to_bits(), SCC_KEPT), undefined)
}
