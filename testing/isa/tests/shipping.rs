//! Code objects that were built (`QUANTKV_ISA_OBJECTS`, a folder; scripts/isa.sh --known): every instruction of every
//! kernel in them is known, executed or not.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::code_object::CodeObject;
use crate::program::{Program, disassembly};

/// gfx950's: LLVM 19 does not disassemble them.
const NOT_READ: u8 = 0x4f;

fn code_objects(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            code_objects(&path, found);
        } else if path.extension().is_some_and(|end| end == "o") {
            found.push(path);
        }
    }
}

#[test]
#[ignore = "needs code objects: scripts/isa.sh --known"]
fn every_instruction_is_known() {
    let folder = env::var("QUANTKV_ISA_OBJECTS").expect("QUANTKV_ISA_OBJECTS names a folder");
    let (mut paths, mut kernels, mut instructions, mut unknown) = (Vec::new(), 0, 0, Vec::new());
    code_objects(Path::new(&folder), &mut paths);
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        // AMDGPU: the machine's number in the ELF header.
        let is_code_object = bytes.get(..4) == Some(b"\x7fELF") && bytes.get(18..20) == Some(&[224, 0]);
        if !is_code_object || bytes[48] == NOT_READ {
            continue;
        }
        let object = CodeObject::parse(&bytes).unwrap();
        let text = disassembly(&bytes).unwrap();
        for name in object.names() {
            let program = Program::of(&object, &text, &name).unwrap();
            kernels += 1;
            instructions += program.instructions.len();
            unknown.extend(program.unknown().map(|why| format!("{}: {name}: {why}", path.display())));
        }
    }
    println!("{kernels} kernels, {instructions} instructions, {} not known", unknown.len());
    assert!(kernels > 0, "no code objects in {folder}");
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
}
