//! A simulator of AMD's instruction sets, for the code objects that ship: it reads their disassembly and runs it, lane by
//! lane, behind the stand-in for HIP's runtime (testing/amd/hip.cpp). What it checks and what it cannot: docs/isa.md.
//!
//! ```text
//! code_object, messagepack   ELF file: descriptors, where arguments lie
//! program, instruction       llvm-objdump's text, read once
//! handlers                   mnemonic ─► scalar, vector, vector_float, vector_special, compare, matrix,
//!                            memory_ops, shared_ops
//! context                    how operands are read and written
//! wave, waits                registers, which of their bits are defined, which a load has yet to fill
//! memory, shared             device memory, the local data share
//! launch                     blocks, waves, barriers
//! mutation                   bugs planted on purpose
//! ```

mod code_object;
mod compare;
mod context;
mod float;
mod handlers;
mod instruction;
mod launch;
mod matrix;
mod memory;
mod memory_ops;
mod messagepack;
mod mutation;
mod program;
mod scalar;
mod shared;
mod shared_ops;
mod vector;
mod vector_float;
mod vector_special;
mod waits;
mod wave;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::Mutex;

use code_object::CodeObject;
use launch::{Launch, Order, pack_arguments};
use memory::DeviceMemory;
use program::{Program, disassembly};

/// hipError_t.
const SUCCESS: c_int = 0;
const LAUNCH_FAILURE: c_int = 719;

/// Kernels that were asked for, by code object and name. They live as long as the process.
static KERNELS: Mutex<Option<HashMap<(usize, String), &'static Program>>> = Mutex::new(None);

/// Disassemblies, by code object.
static TEXTS: Mutex<Option<HashMap<usize, &'static str>>> = Mutex::new(None);

fn find(code: *const u8, name: &str) -> Result<&'static Program, String> {
    // SAFETY: hip.cpp passes code objects, which it has looked at; they are constants of the program.
    let bytes = unsafe { std::slice::from_raw_parts(code, code_object::length(code)) };
    let mut kernels = KERNELS.lock().map_err(|_| "a thread died while it looked for a kernel")?;
    let kernels = kernels.get_or_insert_default();
    let key = (code as usize, name.to_owned());
    if let Some(program) = kernels.get(&key) {
        return Ok(program);
    }
    let mut texts = TEXTS.lock().map_err(|_| "a thread died while it looked for a kernel")?;
    let texts = texts.get_or_insert_default();
    let text = match texts.get(&(code as usize)) {
        Some(text) => text,
        None => {
            let text: &'static str = Box::leak(disassembly(bytes)?.into_boxed_str());
            texts.entry(code as usize).or_insert(text)
        }
    };
    let program: &'static Program = Box::leak(Box::new(Program::of(&CodeObject::parse(bytes)?, text, name)?));
    kernels.insert(key, program);
    Ok(program)
}

/// The kernel of a code object, or null with a line on stderr.
///
/// # Safety
/// `code` is an ELF file that stays where it is, `name` a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn quantkv_isa_find(code: *const u8, name: *const c_char) -> *const Program {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    match find(code, &name) {
        Ok(program) => program,
        Err(why) => {
            eprintln!("isa: {name}: {why}");
            std::ptr::null()
        }
    }
}

/// The allocation that holds an address, as hip.cpp finds it; 0 if there is none.
pub type FindAllocation = extern "C" fn(address: u64, start: *mut u64, end: *mut u64) -> c_int;

/// Runs a grid. The message of a fault goes to stderr.
///
/// # Safety
/// `kernel` is one that `quantkv_isa_find` gave; `params` point to its arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn quantkv_isa_run(
    kernel: *const Program,
    grid: *const u32,
    threads: u32,
    dynamic_bytes: u32,
    params: *const *const u8,
    find_allocation: FindAllocation,
) -> c_int {
    // SAFETY: the caller's promise.
    let (program, grid) = unsafe { (&*kernel, [*grid, *grid.add(1), *grid.add(2)]) };
    let run = || {
        // SAFETY: the caller's promise.
        let arguments = unsafe { pack_arguments(program, grid, threads, dynamic_bytes, params) }?;
        let find = Box::new(move |address| {
            let (mut start, mut end) = (0, 0);
            (find_allocation(address, &mut start, &mut end) != 0).then_some((start, end))
        });
        let memory = DeviceMemory::new(find, arguments);
        let dynamic_bytes = dynamic_bytes as usize;
        Launch { program, memory, grid, threads, dynamic_bytes, order: Order::from_environment() }.run()?;
        program.report_reached()
    };
    match run() {
        Ok(()) => SUCCESS,
        Err(why) => {
            eprintln!("isa: kernel {}, {why}", program.info.name);
            LAUNCH_FAILURE
        }
    }
}
