//! What an instruction works on, and how its operands are read and written: kinds of constants, negation and absolute
//! value, parts of registers (SDWA), lanes moved (DPP), clamping.

use crate::float;
use crate::instruction::{Modifiers, Move, Operand, Operation, Source, WHOLE};
use crate::memory::DeviceMemory;
use crate::shared::Shared;
use crate::wave::{Lanes, Step, Value, Wave, Word};

/// What differs between architectures.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub name: &'static str,
    /// 9, 11 or 12.
    pub generation: u8,
    pub wave: usize,
    /// Whether the FP8 conversions and products are FNUZ.
    pub fnuz: bool,
    /// Of `e_flags`.
    pub machine: u8,
}

pub const TARGETS: [Target; 5] = [
    Target { name: "gfx90a", generation: 9, wave: 64, fnuz: false, machine: 0x3f },
    Target { name: "gfx942", generation: 9, wave: 64, fnuz: true, machine: 0x4c },
    Target { name: "gfx950", generation: 9, wave: 64, fnuz: false, machine: 0x4f },
    Target { name: "gfx1100", generation: 11, wave: 32, fnuz: false, machine: 0x41 },
    Target { name: "gfx1201", generation: 12, wave: 32, fnuz: false, machine: 0x4e },
];

pub struct Context<'a> {
    pub wave: &'a mut Wave,
    pub shared: &'a mut Shared,
    pub memory: &'a DeviceMemory,
    pub target: &'static Target,
    /// Lanes that the instruction writes: EXEC, less what DPP leaves out.
    pub writes: u64,
}

/// How wide an operand is and what a constant in it means.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// 32 bits; a constant like 1.0 is a f32.
    B32,
    /// The low 16 bits; a constant like 1.0 is a f16.
    F16,
    /// 64 bits; a constant is extended by zeros, by its sign, or is the upper half of a f64.
    U64,
    I64,
    F64,
}

fn constant(number: Operand, kind: Kind) -> Option<u64> {
    match (number, kind) {
        (Operand::Integer(number), Kind::U64) if number >= 0 => Some(number as u64),
        // A literal above 2^31 of a signed operand is a negative one; small ones are written with their sign.
        (Operand::Integer(number), Kind::I64) => {
            Some(if number >= 1 << 31 { i64::from(number as i32) as u64 } else { number as u64 })
        }
        (Operand::Integer(number), Kind::F64) if !(-16..=64).contains(&number) => Some((number as u64) << 32),
        (Operand::Integer(number), Kind::U64 | Kind::F64) => Some(number as u64),
        (Operand::Integer(number), _) => Some(u64::from(number as u32)),
        (Operand::Float(number), Kind::F16) => Some(float::F16.narrow(number).into()),
        (Operand::Float(number), Kind::B32) => Some((number as f32).to_bits().into()),
        (Operand::Float(number), _) => Some(number.to_bits()),
        _ => None,
    }
}

impl Context<'_> {
    /// The registers of a multiple of 32 bits that an operand begins.
    pub fn operand(operation: &Operation, index: usize) -> Result<Source, String> {
        operation.operands.get(index).copied().ok_or_else(|| format!("operand {index} is missing"))
    }

    /// One register of an operand, without modifiers: `part` 1 is the next register, or the upper half of a constant.
    pub fn plain(&self, source: Source, part: u16, kind: Kind) -> Result<Value, String> {
        let broadcast = |word: Word| Value {
            lanes: [word.value as u32; 64],
            undefined: if word.undefined as u32 != 0 { !0 } else { 0 },
        };
        match source.operand {
            Operand::Vector(register) => self.wave.vector(register + part),
            Operand::Scalar(register) => Ok(broadcast(self.wave.scalar(register + part as u8, 1)?)),
            Operand::Scc => Ok(broadcast(Word::with(self.wave.scc.into(), self.wave.scc_undefined))),
            Operand::Null => Ok(broadcast(Word::of(0))),
            number => {
                let bits = constant(number, kind).ok_or("no value")?;
                Ok(broadcast(Word::of(bits >> (32 * part))))
            }
        }
    }

    /// A source of 32 bits or less, with all its modifiers.
    pub fn source(&mut self, operation: &Operation, index: usize, kind: Kind) -> Result<Value, String> {
        let source = Self::operand(operation, index)?;
        let modifiers = &operation.modifiers;
        let mut value = self.plain(source, 0, kind)?;
        let place = index.wrapping_sub(1);
        if modifiers.sdwa && place < 2 {
            select(&mut value, modifiers.src_sel[place], source.extend);
        } else if source.extend {
            return Err("sext() outside SDWA".into());
        }
        if modifiers.dpp.is_some() && index == 1 {
            value = self.moved(&value, modifiers)?;
        }
        let sign = if kind == Kind::F16 { 0x8000 } else { 0x8000_0000u32 };
        if source.absolute {
            value.lanes.iter_mut().for_each(|lane| *lane &= !sign);
        }
        if source.negate {
            value.lanes.iter_mut().for_each(|lane| *lane ^= sign);
        }
        Ok(value)
    }

    /// A source of 64 bits: both halves.
    pub fn source_64(&mut self, operation: &Operation, index: usize, kind: Kind) -> Result<(Value, Value), String> {
        let source = Self::operand(operation, index)?;
        if operation.modifiers.sdwa || operation.modifiers.dpp.is_some() || source.extend {
            return Err("64 bits by SDWA or DPP are not known here".into());
        }
        let (low, mut high) = (self.plain(source, 0, kind)?, self.plain(source, 1, kind)?);
        if source.absolute {
            high.lanes.iter_mut().for_each(|lane| *lane &= 0x7fff_ffff);
        }
        if source.negate {
            high.lanes.iter_mut().for_each(|lane| *lane ^= 0x8000_0000);
        }
        Ok((low, high))
    }

    /// Writes a destination of 32 bits: a vector register, in the lanes that the instruction writes.
    pub fn write(&mut self, operation: &Operation, index: usize, mut value: Value) -> Step {
        let Operand::Vector(register) = Self::operand(operation, index)?.operand else {
            return Err("the destination is no vector register".into());
        };
        let (shift, width) = operation.modifiers.dst_sel;
        if (shift, width) != WHOLE {
            let mask = ((1u64 << width) - 1) as u32;
            let old = self.wave.raw_vector(register)?;
            for (lane, old) in value.lanes.iter_mut().zip(old.lanes) {
                let kept = if operation.modifiers.preserve { old & !(mask << shift) } else { 0 };
                *lane = (*lane & mask) << shift | kept;
            }
        }
        self.wave.set_vector(register, &value, self.writes)
    }

    /// Writes a destination of 64 bits.
    pub fn write_64(&mut self, operation: &Operation, index: usize, low: &Value, high: &Value) -> Step {
        let Operand::Vector(register) = Self::operand(operation, index)?.operand else {
            return Err("the destination is no vector register".into());
        };
        self.wave.set_vector(register, low, self.writes)?;
        self.wave.set_vector(register + 1, high, self.writes)
    }

    /// DPP: each lane takes another's value. Lanes that may not, or are left out by the masks, are not written.
    fn moved(&mut self, value: &Value, modifiers: &Modifiers) -> Result<Value, String> {
        let Some(how) = modifiers.dpp else { return Ok(value.clone()) };
        let mut moved = Value { lanes: [0; 64], undefined: 0 };
        let mut writes = 0u64;
        for lane in 0..self.wave.width as i64 {
            let (row, place) = (lane & !15, lane & 15);
            let inside = |place: i64| (0..16).contains(&place).then_some(row + place);
            let from = match how {
                Move::Quad(lanes) => Some(lane & !3 | i64::from(lanes[(lane & 3) as usize])),
                Move::Eight(lanes) => Some(lane & !7 | i64::from(lanes[(lane & 7) as usize])),
                Move::ShiftRight(by) => inside(place - i64::from(by)),
                Move::ShiftLeft(by) => inside(place + i64::from(by)),
                Move::RotateRight(by) => Some(row | ((place - i64::from(by)) & 15)),
                Move::Mirror => Some(row | (15 - place)),
                Move::HalfMirror => Some(lane & !7 | (7 - (lane & 7))),
                Move::Share(of) => Some(row | i64::from(of)),
                Move::Xor(mask) => Some(row | (place ^ i64::from(mask))),
                Move::Broadcast(15) => (lane >= 16).then_some(row - 1),
                Move::Broadcast(31) => (lane >= 32).then_some(31),
                Move::Broadcast(_) => return Err("a broadcast that is not known here".into()),
            };
            let from = from.filter(|&from| self.wave.exec >> from & 1 == 1);
            let enabled = modifiers.row_mask >> (lane / 16) & 1 == 1 && modifiers.bank_mask >> (place / 4) & 1 == 1;
            if enabled && (from.is_some() || modifiers.bound_ctrl) {
                writes |= 1 << lane;
            }
            if let Some(from) = from {
                moved.lanes[lane as usize] = value.lanes[from as usize];
                moved.undefined |= (value.undefined >> from & 1) << lane;
            }
        }
        self.writes &= writes;
        Ok(moved)
    }

    // ---- scalars

    /// A scalar source of `count` registers.
    pub fn scalar(&self, operation: &Operation, index: usize, count: usize) -> Result<Word, String> {
        match Self::operand(operation, index)?.operand {
            Operand::Scalar(register) => self.wave.scalar(register, count),
            Operand::Scc => Ok(Word::with(self.wave.scc.into(), self.wave.scc_undefined)),
            Operand::Null => Ok(Word::of(0)),
            Operand::Vector(_) => Err("a vector register where a scalar must be".into()),
            number => {
                let kind = if count == 2 { Kind::U64 } else { Kind::B32 };
                Ok(Word::of(constant(number, kind).ok_or("no value")?))
            }
        }
    }

    pub fn set_scalar(&mut self, operation: &Operation, index: usize, word: Word, count: usize) -> Step {
        match Self::operand(operation, index)?.operand {
            Operand::Scalar(register) => self.wave.set_scalar(register, word, count),
            Operand::Null => Ok(()),
            _ => Err("the destination is no scalar register".into()),
        }
    }
}

fn select(value: &mut Value, (shift, width): (u32, u32), extend: bool) {
    if width == 32 {
        return;
    }
    for lane in &mut value.lanes {
        let up = *lane << (32 - shift - width);
        *lane = if extend { (up as i32 >> (32 - width)) as u32 } else { up >> (32 - width) };
    }
}

/// `v_x` with op_sel or the like where the operation has no such thing.
pub fn reject_halves(operation: &Operation) -> Step {
    let modifiers = &operation.modifiers;
    if modifiers.op_sel != 0 || modifiers.op_sel_hi.is_some() || modifiers.neg_lo != 0 || modifiers.neg_hi != 0 {
        return Err("op_sel, neg_lo or neg_hi are not known here for this operation".into());
    }
    Ok(())
}

/// Clamping or a factor where the operation has no such thing.
pub fn reject_clamp(operation: &Operation) -> Step {
    let modifiers = &operation.modifiers;
    let plain = !modifiers.clamp && modifiers.scale == 1.0;
    if plain { Ok(()) } else { Err("clamp or a factor is not known here for this operation".into()) }
}

pub fn each(mut f: impl FnMut(usize) -> u32) -> Lanes {
    std::array::from_fn(&mut f)
}
