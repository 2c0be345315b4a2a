//! Loads, stores and atomics of device memory (`global_`, `flat_`), of a lane's private memory (`scratch_`, and `buffer_`
//! on gfx90a), and of the constants that scalar registers are loaded with (`s_load_`).

use crate::context::{Context, Kind};
use crate::handlers::Handler;
use crate::instruction::{Operand, Operation, Source};
use crate::vector::join;
use crate::waits::{Counter, Registers};
use crate::wave::{Step, Value, Word};

/// How wide an access is: bytes, whether they are extended by their sign, which half of a register they fill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Width {
    pub bytes: usize,
    pub signed: bool,
    /// 0: the whole register; 1: its lower half; 2: its upper half.
    pub half: u32,
}

impl Width {
    fn pack(self) -> u32 {
        self.bytes as u32 | u32::from(self.signed) << 8 | self.half << 9
    }

    pub fn unpack(detail: u32) -> Self {
        Width { bytes: (detail & 0xff) as usize, signed: detail >> 8 & 1 == 1, half: detail >> 9 & 3 }
    }

    pub fn registers(self) -> u16 {
        self.bytes.div_ceil(4) as u16
    }
}

/// By the name's end: `dwordx2`, `b64`, `ubyte`, `short_d16_hi`.
pub fn width(name: &str) -> Option<u32> {
    let (name, half) = match name {
        "ubyte_d16" | "d16_u8" | "u8_d16" => ("u8", 1),
        "ubyte_d16_hi" | "d16_hi_u8" | "u8_d16_hi" => ("u8", 2),
        "sbyte_d16" | "d16_i8" | "i8_d16" => ("i8", 1),
        "sbyte_d16_hi" | "d16_hi_i8" | "i8_d16_hi" => ("i8", 2),
        "short_d16" | "d16_b16" | "u16_d16" => ("u16", 1),
        "short_d16_hi" | "d16_hi_b16" | "u16_d16_hi" => ("u16", 2),
        "byte_d16_hi" | "d16_hi_b8" => ("u8", 2),
        _ => (name, 0),
    };
    let (bytes, signed) = match name {
        "ubyte" | "u8" | "byte" | "b8" => (1, false),
        "sbyte" | "i8" => (1, true),
        "ushort" | "u16" | "short" | "b16" => (2, false),
        "sshort" | "i16" => (2, true),
        "dword" | "b32" => (4, false),
        "dwordx2" | "b64" => (8, false),
        "dwordx3" | "b96" => (12, false),
        "dwordx4" | "b128" => (16, false),
        "dwordx8" | "b256" => (32, false),
        "dwordx16" | "b512" => (64, false),
        _ => return None,
    };
    Some(Width { bytes, signed, half }.pack())
}

#[derive(Clone, Copy, PartialEq)]
enum Space {
    Global,
    Flat,
    Private,
}

const FAMILIES: [&str; 9] = [
    "global_load_",
    "global_store_",
    "flat_load_",
    "flat_store_",
    "scratch_load_",
    "scratch_store_",
    "buffer_load_",
    "buffer_store_",
    "s_load_",
];

pub fn detail(mnemonic: &str) -> Option<u32> {
    FAMILIES.iter().find_map(|family| width(mnemonic.strip_prefix(family)?))
}

/// Registers from bytes, and the upper or lower half only where it says so.
fn fill(width: Width, bytes: &[u8], old: u32, register: usize) -> u32 {
    let part = &bytes[4 * register..bytes.len().min(4 * register + 4)];
    let mut word = part.iter().rev().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
    if width.signed {
        let unused = 32 - 8 * width.bytes as u32;
        word = ((word << unused) as i32 >> unused) as u32;
    }
    match width.half {
        0 => word,
        1 => old & 0xffff_0000 | word & 0xffff,
        _ => old & 0xffff | word << 16,
    }
}

/// Addresses of all lanes in device memory: a pair of registers, or a scalar pair and one register.
fn addresses(c: &Context, i: &Operation, vector: usize, scalar: usize) -> Result<[u64; 64], String> {
    let own = Context::operand(i, vector)?;
    let base = i.operands.get(scalar).map_or(Operand::Null, |source| source.operand);
    let (lanes, undefined): ([u64; 64], u64) = match base {
        Operand::Null => {
            let (low, high) = (c.plain(own, 0, Kind::U64)?, c.plain(own, 1, Kind::U64)?);
            (std::array::from_fn(|lane| join(&low, &high, lane)), low.undefined | high.undefined)
        }
        Operand::Scalar(register) => {
            let base = c.wave.scalar(register, 2)?;
            let value = c.plain(own, 0, Kind::B32)?;
            let lanes = std::array::from_fn(|lane| base.value.wrapping_add(value.lanes[lane].into()));
            (lanes, if base.undefined != 0 { !0 } else { value.undefined })
        }
        _ => return Err("an address that is not known here".into()),
    };
    if undefined & c.wave.exec != 0 {
        return Err("an address is undefined".into());
    }
    Ok(lanes.map(|address| address.wrapping_add_signed(i.modifiers.offset)))
}

/// Addresses of all lanes in their private memory.
fn private_addresses(c: &Context, i: &Operation, first: usize) -> Result<[u64; 64], String> {
    let is_buffer = i.mnemonic.starts_with("buffer_");
    let own = Context::operand(i, first)?;
    let value = match own.operand {
        Operand::Vector(_) => c.plain(own, 0, Kind::B32)?,
        _ => Value { lanes: [0; 64], undefined: 0 },
    };
    if is_buffer {
        let Operand::Scalar(register) = Context::operand(i, 2)?.operand else { return Err("no descriptor".into()) };
        let base = c.wave.scalar(register, 2)?;
        if base.undefined != 0 || base.value != c.wave.private_base {
            return Err("a buffer other than private memory is not known here".into());
        }
    }
    let scalar = c.scalar(
        i,
        if is_buffer {
            3
        } else if first == 0 {
            2
        } else {
            first + 1
        },
        1,
    )?;
    if value.undefined & c.wave.exec != 0 || scalar.undefined as u32 != 0 {
        return Err("an address is undefined".into());
    }
    let offset = i.modifiers.offset.wrapping_add(i64::from(scalar.value as u32 as i32));
    Ok(std::array::from_fn(|lane| u64::from(value.lanes[lane]).wrapping_add_signed(offset) & 0xffff_ffff))
}

/// gfx9 counts loads and stores in one: there both queues are waited for together.
fn counters(space: Space, stores: bool) -> &'static [Counter] {
    match (space == Space::Flat, stores) {
        (true, true) => &[Counter::Store, Counter::Shared],
        (true, false) => &[Counter::Load, Counter::Shared],
        (false, true) => &[Counter::Store],
        (false, false) => &[Counter::Load],
    }
}

fn private_range(c: &Context, lane: usize, address: u64, bytes: usize) -> Result<std::ops::Range<usize>, String> {
    let size = c.wave.private_bytes;
    if address + bytes as u64 > size as u64 {
        return Err(format!("private memory at {address}, {bytes} bytes: a lane has {size}"));
    }
    let start = lane * size + address as usize;
    Ok(start..start + bytes)
}

fn load(c: &mut Context, i: &Operation, space: Space) -> Step {
    let width = Width::unpack(i.detail);
    let addresses = match space {
        Space::Private => private_addresses(c, i, 1)?,
        _ => addresses(c, i, 1, 2)?,
    };
    let Operand::Vector(destination) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let mut bytes = [[0u8; 16]; 64];
    let mut undefined = 0u64;
    for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
        let out = &mut bytes[lane][..width.bytes];
        if space == Space::Private {
            let range = private_range(c, lane, addresses[lane], width.bytes)?;
            out.copy_from_slice(&c.wave.private[range.clone()]);
            undefined |= u64::from(c.wave.private_undefined[range].contains(&true)) << lane;
        } else {
            c.memory.read(addresses[lane], out).map_err(|why| format!("lane {lane}: {why}"))?;
        }
    }
    finish_load(c, destination, width, &bytes, undefined, counters(space, false))
}

/// Puts what was loaded into registers, which are not to be touched until the counters were waited for.
fn finish_load(
    c: &mut Context,
    destination: u16,
    width: Width,
    bytes: &[[u8; 16]; 64],
    undefined: u64,
    counters: &[Counter],
) -> Step {
    let first = fill_registers(c, destination, width, bytes, undefined)?;
    c.wave.waits.enqueue(counters, Registers::Vectors(first, width.registers()), false);
    Ok(())
}

/// Puts the lanes' bytes into registers. Returns the first one's place for `waits`.
pub fn fill_registers(
    c: &mut Context,
    destination: u16,
    width: Width,
    bytes: &[[u8; 16]; 64],
    undefined: u64,
) -> Result<u16, String> {
    let mut first = None;
    for register in 0..width.registers() {
        let mut value = c.wave.raw_vector(destination + register)?;
        for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
            value.lanes[lane] = fill(width, &bytes[lane][..width.bytes], value.lanes[lane], register.into());
        }
        value.undefined = undefined;
        let slot = c.wave.loaded_vector(destination + register, &value, c.wave.exec)?;
        first.get_or_insert(slot);
    }
    first.ok_or_else(|| "a load of nothing".into())
}

/// The bytes that each lane stores, and which are undefined.
pub fn stored(c: &Context, source: Source, width: Width) -> Result<([[u8; 16]; 64], u64), String> {
    let mut bytes = [[0u8; 16]; 64];
    let mut undefined = 0;
    for register in 0..width.registers() {
        let value = c.plain(source, register, Kind::B32)?;
        undefined |= value.undefined;
        for (lane, bytes) in bytes.iter_mut().enumerate() {
            let word = if width.half == 2 { value.lanes[lane] >> 16 } else { value.lanes[lane] };
            bytes[4 * usize::from(register)..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }
    Ok((bytes, undefined & c.wave.exec))
}

fn store(c: &mut Context, i: &Operation, space: Space) -> Step {
    let width = Width::unpack(i.detail);
    let is_buffer = i.mnemonic.starts_with("buffer_");
    let addresses = match space {
        Space::Private => private_addresses(c, i, usize::from(is_buffer))?,
        _ => addresses(c, i, 0, 2)?,
    };
    let (bytes, undefined) = stored(c, Context::operand(i, usize::from(!is_buffer))?, width)?;
    if undefined != 0 && space != Space::Private {
        return Err(format!("lane {} stores what is undefined", undefined.trailing_zeros()));
    }
    for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
        if space == Space::Private {
            let range = private_range(c, lane, addresses[lane], width.bytes)?;
            c.wave.private[range.clone()].copy_from_slice(&bytes[lane][..width.bytes]);
            c.wave.private_undefined[range].fill(undefined >> lane & 1 == 1);
        } else {
            c.memory
                .write(addresses[lane], &bytes[lane][..width.bytes])
                .map_err(|why| format!("lane {lane}: {why}"))?;
        }
    }
    c.wave.waits.enqueue(counters(space, true), Registers::None, false);
    Ok(())
}

fn load_scalar(c: &mut Context, i: &Operation) -> Step {
    let bytes = Width::unpack(i.detail).bytes;
    let (base, offset) = (c.scalar(i, 1, 2)?, c.scalar(i, 2, 1)?);
    if base.undefined != 0 || offset.undefined as u32 != 0 {
        return Err("an address is undefined".into());
    }
    // A constant has a sign, a register has none.
    let is_constant = matches!(Context::operand(i, 2)?.operand, Operand::Integer(_));
    let offset = if is_constant { i64::from(offset.value as u32 as i32) } else { offset.value as i64 };
    let address = base.value.wrapping_add_signed(offset + i.modifiers.offset);
    if address % (bytes.min(4) as u64) != 0 {
        return Err(format!("a scalar load at {address:#x}, which is no multiple of {}", bytes.min(4)));
    }
    let mut data = [0u8; 64];
    c.memory.read(address, &mut data[..bytes])?;
    let Operand::Scalar(destination) = Context::operand(i, 0)?.operand else { return Err("no scalar register".into()) };
    let registers = bytes.div_ceil(4) as u8;
    for register in 0..registers {
        let word = u32::from_le_bytes(data[4 * usize::from(register)..][..4].try_into().expect("four bytes"));
        c.wave.load_scalar(destination + register, Word::of(word.into()), 1);
    }
    c.wave.waits.enqueue(&[Counter::Scalar], Registers::Scalars(destination, registers), false);
    Ok(())
}

/// `old = *address; *address = f(old, data)` in each lane, one after another.
fn atomic(c: &mut Context, i: &Operation, space: Space, f: impl Fn(u32, u32) -> u32) -> Step {
    let first = usize::from(i.modifiers.returns);
    let addresses = addresses(c, i, first, first + 2)?;
    let data = c.plain(Context::operand(i, first + 1)?, 0, Kind::B32)?;
    if data.undefined & c.wave.exec != 0 {
        return Err("an atomic with what is undefined".into());
    }
    let mut bytes = [[0u8; 16]; 64];
    for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
        let old = c
            .memory
            .update(addresses[lane], |old| f(old, data.lanes[lane]))
            .map_err(|why| format!("lane {lane}: {why}"))?;
        bytes[lane][..4].copy_from_slice(&old.to_le_bytes());
    }
    if i.modifiers.returns {
        let Operand::Vector(destination) = Context::operand(i, 0)?.operand else {
            return Err("no vector register".into());
        };
        let width = Width { bytes: 4, signed: false, half: 0 };
        return finish_load(c, destination, width, &bytes, 0, counters(space, false));
    }
    c.wave.waits.enqueue(counters(space, true), Registers::None, false);
    Ok(())
}

fn find_atomic(name: &str, flat: bool) -> Option<Handler> {
    macro_rules! atomics {
        ($($names:pat => $f:expr),* $(,)?) => {
            match name {
                $($names if flat => Some((|c, i| atomic(c, i, Space::Flat, $f)) as Handler),
                $names => Some((|c, i| atomic(c, i, Space::Global, $f)) as Handler),)*
                _ => None,
            }
        };
    }
    atomics! {
        "add" | "add_u32" => |old: u32, data: u32| old.wrapping_add(data),
        "sub" | "sub_u32" => |old: u32, data: u32| old.wrapping_sub(data),
        "or" | "or_b32" => |old, data| old | data,
        "and" | "and_b32" => |old, data| old & data,
        "xor" | "xor_b32" => |old, data| old ^ data,
        "swap" | "swap_b32" => |_, data| data,
        "umax" | "max_u32" => |old: u32, data: u32| old.max(data),
        "umin" | "min_u32" => |old: u32, data: u32| old.min(data),
        "smax" | "max_i32" => |old: u32, data: u32| (old as i32).max(data as i32) as u32,
        "smin" | "min_i32" => |old: u32, data: u32| (old as i32).min(data as i32) as u32,
        "add_f32" => |old: u32, data: u32| (f32::from_bits(old) + f32::from_bits(data)).to_bits(),
    }
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    if let Some(name) = mnemonic.strip_prefix("global_atomic_") {
        return find_atomic(name, false);
    }
    if let Some(name) = mnemonic.strip_prefix("flat_atomic_") {
        return find_atomic(name, true);
    }
    let family = FAMILIES.into_iter().find(|family| mnemonic.starts_with(family))?;
    width(&mnemonic[family.len()..])?;
    Some(match family {
        "global_load_" => |c, i| load(c, i, Space::Global),
        "global_store_" => |c, i| store(c, i, Space::Global),
        "flat_load_" => |c, i| load(c, i, Space::Flat),
        "flat_store_" => |c, i| store(c, i, Space::Flat),
        "scratch_load_" | "buffer_load_" => |c, i| load(c, i, Space::Private),
        "scratch_store_" | "buffer_store_" => |c, i| store(c, i, Space::Private),
        _ => load_scalar,
    })
}
