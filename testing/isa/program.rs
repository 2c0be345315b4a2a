//! The instructions of a kernel, from the disassembly that `llvm-objdump` makes of its code object.
//!
//! The disassembly of a whole code object is kept in a file named after its bytes: a test program asks for it once for
//! every kernel, and the next one again.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::{env, fs};

use crate::code_object::{CodeObject, KernelInfo};
use crate::context::{TARGETS, Target};
use crate::instruction::{Instruction, parse_line};
use crate::mutation::Mutation;

pub struct Program {
    pub info: KernelInfo,
    pub target: &'static Target,
    pub instructions: Vec<Line>,
    /// Of each instruction: whether it was executed, and whether `report_reached` has said so.
    reached: Vec<AtomicU8>,
    /// By (address - entry) / 4: the place in `instructions`, or none in the middle of one.
    places: Vec<Option<u32>>,
}

/// What is not understood is a fault when it is reached: padding after the end never is.
pub type Line = Result<Instruction, String>;

impl Program {
    pub fn of(object: &CodeObject, disassembly: &str, name: &str) -> Result<Self, String> {
        let info = object.kernel(name)?;
        let target = target_of(object)?;
        if target.wave != info.wave {
            return Err(format!("{name} is for waves of {}", info.wave));
        }
        let label = format!("{:016x} <{name}>:\n", info.descriptor.entry);
        let start = disassembly.find(&label).ok_or_else(|| format!("{name} is not in the disassembly"))?;
        Ok(Self::from_lines(info, target, &disassembly[start + label.len()..]))
    }

    /// The program in lines of a disassembly, up to the next label.
    pub fn from_lines(info: KernelInfo, target: &'static Target, lines: &str) -> Self {
        let mut instructions = Vec::new();
        let mut places = vec![None; ((info.end - info.descriptor.entry) / 4) as usize];
        for line in lines.lines() {
            if line.ends_with(">:") {
                break;
            }
            let Some(instruction) = parse_line(line) else { continue };
            let Some(address) = address_of(line) else { continue };
            if let Some(place) = places.get_mut(((address - info.descriptor.entry) / 4) as usize) {
                *place = Some(instructions.len() as u32);
                instructions.push(instruction);
            }
        }
        if let Some(mutation) = Mutation::from_environment() {
            mutation.apply(&info.name, &mut instructions);
        }
        let reached = instructions.iter().map(|_| AtomicU8::new(0)).collect();
        Program { info, target, instructions, reached, places }
    }

    /// The place of the instruction at an address.
    pub fn place(&self, address: u64) -> Result<usize, String> {
        let distance = address.wrapping_sub(self.info.descriptor.entry);
        let place = self.places.get((distance / 4) as usize).copied().flatten().filter(|_| distance % 4 == 0);
        place.map(|place| place as usize).ok_or_else(|| format!("no instruction begins at {address:#x}"))
    }

    pub fn reach(&self, place: usize) {
        if self.reached[place].load(Ordering::Relaxed) == 0 {
            self.reached[place].store(1, Ordering::Relaxed);
        }
    }

    /// Appends to a file of this process in `QUANTKV_ISA_COVERAGE`, if that is a folder, what was executed for the first
    /// time: kernel, its number of instructions, address.
    pub fn report_reached(&self) -> Result<(), String> {
        let Some(folder) = env::var_os("QUANTKV_ISA_COVERAGE") else { return Ok(()) };
        let mut text = String::new();
        for (line, reached) in self.instructions.iter().zip(&self.reached) {
            if let (Ok(instruction), Ok(_)) =
                (line, reached.compare_exchange(1, 2, Ordering::Relaxed, Ordering::Relaxed))
            {
                let (name, count) = (&self.info.name, self.instructions.len());
                text += &format!("{name} {count} {:#x}\n", instruction.address);
            }
        }
        let path = Path::new(&folder).join(std::process::id().to_string());
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Lines that are not understood, each with the reason.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.instructions.iter().filter_map(|line| line.as_ref().err()).map(String::as_str)
    }
}

fn address_of(line: &str) -> Option<u64> {
    let (_, comment) = line.split_once("// ")?;
    u64::from_str_radix(comment.split_once(": ")?.0.trim(), 16).ok()
}

pub fn target_of(object: &CodeObject) -> Result<&'static Target, String> {
    let found = TARGETS.iter().find(|target| target.machine == object.machine);
    found.ok_or_else(|| format!("an architecture that is not known here: {:#x} in the ELF flags", object.machine))
}

/// The disassembly of a code object, from the cache if it is there.
pub fn disassembly(code: &[u8]) -> Result<String, String> {
    let folder = env::var_os("QUANTKV_ISA_CACHE").map_or_else(env::temp_dir, PathBuf::from);
    let kept = folder.join(format!("quantkv-isa-{:016x}.s", fingerprint(code)));
    if let Ok(text) = fs::read_to_string(&kept) {
        return Ok(text);
    }
    let named = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    // Others may make it at the same time: each in files of its own, put in place at once.
    let own = folder.join(format!("quantkv-isa-{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::write(&own, code).map_err(|error| named(&own, error))?;
    let text = run_objdump(&own);
    fs::remove_file(&own).map_err(|error| named(&own, error))?;
    let text = text?;
    let made = own.with_extension("s");
    fs::write(&made, &text).map_err(|error| named(&made, error))?;
    fs::rename(&made, &kept).map_err(|error| named(&kept, error))?;
    Ok(text)
}

pub fn run_objdump(file: &Path) -> Result<String, String> {
    let program = env::var("QUANTKV_LLVM_OBJDUMP").unwrap_or_else(|_| "llvm-objdump-19".to_owned());
    let output = Command::new(&program).arg("-d").arg(file).output();
    let output = output.map_err(|error| format!("{program}: {error} (scripts/get-rocm-clang.sh installs it)"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{program}: {error}"))
}

/// FNV-1a.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
