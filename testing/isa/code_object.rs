//! A code object as the loader reads it: an ELF file with a descriptor of 64 bytes for each kernel (`name.kd`), its code
//! (`name`), and a note in MessagePack that says where each argument lies.
//!
//! ```text
//! .dynsym   name     ─► .text    machine code
//!           name.kd  ─► .rodata  descriptor: which registers are set up, with what
//! .note                          {"amdhsa.kernels": [{".name", ".args": [{".offset", ".size", ".value_kind"}], ..}]}
//! ```

use crate::messagepack::{self, Value};

/// One argument: where it lies in the argument buffer, and what it is ("by_value", "hidden_block_count_x").
#[derive(Clone, Debug)]
pub struct Argument {
    pub offset: usize,
    pub bytes: usize,
    pub kind: String,
}

/// What the descriptor says of the state in which a wave starts.
#[derive(Clone, Debug, Default)]
pub struct Descriptor {
    pub entry: u64,
    pub shared_bytes: usize,
    pub private_bytes: usize,
    pub argument_bytes: usize,
    /// `compute_pgm_rsrc1`: modes of floating point.
    pub modes: u32,
    /// `compute_pgm_rsrc2`: which registers come after the user's.
    pub registers: u32,
    /// `kernel_code_properties`: what the user's registers hold.
    pub properties: u16,
}

/// A kernel of a code object.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    pub name: String,
    pub descriptor: Descriptor,
    pub arguments: Vec<Argument>,
    /// Where its code ends.
    pub end: u64,
    pub vector_registers: usize,
    pub accumulators: usize,
    pub wave: usize,
}

/// A code object.
pub struct CodeObject<'a> {
    bytes: &'a [u8],
    /// `e_flags & 0xff`: the architecture.
    pub machine: u8,
    symbols: Vec<(String, u64, u64)>,
    sections: Vec<Section>,
    kernels: Vec<Value>,
}

struct Section {
    kind: u32,
    address: u64,
    offset: usize,
    bytes: usize,
    link: usize,
}

const NOTE: u32 = 7;
const NO_BITS: u32 = 8;
const DYNAMIC_SYMBOLS: u32 = 11;

/// Bytes of the ELF file that begins at `code`: what its section headers reach.
///
/// # Safety
/// An ELF file of 64 bits lies there.
pub unsafe fn length(code: *const u8) -> usize {
    // SAFETY: the header's 64 bytes are there, as the caller says.
    let header = unsafe { std::slice::from_raw_parts(code, 64) };
    let number = |at: usize, bytes: usize| little_endian(&header[at..at + bytes]) as usize;
    number(40, 8) + number(58, 2) * number(60, 2)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl<'a> CodeObject<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let number = |at: usize, width: usize| -> Result<u64, String> {
            bytes.get(at..at + width).map(little_endian).ok_or_else(|| format!("the ELF file ends before byte {at}"))
        };
        if bytes.get(..4) != Some(b"\x7fELF") {
            return Err("no ELF file".into());
        }
        let (headers, size, count) = (number(40, 8)? as usize, number(58, 2)? as usize, number(60, 2)? as usize);
        let mut sections = Vec::new();
        for at in (0..count).map(|index| headers + index * size) {
            sections.push(Section {
                kind: number(at + 4, 4)? as u32,
                address: number(at + 16, 8)?,
                offset: number(at + 24, 8)? as usize,
                bytes: number(at + 32, 8)? as usize,
                link: number(at + 40, 4)? as usize,
            });
        }
        let mut object =
            CodeObject { bytes, machine: number(48, 1)? as u8, symbols: Vec::new(), sections, kernels: Vec::new() };
        object.read_symbols()?;
        object.read_notes()?;
        Ok(object)
    }

    fn contents(&self, section: &Section) -> Result<&'a [u8], String> {
        let range = section.offset..section.offset + section.bytes;
        self.bytes.get(range).ok_or_else(|| "a section lies outside the file".to_owned())
    }

    fn read_symbols(&mut self) -> Result<(), String> {
        let table = self.sections.iter().find(|section| section.kind == DYNAMIC_SYMBOLS).ok_or("no dynamic symbols")?;
        let names = self.contents(self.sections.get(table.link).ok_or("no names of symbols")?)?;
        let mut symbols = Vec::new();
        for entry in self.contents(table)?.chunks_exact(24) {
            let name = names.get(little_endian(&entry[0..4]) as usize..).unwrap_or_default();
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            let (value, size) = (little_endian(&entry[8..16]), little_endian(&entry[16..24]));
            symbols.push((String::from_utf8_lossy(name).into_owned(), value, size));
        }
        self.symbols = symbols;
        Ok(())
    }

    fn read_notes(&mut self) -> Result<(), String> {
        for section in self.sections.iter().filter(|section| section.kind == NOTE) {
            let note = self.contents(section)?;
            let (name, size) = (little_endian(&note[0..4]) as usize, little_endian(&note[4..8]) as usize);
            let start = 12 + name.next_multiple_of(4);
            let text = note.get(start..start + size).ok_or("a note that ends too early")?;
            if let Some(Value::Array(kernels)) = messagepack::parse(text)?.get("amdhsa.kernels") {
                self.kernels.clone_from(kernels);
            }
        }
        Ok(())
    }

    fn symbol(&self, name: &str) -> Option<(u64, u64)> {
        self.symbols.iter().find(|(own, ..)| own == name).map(|&(_, value, size)| (value, size))
    }

    /// Bytes at an address of the loaded object.
    fn at(&self, address: u64, bytes: usize) -> Result<&'a [u8], String> {
        let section = self.sections.iter().find(|section| {
            section.kind != NO_BITS && section.address <= address && address < section.address + section.bytes as u64
        });
        let section = section.ok_or_else(|| format!("nothing lies at {address:#x}"))?;
        let start = section.offset + (address - section.address) as usize;
        self.bytes.get(start..start + bytes).ok_or_else(|| format!("nothing lies at {address:#x}"))
    }

    /// Names of its kernels.
    pub fn names(&self) -> Vec<String> {
        self.kernels.iter().filter_map(|kernel| Some(kernel.get(".name")?.text()?.to_owned())).collect()
    }

    pub fn kernel(&self, name: &str) -> Result<KernelInfo, String> {
        let described = self.kernels.iter().find(|kernel| kernel.get(".name").and_then(Value::text) == Some(name));
        let described = described.ok_or_else(|| format!("{name} is not among the metadata's kernels"))?;
        let number = |key: &str| -> Result<usize, String> {
            described.get(key).and_then(Value::number).map(|n| n as usize).ok_or_else(|| format!("{name}: no {key}"))
        };
        let (start, size) = self.symbol(name).ok_or_else(|| format!("no symbol {name}"))?;
        let (at, _) = self.symbol(&format!("{name}.kd")).ok_or_else(|| format!("no symbol {name}.kd"))?;
        let bytes = self.at(at, 64)?;
        let word = |at: usize| little_endian(&bytes[at..at + 4]) as u32;
        if little_endian(&bytes[58..60]) != 0 {
            return Err(format!("{name}: arguments preloaded into registers are not known here"));
        }
        let descriptor = Descriptor {
            entry: at.wrapping_add(little_endian(&bytes[16..24])),
            shared_bytes: word(0) as usize,
            private_bytes: word(4) as usize,
            argument_bytes: word(8) as usize,
            modes: word(48),
            registers: word(52),
            properties: little_endian(&bytes[56..58]) as u16,
        };
        let mut arguments = Vec::new();
        for argument in described.get(".args").and_then(Value::items).unwrap_or_default() {
            let get = |key: &str| argument.get(key).and_then(Value::number).map(|n| n as usize);
            let kind = argument.get(".value_kind").and_then(Value::text).map(str::to_owned);
            match (get(".offset"), get(".size"), kind) {
                (Some(offset), Some(bytes), Some(kind)) => arguments.push(Argument { offset, bytes, kind }),
                _ => return Err(format!("{name}: an argument without offset, size or kind")),
            }
        }
        Ok(KernelInfo {
            name: name.to_owned(),
            descriptor,
            arguments,
            end: start + size,
            vector_registers: number(".vgpr_count")?,
            accumulators: number(".agpr_count").unwrap_or(0),
            wave: number(".wavefront_size")?,
        })
    }
}
