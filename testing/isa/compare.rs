//! Comparisons: `v_cmp_<relation>_<type>` writes a mask of lanes, `v_cmpx_..` EXEC.
//!
//! A relation is a set of the four ways in which two numbers can stand to each other.

use std::cmp::Ordering;

use crate::context::{Context, Kind, reject_clamp, reject_halves};
use crate::float::F16;
use crate::handlers::Handler;
use crate::instruction::{EXEC, Operand, Operation};
use crate::vector::join;
use crate::wave::{Step, Word};

const LESS: u32 = 1;
const EQUAL: u32 = 2;
const GREATER: u32 = 4;
const UNORDERED: u32 = 8;

fn split(mnemonic: &str) -> Option<(&str, &str)> {
    let rest = mnemonic.strip_prefix("v_cmpx_").or_else(|| mnemonic.strip_prefix("v_cmp_"))?;
    rest.rsplit_once('_')
}

pub fn detail(mnemonic: &str) -> Option<u32> {
    let (relation, kind) = split(mnemonic)?;
    let floating = kind.starts_with('f');
    Some(match relation {
        "lt" => LESS,
        "eq" => EQUAL,
        "le" => LESS | EQUAL,
        "gt" => GREATER,
        "lg" => LESS | GREATER,
        "ge" => GREATER | EQUAL,
        "ne" if !floating => LESS | GREATER,
        "o" => LESS | EQUAL | GREATER,
        "u" => UNORDERED,
        "nge" => UNORDERED | LESS,
        "nlg" => UNORDERED | EQUAL,
        "ngt" => UNORDERED | LESS | EQUAL,
        "nle" => UNORDERED | GREATER,
        "neq" => UNORDERED | LESS | GREATER,
        "nlt" => UNORDERED | GREATER | EQUAL,
        "class" => 0,
        _ => return None,
    })
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let (relation, kind) = split(mnemonic)?;
    let handler: Handler = match (relation, kind) {
        ("class", "f32") => |c, i| narrow(c, i, Kind::B32, class),
        ("class", _) => return None,
        (_, "u32") => |c, i| narrow(c, i, Kind::B32, |a, b| holds(i, a.cmp(&b).into())),
        (_, "i32") => |c, i| narrow(c, i, Kind::B32, |a, b| holds(i, (a as i32).cmp(&(b as i32)).into())),
        (_, "u16") => |c, i| narrow(c, i, Kind::F16, |a, b| holds(i, (a as u16).cmp(&(b as u16)).into())),
        (_, "i16") => |c, i| narrow(c, i, Kind::F16, |a, b| holds(i, (a as i16).cmp(&(b as i16)).into())),
        (_, "f32") => {
            |c, i| narrow(c, i, Kind::B32, |a, b| holds(i, f32::from_bits(a).partial_cmp(&f32::from_bits(b))))
        }
        (_, "f16") => {
            |c, i| narrow(c, i, Kind::F16, |a, b| holds(i, F16.widen(a & 0xffff).partial_cmp(&F16.widen(b & 0xffff))))
        }
        (_, "u64") => |c, i| wide(c, i, Kind::U64, |a, b| holds(i, a.cmp(&b).into())),
        (_, "i64") => |c, i| wide(c, i, Kind::I64, |a, b| holds(i, (a as i64).cmp(&(b as i64)).into())),
        (_, "f64") => |c, i| wide(c, i, Kind::F64, |a, b| holds(i, f64::from_bits(a).partial_cmp(&f64::from_bits(b)))),
        _ => return None,
    };
    Some(handler)
}

fn holds(i: &Operation, order: Option<Ordering>) -> bool {
    let way = match order {
        Some(Ordering::Less) => LESS,
        Some(Ordering::Equal) => EQUAL,
        Some(Ordering::Greater) => GREATER,
        None => UNORDERED,
    };
    i.detail & way != 0
}

/// Which kinds of number a mask asks for: signalling NaN, quiet NaN, then from -infinity to +infinity.
fn class(a: u32, mask: u32) -> bool {
    let (x, negative) = (f32::from_bits(a), a >> 31 == 1);
    let by_sign = |minus: u32, plus: u32| if negative { minus } else { plus };
    let bit = match x.classify() {
        std::num::FpCategory::Nan => u32::from(a >> 22 & 1 == 1),
        std::num::FpCategory::Infinite => by_sign(2, 9),
        std::num::FpCategory::Normal => by_sign(3, 8),
        std::num::FpCategory::Subnormal => by_sign(4, 7),
        std::num::FpCategory::Zero => by_sign(5, 6),
    };
    mask >> bit & 1 == 1
}

/// The first source: comparisons that write EXEC alone, from gfx10 on, name no destination.
fn first_source(c: &Context, i: &Operation) -> usize {
    usize::from(!(i.mnemonic.starts_with("v_cmpx") && c.target.generation > 9))
}

fn narrow(c: &mut Context, i: &Operation, kind: Kind, f: impl Fn(u32, u32) -> bool) -> Step {
    reject_halves(i)?;
    let first = first_source(c, i);
    let (a, b) = (c.source(i, first, kind)?, c.source(i, first + 1, kind)?);
    let mask = (0..c.wave.width).fold(0u64, |mask, lane| mask | u64::from(f(a.lanes[lane], b.lanes[lane])) << lane);
    finish(c, i, mask, a.undefined | b.undefined)
}

fn wide(c: &mut Context, i: &Operation, kind: Kind, f: impl Fn(u64, u64) -> bool) -> Step {
    let first = first_source(c, i);
    let ((a, b), (d, e)) = (c.source_64(i, first, kind)?, c.source_64(i, first + 1, kind)?);
    let mask =
        (0..c.wave.width).fold(0u64, |mask, lane| mask | u64::from(f(join(&a, &b, lane), join(&d, &e, lane))) << lane);
    finish(c, i, mask, a.undefined | b.undefined | d.undefined | e.undefined)
}

fn finish(c: &mut Context, i: &Operation, mask: u64, undefined: u64) -> Step {
    reject_clamp(i)?;
    let lanes = c.writes;
    let word = Word { value: mask & lanes, undefined: undefined & lanes };
    if first_source(c, i) == 1 {
        c.wave.set_mask(Context::operand(i, 0)?.operand, word)?;
    }
    if i.mnemonic.starts_with("v_cmpx") {
        c.wave.set_mask(Operand::Scalar(EXEC), word)?;
    }
    Ok(())
}
