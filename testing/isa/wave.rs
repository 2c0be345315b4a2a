//! The state of a wave: registers, and for each bit of them whether it is defined.
//!
//! ```text
//! vectors[r]    64 lanes of 32 bits      undefined_lanes[r]   a bit for each lane
//! scalars[s]    32 bits                  undefined_bits[s]    a bit for each bit: masks are built lane by lane
//! scc           a bit                    scc_undefined
//! ```
//! Nothing is defined but what the hardware sets up at the start. Undefined values may be moved and computed with, as
//! compilers do; the result is undefined. They are a fault where they decide something: an address, a branch, EXEC, what
//! is stored in device memory.

use crate::code_object::KernelInfo;
use crate::context::Target;
use crate::instruction::{ACCUMULATORS, EXEC, Operand};
use crate::waits::Waits;

pub type Step = Result<(), String>;
pub type Lanes = [u32; 64];

/// A value in each lane.
#[derive(Clone)]
pub struct Value {
    pub lanes: Lanes,
    pub undefined: u64,
}

/// A scalar value of up to 64 bits.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    pub value: u64,
    pub undefined: u64,
}

impl Word {
    pub fn of(value: u64) -> Self {
        Word { value, undefined: 0 }
    }

    /// For what is not computed bit by bit: one undefined bit makes all of them undefined.
    pub fn with(value: u64, undefined: bool) -> Self {
        Word { value, undefined: if undefined { !0 } else { 0 } }
    }

    pub fn not(self) -> Self {
        Word { value: !self.value, ..self }
    }

    /// A bit is defined if both are, or one is a defined zero.
    pub fn and(self, other: Self) -> Self {
        let zero = (!self.value & !self.undefined) | (!other.value & !other.undefined);
        Word { value: self.value & other.value, undefined: (self.undefined | other.undefined) & !zero }
    }

    pub fn or(self, other: Self) -> Self {
        self.not().and(other.not()).not()
    }

    pub fn xor(self, other: Self) -> Self {
        Word { value: self.value ^ other.value, undefined: self.undefined | other.undefined }
    }

    /// Whether it is not zero, and whether that is undefined.
    pub fn is_not_zero(self, width: u32) -> (bool, bool) {
        let mask = if width == 32 { 0xffff_ffff } else { !0 };
        let one = self.value & !self.undefined & mask != 0;
        (one || self.value & mask != 0, !one && self.undefined & mask != 0)
    }
}

pub struct Wave {
    /// Of the block's.
    pub index: usize,
    pub width: usize,
    /// Lanes that the wave started with.
    pub started: u64,
    vectors: Vec<Lanes>,
    undefined_lanes: Vec<u64>,
    vector_count: usize,
    accumulator_count: usize,
    scalars: [u32; 128],
    undefined_bits: [u32; 128],
    pub exec: u64,
    pub scc: bool,
    pub scc_undefined: bool,
    pub pc: u64,
    pub waits: Waits,
    /// A lane's private memory after another's; its undefined bytes.
    pub private: Vec<u8>,
    pub private_undefined: Vec<bool>,
    pub private_bytes: usize,
    /// What a lane of gfx90a adds for its private memory, as the start-up registers say it.
    pub private_base: u64,
    /// gfx12: has signalled the barrier that it has not yet waited for.
    pub signalled: bool,
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Running,
    AtBarrier,
    Ended,
}

impl Wave {
    pub fn new(index: usize, lanes: usize, info: &KernelInfo, target: &Target) -> Self {
        let width = target.wave;
        let started = if lanes == 64 { !0 } else { (1 << lanes) - 1 };
        let (vectors, accumulators, private_bytes) =
            (info.vector_registers, info.accumulators, info.descriptor.private_bytes);
        let all = vectors + accumulators;
        let mut wave = Wave {
            index,
            width,
            started,
            vectors: vec![[0xffff_ffff; 64]; all],
            undefined_lanes: vec![!0; all],
            vector_count: vectors,
            accumulator_count: accumulators,
            scalars: [0xffff_ffff; 128],
            undefined_bits: [!0; 128],
            exec: 0,
            scc: false,
            scc_undefined: true,
            pc: 0,
            waits: Waits::new(all, target.generation > 9),
            private: vec![0xff; private_bytes * width],
            private_undefined: vec![true; private_bytes * width],
            private_bytes,
            private_base: 0,
            signalled: false,
            state: State::Running,
        };
        wave.set_scalar(EXEC, Word::of(started), 2).expect("EXEC is defined");
        wave
    }

    pub fn all_lanes(&self) -> u64 {
        if self.width == 64 { !0 } else { 0xffff_ffff }
    }

    // ---- vector registers

    fn slot(&self, register: u16) -> Result<usize, String> {
        let (number, count, name, base) = match register.checked_sub(ACCUMULATORS) {
            Some(number) => (usize::from(number), self.accumulator_count, "a", self.vector_count),
            None => (usize::from(register), self.vector_count, "v", 0),
        };
        if number >= count {
            return Err(format!("{name}{number}: the kernel has {count} registers of this kind"));
        }
        Ok(base + number)
    }

    pub fn vector(&self, register: u16) -> Result<Value, String> {
        let slot = self.slot(register)?;
        if self.waits.vector_is_pending(slot) {
            return Err(format!("v{register} is read before what loads it was waited for"));
        }
        Ok(Value { lanes: self.vectors[slot], undefined: self.undefined_lanes[slot] })
    }

    /// Writes the lanes of `mask`.
    pub fn set_vector(&mut self, register: u16, value: &Value, mask: u64) -> Step {
        let slot = self.slot(register)?;
        if self.waits.vector_is_pending(slot) {
            return Err(format!("v{register} is written before what loads it was waited for"));
        }
        self.load_vector(slot, value, mask);
        Ok(())
    }

    fn load_vector(&mut self, slot: usize, value: &Value, mask: u64) {
        let own = &mut self.vectors[slot];
        for (lane, (own, new)) in own.iter_mut().zip(value.lanes).enumerate() {
            *own = if mask >> lane & 1 == 1 { new } else { *own };
        }
        let undefined = &mut self.undefined_lanes[slot];
        *undefined = (*undefined & !mask) | (value.undefined & mask);
    }

    /// What a load brings: the register may wait for an earlier one of the same kind. Returns its place for `waits`.
    pub fn loaded_vector(&mut self, register: u16, value: &Value, mask: u64) -> Result<u16, String> {
        let slot = self.slot(register)?;
        self.load_vector(slot, value, mask);
        Ok(slot as u16)
    }

    /// What a load writes part of keeps the rest; the rest need not be defined.
    pub fn raw_vector(&self, register: u16) -> Result<Value, String> {
        let slot = self.slot(register)?;
        Ok(Value { lanes: self.vectors[slot], undefined: self.undefined_lanes[slot] })
    }

    // ---- scalar registers

    /// One or more registers, lowest first, as a word; `count` of 1 or 2.
    pub fn scalar(&self, register: u8, count: usize) -> Result<Word, String> {
        let first = usize::from(register);
        if self.waits.scalars_pending(first, count) {
            return Err(format!("s{register} is read before what loads it was waited for"));
        }
        let mut word = Word::of(0);
        for index in 0..count {
            word.value |= u64::from(self.scalars[first + index]) << (32 * index);
            word.undefined |= u64::from(self.undefined_bits[first + index]) << (32 * index);
        }
        Ok(word)
    }

    pub fn set_scalar(&mut self, register: u8, word: Word, count: usize) -> Step {
        let first = usize::from(register);
        if self.waits.scalars_pending(first, count) {
            return Err(format!("s{register} is written before what loads it was waited for"));
        }
        self.load_scalar(register, word, count);
        if first + count > usize::from(EXEC) {
            let exec = self.scalar(EXEC, 2)?;
            if exec.undefined & self.all_lanes() != 0 {
                return Err("EXEC gets lanes that are undefined".into());
            }
            self.exec = exec.value & self.all_lanes();
        }
        Ok(())
    }

    pub fn load_scalar(&mut self, register: u8, word: Word, count: usize) {
        for index in 0..count {
            self.scalars[usize::from(register) + index] = (word.value >> (32 * index)) as u32;
            self.undefined_bits[usize::from(register) + index] = (word.undefined >> (32 * index)) as u32;
        }
    }

    /// Registers of a mask of lanes.
    pub fn mask_registers(&self) -> usize {
        self.width / 32
    }

    pub fn mask(&self, operand: Operand) -> Result<Word, String> {
        match operand {
            Operand::Scalar(register) => self.scalar(register, self.mask_registers()),
            Operand::Integer(number) => Ok(Word::of(number as u64)),
            Operand::Null => Ok(Word::of(0)),
            _ => Err("no mask of lanes".into()),
        }
    }

    pub fn set_mask(&mut self, operand: Operand, word: Word) -> Step {
        match operand {
            Operand::Scalar(register) => self.set_scalar(register, word, self.mask_registers()),
            Operand::Null => Ok(()),
            _ => Err("no place for a mask of lanes".into()),
        }
    }

    /// The scalar condition, where it decides.
    pub fn condition(&self) -> Result<bool, String> {
        if self.scc_undefined { Err("SCC is undefined and decides".into()) } else { Ok(self.scc) }
    }
}
