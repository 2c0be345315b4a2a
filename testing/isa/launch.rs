//! A launch: blocks one after another; a block's waves each until it ends or waits at a barrier, then the next.
//!
//! Barriers are as the kernels mean them, stricter than the hardware: every wave of the block reaches each, with all the
//! lanes that it started with, and its stores to shared memory have arrived by then.

use std::env;

use crate::context::{Context, Target};
use crate::instruction::{Instruction, Operand, Role, TTMP};
use crate::memory::DeviceMemory;
use crate::program::Program;
use crate::scalar;
use crate::shared::Shared;
use crate::wave::{State, Step, Value, Wave, Word};

pub type Index3 = [u32; 3];

/// Which block and which wave comes first.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Forward,
    Reverse,
    Shuffled(u64),
}

impl Order {
    /// As scripts/amd.sh says it: "forward", "reverse", or a seed.
    pub fn from_environment() -> Self {
        match env::var("QUANTKV_AMD_ORDER").as_deref() {
            Ok("reverse") => Order::Reverse,
            Ok(seed) => seed.parse().map_or(Order::Forward, Order::Shuffled),
            Err(_) => Order::Forward,
        }
    }

    fn permute<T>(self, items: &mut [T], round: u64) {
        match self {
            Order::Forward => {}
            Order::Reverse => items.reverse(),
            Order::Shuffled(seed) => {
                let mut state =
                    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round.wrapping_mul(0xd134_2543_de82_ef95) | 1;
                for last in (1..items.len()).rev() {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    items.swap(last, (state % (last as u64 + 1)) as usize);
                }
            }
        }
    }
}

/// Instructions that a wave may do: a loop without an end is a fault.
const MOST_STEPS: u64 = 1 << 28;

/// Local data share of a block, on every architecture here.
const MOST_SHARED: usize = 64 * 1024;

pub struct Launch<'a> {
    pub program: &'a Program,
    pub memory: DeviceMemory,
    pub grid: Index3,
    pub threads: u32,
    pub dynamic_bytes: usize,
    pub order: Order,
}

/// The bytes of the arguments: the kernel's own from `params`, and what the runtime adds.
///
/// # Safety
/// Each of `params` points to an argument of the size that the metadata says.
pub unsafe fn pack_arguments(
    program: &Program,
    grid: Index3,
    threads: u32,
    dynamic_bytes: u32,
    params: *const *const u8,
) -> Result<Vec<u8>, String> {
    let mut buffer = vec![0u8; program.info.descriptor.argument_bytes];
    let mut own = 0;
    for argument in &program.info.arguments {
        let range = argument.offset..argument.offset + argument.bytes;
        let place = buffer.get_mut(range).ok_or("an argument lies outside the argument buffer")?;
        let number: u64 = match argument.kind.as_str() {
            "by_value" | "global_buffer" => {
                // SAFETY: the caller's promise.
                place.copy_from_slice(unsafe { std::slice::from_raw_parts(*params.add(own), argument.bytes) });
                own += 1;
                continue;
            }
            "hidden_block_count_x" => grid[0].into(),
            "hidden_block_count_y" => grid[1].into(),
            "hidden_block_count_z" => grid[2].into(),
            "hidden_group_size_x" => threads.into(),
            "hidden_group_size_y" | "hidden_group_size_z" => 1,
            "hidden_grid_dims" => 3,
            "hidden_dynamic_lds_size" => dynamic_bytes.into(),
            "hidden_remainder_x" | "hidden_remainder_y" | "hidden_remainder_z" | "hidden_none" => 0,
            "hidden_global_offset_x" | "hidden_global_offset_y" | "hidden_global_offset_z" => 0,
            kind => return Err(format!("an argument of kind {kind} is not known here")),
        };
        place.copy_from_slice(&number.to_le_bytes()[..argument.bytes]);
    }
    Ok(buffer)
}

impl Launch<'_> {
    pub fn run(&self) -> Step {
        let [x, y, z] = self.grid;
        let mut blocks: Vec<Index3> =
            (0..z).flat_map(|z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z]))).collect();
        self.order.permute(&mut blocks, 0);
        blocks.into_iter().try_for_each(|block| {
            self.run_block(block).map_err(|why| format!("block ({}, {}, {}), {why}", block[0], block[1], block[2]))
        })
    }

    fn run_block(&self, block: Index3) -> Step {
        let target = self.program.target;
        let bytes = self.program.info.descriptor.shared_bytes + self.dynamic_bytes;
        if bytes > MOST_SHARED {
            return Err(format!("{bytes} bytes of shared memory: a block has at most {MOST_SHARED}"));
        }
        let mut shared = Shared::new(bytes);
        let count = (self.threads as usize).div_ceil(target.wave);
        let mut waves = (0..count).map(|index| self.start(block, index)).collect::<Result<Vec<_>, _>>()?;
        for round in 1.. {
            let mut turn: Vec<usize> = (0..count).collect();
            self.order.permute(&mut turn, round);
            for index in turn {
                let wave = &mut waves[index];
                if wave.state == State::Running {
                    self.run_wave(wave, &mut shared, target).map_err(|why| format!("wave {index}: {why}"))?;
                }
            }
            if waves.iter().all(|wave| wave.state == State::Ended) {
                return Ok(());
            }
            if let Some(ended) = waves.iter().position(|wave| wave.state == State::Ended) {
                let waits = waves.iter().position(|wave| wave.state == State::AtBarrier).unwrap_or(0);
                return Err(format!(
                    "wave {waits} waits at a barrier (before {:#x}), wave {ended} has ended",
                    waves[waits].pc
                ));
            }
            shared.pass_barrier();
            waves.iter_mut().for_each(|wave| wave.state = State::Running);
        }
        Ok(())
    }

    /// A wave as the hardware starts it: what the descriptor asks for, in its order, and nothing else.
    fn start(&self, block: Index3, index: usize) -> Result<Wave, String> {
        let (info, target) = (&self.program.info, self.program.target);
        let descriptor = &info.descriptor;
        // Round to nearest even, subnormals everywhere: what the operations here do.
        if descriptor.modes >> 12 & 0xff != 0xf0 {
            return Err(format!("a mode of floating point that is not known here: {:#x}", descriptor.modes));
        }
        let lanes = (self.threads as usize - index * target.wave).min(target.wave);
        let mut wave = Wave::new(index, lanes, info, target);
        wave.pc = descriptor.entry;
        let has = |bit: u32| descriptor.registers >> bit & 1 == 1;
        let asks = |bit: u32| descriptor.properties >> bit & 1 == 1;
        let mut next = 0u8;
        let put = |wave: &mut Wave, next: &mut u8, word: Option<u64>, count: usize| -> Step {
            if let Some(word) = word {
                wave.set_scalar(*next, Word::of(word), count)?;
            }
            *next += count as u8;
            Ok(())
        };
        // Private memory of gfx90a is a buffer: an address that is nobody's, and for each wave a part of it.
        let (buffer, part) = (0x0100_0000_0000u64, 0x1_0000 * index as u64);
        for (bit, word, count) in [
            (0, Some(buffer), 2),
            (0, None, 2), // the rest of the buffer's descriptor
            (1, None, 2), // the dispatch's packet
            (2, None, 2), // the queue
            (3, Some(self.memory.arguments()), 2),
            (4, None, 2),    // the dispatch's number
            (5, Some(0), 2), // flat_scratch
            (6, Some(descriptor.private_bytes as u64), 1),
        ] {
            if asks(bit) {
                put(&mut wave, &mut next, word, count)?;
            }
        }
        // gfx11 wants 16 registers set up: the descriptor counts some for the user that hold nothing.
        let user = descriptor.registers >> 1 & 31;
        if user < next.into() {
            return Err(format!("{next} registers for the user, of {user}"));
        }
        next = user as u8;
        if asks(0) {
            wave.private_base = buffer + part;
        }
        if target.generation >= 12 {
            wave.load_scalar(TTMP + 9, Word::of(block[0].into()), 1);
            wave.load_scalar(TTMP + 7, Word::of(u64::from(block[1] | block[2] << 16)), 1);
        } else {
            for (bit, word) in [(7, block[0]), (8, block[1]), (9, block[2])] {
                if has(bit) {
                    put(&mut wave, &mut next, Some(word.into()), 1)?;
                }
            }
            // From gfx942 on the hardware knows where private memory lies.
            if has(0) && asks(0) {
                put(&mut wave, &mut next, Some(part), 1)?;
            }
        }
        let first = (index * target.wave) as u32;
        let ids = Value { lanes: std::array::from_fn(|lane| first + lane as u32), undefined: 0 };
        wave.set_vector(0, &ids, wave.started)?;
        Ok(wave)
    }

    fn run_wave(&self, wave: &mut Wave, shared: &mut Shared, target: &'static Target) -> Step {
        for _ in 0..MOST_STEPS {
            let place = self.program.place(wave.pc)?;
            self.program.reach(place);
            let line = &self.program.instructions[place];
            let instruction = line.as_ref().map_err(String::clone)?;
            let stepped = self.step(instruction, wave, shared, target);
            stepped.map_err(|why| format!("`{}` at {:#x}: {why}", instruction.text, instruction.address))?;
            if wave.state != State::Running {
                return Ok(());
            }
        }
        Err(format!("no end after {MOST_STEPS} instructions"))
    }

    fn step(&self, instruction: &Instruction, wave: &mut Wave, shared: &mut Shared, target: &'static Target) -> Step {
        let next = instruction.address + instruction.bytes;
        match instruction.role {
            Role::Ordinary => {
                let writes = wave.exec;
                let mut context = Context { wave, shared, memory: &self.memory, target, writes };
                execute(&mut context, instruction)?;
            }
            Role::Branch => {
                let taken = scalar::takes(wave, &instruction.first.mnemonic)?;
                wave.pc = if taken { instruction.target } else { next };
                return Ok(());
            }
            Role::Jump => {
                wave.pc = self.jump_target(instruction, wave)?;
                return Ok(());
            }
            Role::End => wave.state = State::Ended,
            Role::Barrier => {
                arrive(wave)?;
                wave.state = State::AtBarrier;
            }
            Role::Signal => {
                arrive(wave)?;
                if wave.signalled {
                    return Err("a second signal for one barrier".into());
                }
                wave.signalled = true;
            }
            Role::Wait => {
                if !wave.signalled {
                    return Err("a wait for a barrier that was not signalled".into());
                }
                wave.signalled = false;
                wave.state = State::AtBarrier;
            }
        }
        wave.pc = next;
        Ok(())
    }

    /// An address of the code object, as `s_getpc_b64` gives it, where an instruction of this kernel begins.
    fn jump_target(&self, instruction: &Instruction, wave: &Wave) -> Result<u64, String> {
        let Operand::Scalar(register) = Context::operand(&instruction.first, 0)?.operand else {
            return Err("the address of a jump is in no scalar registers".into());
        };
        let address = wave.scalar(register, 2)?;
        if address.undefined != 0 {
            return Err("the address of a jump is undefined".into());
        }
        self.program.place(address.value)?;
        Ok(address.value)
    }
}

fn arrive(wave: &Wave) -> Step {
    if wave.exec != wave.started {
        return Err(format!("a barrier with lanes {:#x} of {:#x}", wave.exec, wave.started));
    }
    if wave.waits.shared_stores_pending() {
        return Err("a barrier before stores to shared memory were waited for".into());
    }
    Ok(())
}

/// Both halves of a dual instruction read before either writes.
pub fn execute(context: &mut Context, instruction: &Instruction) -> Step {
    let first = &instruction.first;
    let Some(second) = &instruction.second else { return (first.handler)(context, first) };
    let Operand::Vector(register) = Context::operand(first, 0)?.operand else {
        return Err("half of a dual instruction writes no vector register".into());
    };
    let before = context.wave.raw_vector(register)?;
    (first.handler)(context, first)?;
    let result = context.wave.raw_vector(register)?;
    context.wave.loaded_vector(register, &before, context.wave.all_lanes())?;
    context.writes = context.wave.exec;
    (second.handler)(context, second)?;
    context.wave.loaded_vector(register, &result, context.wave.exec)?;
    Ok(())
}
