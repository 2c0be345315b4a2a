//! Loads and stores of the local data share, one or two at a time, and its crossbar between lanes.

use crate::context::{Context, Kind};
use crate::handlers::Handler;
use crate::instruction::{Operand, Operation};
use crate::memory_ops::{Width, fill_registers, stored, width};
use crate::waits::{Counter, Registers};
use crate::wave::{Step, Value};

/// Bit 16: two places; bit 17: the offsets count 64 elements.
const PAIR: u32 = 1 << 16;
const STRIDE_64: u32 = 1 << 17;

const FAMILIES: [(&str, bool, u32); 12] = [
    ("ds_read2st64_", false, PAIR | STRIDE_64),
    ("ds_load_2addr_stride64_", false, PAIR | STRIDE_64),
    ("ds_read2_", false, PAIR),
    ("ds_load_2addr_", false, PAIR),
    ("ds_read_", false, 0),
    ("ds_load_", false, 0),
    ("ds_write2st64_", true, PAIR | STRIDE_64),
    ("ds_store_2addr_stride64_", true, PAIR | STRIDE_64),
    ("ds_write2_", true, PAIR),
    ("ds_store_2addr_", true, PAIR),
    ("ds_write_", true, 0),
    ("ds_store_", true, 0),
];

fn family(mnemonic: &str) -> Option<(bool, u32)> {
    let (name, stores, flags) = FAMILIES.into_iter().find(|family| mnemonic.starts_with(family.0))?;
    Some((stores, flags | width(&mnemonic[name.len()..])?))
}

pub fn detail(mnemonic: &str) -> Option<u32> {
    family(mnemonic).map(|(_, detail)| detail)
}

/// Addresses of all lanes, before any offset.
fn addresses(c: &Context, i: &Operation, index: usize) -> Result<Value, String> {
    let value = c.plain(Context::operand(i, index)?, 0, Kind::B32)?;
    if value.undefined & c.wave.exec != 0 {
        return Err("an address is undefined".into());
    }
    Ok(value)
}

/// Where the one place, or each of the two, lies after a lane's address.
fn offsets(i: &Operation, width: Width) -> Vec<u64> {
    if i.detail & PAIR == 0 {
        return vec![i.modifiers.offset as u64];
    }
    let unit = width.bytes as u64 * if i.detail & STRIDE_64 != 0 { 64 } else { 1 };
    i.modifiers.offsets.iter().map(|&offset| u64::from(offset) * unit).collect()
}

/// What the hardware wants of an address: the size, and of pairs of 32 or 64 bits the element's.
fn alignment(width: Width) -> usize {
    if width.bytes == 12 { 16 } else { width.bytes }
}

fn load(c: &mut Context, i: &Operation) -> Step {
    let width = Width::unpack(i.detail & 0xffff);
    let base = addresses(c, i, 1)?;
    let Operand::Vector(destination) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let places = offsets(i, width);
    let mut first = None;
    for (place, offset) in places.iter().enumerate() {
        let mut bytes = [[0u8; 16]; 64];
        let mut undefined = 0u64;
        for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
            let address = u64::from(base.lanes[lane]) + offset;
            let loaded = c.shared.load(c.wave.index, address, &mut bytes[lane][..width.bytes], alignment(width));
            undefined |= u64::from(loaded.map_err(|why| format!("lane {lane}: {why}"))?) << lane;
        }
        let slot = fill_registers(c, destination + place as u16 * width.registers(), width, &bytes, undefined)?;
        first.get_or_insert(slot);
    }
    let registers = Registers::Vectors(first.ok_or("a load of nothing")?, places.len() as u16 * width.registers());
    c.wave.waits.enqueue(&[Counter::Shared], registers, false);
    Ok(())
}

fn store(c: &mut Context, i: &Operation) -> Step {
    let width = Width::unpack(i.detail & 0xffff);
    let base = addresses(c, i, 0)?;
    for (place, offset) in offsets(i, width).into_iter().enumerate() {
        let (bytes, undefined) = stored(c, Context::operand(i, 1 + place)?, width)?;
        for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
            let address = u64::from(base.lanes[lane]) + offset;
            c.shared
                .store(c.wave.index, address, &bytes[lane][..width.bytes], undefined >> lane & 1 == 1, alignment(width))
                .map_err(|why| format!("lane {lane}: {why}"))?;
        }
    }
    c.wave.waits.enqueue(&[Counter::Shared], Registers::None, true);
    Ok(())
}

/// Each lane gets the value of the lane it names; of lanes that are not in EXEC, nothing that is defined.
fn gather(
    c: &mut Context,
    i: &Operation,
    from: impl Fn(&Context, usize) -> Result<usize, String>,
    source: usize,
) -> Step {
    let data = c.plain(Context::operand(i, source)?, 0, Kind::B32)?;
    let Operand::Vector(destination) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let mut value = Value { lanes: [0; 64], undefined: 0 };
    for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
        let from = from(c, lane)?;
        if c.wave.exec >> from & 1 == 1 {
            value.lanes[lane] = data.lanes[from];
            value.undefined |= (data.undefined >> from & 1) << lane;
        } else {
            value.undefined |= 1 << lane;
        }
    }
    let slot = c.wave.loaded_vector(destination, &value, c.wave.exec)?;
    c.wave.waits.enqueue(&[Counter::Shared], Registers::Vectors(slot, 1), false);
    Ok(())
}

fn bpermute(c: &mut Context, i: &Operation) -> Step {
    let base = addresses(c, i, 1)?;
    let offset = i.modifiers.offset as u32;
    gather(c, i, |c, lane| Ok((base.lanes[lane].wrapping_add(offset) >> 2) as usize % c.wave.width), 2)
}

/// Each lane sends its value to the lane it names; of several that name one, the highest wins.
fn permute(c: &mut Context, i: &Operation) -> Step {
    let base = addresses(c, i, 1)?;
    let offset = i.modifiers.offset as u32;
    let mut senders = [None; 64];
    for lane in (0..c.wave.width).filter(|lane| c.wave.exec >> lane & 1 == 1) {
        senders[(base.lanes[lane].wrapping_add(offset) >> 2) as usize % c.wave.width] = Some(lane);
    }
    let width = c.wave.width;
    let idle = (0..width).find(|lane| c.wave.exec >> lane & 1 == 0);
    // Who gets nothing gets a zero; it is held to be undefined, as a lane without a sender is a mistake.
    gather(c, i, |_, lane| senders[lane].or(idle).ok_or_else(|| format!("ds_permute: nobody sends to lane {lane}")), 2)
}

fn swizzle(c: &mut Context, i: &Operation) -> Step {
    let pattern = i.modifiers.offset as usize;
    gather(
        c,
        i,
        |_, lane| {
            Ok(if pattern & 0x8000 != 0 {
                lane & !3 | (pattern >> (2 * (lane & 3)) & 3)
            } else {
                lane & !31 | (((lane & 31 & pattern) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31))
            })
        },
        1,
    )
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    match mnemonic {
        "ds_bpermute_b32" => return Some(bpermute),
        "ds_permute_b32" => return Some(permute),
        "ds_swizzle_b32" => return Some(swizzle),
        _ => {}
    }
    let (stores, _) = family(mnemonic)?;
    Some(if stores { store } else { load })
}
