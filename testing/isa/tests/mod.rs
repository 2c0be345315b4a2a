//! Tests of the simulator: small programs, assembled by llvm-mc and read back as kernels are, against arithmetic of the
//! host's, layouts as the ISA manuals give them, and mistakes that must be seen.

mod arithmetic;
mod faults;
mod jumps;
mod lanes;
mod matrices;
mod memory;
mod shipping;

use std::process::Command;
use std::{env, fs};

use crate::code_object::{Argument, Descriptor, KernelInfo};
use crate::context::{TARGETS, Target};
use crate::launch::{Launch, Order};
use crate::memory::DeviceMemory;
use crate::program::{Program, run_objdump};

pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a known architecture")
}

/// The program that an assembler's text makes. s[0:1] holds the address of the arguments, v0 the thread.
pub fn assemble(arch: &str, text: &str) -> Program {
    assemble_all(arch, &[text.to_owned()]).remove(0)
}

/// Several at once: starting the assembler takes longer than anything else here.
fn assemble_all(arch: &str, texts: &[String]) -> Vec<Program> {
    let base = env::temp_dir().join(format!("isa-test-{}-{:?}", std::process::id(), std::thread::current().id()));
    let (source, object) = (base.with_extension("s"), base.with_extension("o"));
    // Labels that begin with .L are no symbols, and must differ.
    let named =
        texts.iter().enumerate().map(|(at, text)| format!("p{at}:\n{}\n", text.replace(".L", &format!(".L{at}_"))));
    fs::write(&source, named.collect::<String>()).unwrap();
    let program = env::var("QUANTKV_LLVM_MC").unwrap_or_else(|_| "llvm-mc-19".to_owned());
    let mut command = Command::new(program);
    command.args(["-triple=amdgcn-amd-amdhsa", "-filetype=obj"]).arg(format!("-mcpu={arch}"));
    let made = command.arg(&source).arg("-o").arg(&object).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let disassembly = run_objdump(&object).unwrap();
    fs::remove_file(&source).unwrap();
    fs::remove_file(&object).unwrap();
    (0..texts.len()).map(|at| program_at(arch, &disassembly, at)).collect()
}

fn program_at(arch: &str, disassembly: &str, number: usize) -> Program {
    let (before, code) = disassembly.split_once(&format!(" <p{number}>:\n")).unwrap();
    let entry = u64::from_str_radix(&before[before.len() - 16..], 16).unwrap();
    let target = target(arch);
    let info = KernelInfo {
        name: "test".into(),
        descriptor: Descriptor {
            entry,
            shared_bytes: 1024,
            private_bytes: 64,
            argument_bytes: 64,
            modes: 0xf0 << 12,
            registers: 1 << 7 | 2 << 1,
            properties: 1 << 3,
        },
        arguments: (0..8).map(|at| Argument { offset: 8 * at, bytes: 8, kind: "by_value".into() }).collect(),
        end: entry + 16 * (1 + code.lines().take_while(|line| !line.is_empty()).count() as u64), // at most that long each
        vector_registers: 128,
        accumulators: 32,
        wave: target.wave,
    };
    Program::from_lines(info, target, code)
}

/// Runs a program over buffers, whose addresses are its arguments, in one block.
pub fn run_block(program: &Program, threads: u32, buffers: &mut [Vec<u32>]) -> Result<(), String> {
    run_in(program, [1, 1, 1], threads, buffers, Order::Forward)
}

pub fn run_in(
    program: &Program,
    grid: [u32; 3],
    threads: u32,
    buffers: &mut [Vec<u32>],
    order: Order,
) -> Result<(), String> {
    let ranges: Vec<(u64, u64)> =
        buffers.iter_mut().map(|buffer| (buffer.as_mut_ptr() as u64, 4 * buffer.len() as u64)).collect();
    let mut arguments: Vec<u8> = ranges.iter().flat_map(|range| range.0.to_le_bytes()).collect();
    arguments.resize(64, 0);
    let find = move |address| {
        let held = ranges.iter().find(|(start, bytes)| (*start..start + bytes).contains(&address));
        held.map(|(start, bytes)| (*start, start + bytes))
    };
    let memory = DeviceMemory::new(Box::new(find), arguments);
    Launch { program, memory, grid, threads, dynamic_bytes: 0, order }.run()
}

/// What instructions must leave in v10 and v11 of a lane that had these in v1, v2 and v3.
type Expected = Box<dyn Fn([u32; 3]) -> [u32; 2]>;

/// Instructions run over lanes: a, b, c of each in v1, v2, v3 (and in v[20:22]); results in v10 and v11.
#[derive(Default)]
pub struct Cases(Vec<(&'static str, String, Vec<[u32; 3]>, Expected)>);

impl Cases {
    pub fn add(
        &mut self,
        arch: &'static str,
        code: &str,
        inputs: &[[u32; 3]],
        expected: impl Fn([u32; 3]) -> [u32; 2] + 'static,
    ) {
        self.0.push((arch, code.to_owned(), inputs.to_vec(), Box::new(expected)));
    }

    pub fn check(&self) {
        for arch in ALL {
            let own: Vec<_> = self.0.iter().filter(|case| case.0 == arch).collect();
            let texts: Vec<String> = own.iter().map(|case| between_load_and_store(arch, &case.1)).collect();
            for ((_, code, inputs, expected), program) in own.into_iter().zip(assemble_all(arch, &texts)) {
                for lanes in inputs.chunks(program.target.wave) {
                    let mut buffers = [lanes.concat(), vec![0; 2 * lanes.len()]];
                    let run = run_block(&program, lanes.len() as u32, &mut buffers);
                    run.unwrap_or_else(|why| panic!("{arch}: {code}: {why}"));
                    for (input, got) in lanes.iter().zip(buffers[1].chunks(2)) {
                        let wanted = expected(*input);
                        let right = same(got[0], wanted[0]) && same(got[1], wanted[1]);
                        assert!(right, "{arch}: {code} of {input:x?} is {got:x?}, not {wanted:x?}");
                    }
                }
            }
        }
    }
}

/// Equal bits, or NaN both.
fn same(a: u32, b: u32) -> bool {
    a == b || (f32::from_bits(a).is_nan() && f32::from_bits(b).is_nan())
}

fn between_load_and_store(arch: &str, code: &str) -> String {
    let (load_arguments, wait_arguments, load, wait, store) = match arch {
        "gfx90a" | "gfx942" => (
            "s_load_dwordx4",
            "s_waitcnt lgkmcnt(0)",
            "global_load_dwordx3",
            "s_waitcnt vmcnt(0)",
            "global_store_dwordx2",
        ),
        "gfx1201" => ("s_load_b128", "s_wait_kmcnt 0x0", "global_load_b96", "s_wait_loadcnt 0x0", "global_store_b64"),
        _ => ("s_load_b128", "s_waitcnt lgkmcnt(0)", "global_load_b96", "s_waitcnt vmcnt(0)", "global_store_b64"),
    };
    // gfx90a wants tuples of registers to begin at even ones: through v[20:22].
    format!(
        "{load_arguments} s[4:7], s[0:1], 0x0\n v_mul_u32_u24 v5, 12, v0\n v_lshlrev_b32 v6, 3, v0\n {wait_arguments}\n\
         {load} v[20:22], v5, s[4:5]\n {wait}\n v_mov_b32 v1, v20\n v_mov_b32 v2, v21\n v_mov_b32 v3, v22\n\
         v_mov_b32 v10, 0\n v_mov_b32 v11, 0\n {code}\n {store} v6, v[10:11], s[6:7]\n s_endpgm\n"
    )
}

/// Numbers without a pattern.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }
}

/// Words at the edges of integers and floats, and random ones.
pub fn words(count: usize) -> Vec<[u32; 3]> {
    const EDGES: [u32; 16] = [
        0,
        1,
        0xffff_ffff,
        0x7fff_ffff,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x0080_0000,
        0x007f_ffff,
        0x4b80_0000,
        0x1234_5678,
        31,
        0x0000_8001,
    ];
    let mut random = Random(0x5eed_0123_4567_89ab);
    let mut one = |at: usize| if at.is_multiple_of(3) { EDGES[random.word() as usize % 16] } else { random.word() };
    (0..count).map(|at| [one(at), one(at + 1), one(at + 2)]).collect()
}

pub const ALL: [&str; 4] = ["gfx90a", "gfx942", "gfx1100", "gfx1201"];
