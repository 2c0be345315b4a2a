//! Code objects that were built (`QUANTKV_ISA_OBJECTS`, a folder; scripts/isa.sh --known): every instruction of every
//! kernel in them is known, executed or not.

use std::path::Path;
use std::{env, fs};

use crate::code_object::CodeObject;
use crate::program::{Program, disassembly};

#[test]
#[ignore = "needs code objects: scripts/isa.sh --known"]
fn every_instruction_is_known() {
    let folder = env::var("QUANTKV_ISA_OBJECTS").expect("QUANTKV_ISA_OBJECTS names a folder");
    let (mut kernels, mut instructions, mut unknown) = (0, 0, Vec::new());
    for entry in fs::read_dir(Path::new(&folder)).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        // AMDGPU: the machine's number in the ELF header.
        if bytes.get(..4) != Some(b"\x7fELF") || bytes.get(18..20) != Some(&[224, 0]) {
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
