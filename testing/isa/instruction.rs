//! An instruction, read from a line of `llvm-objdump -d`:
//!
//! ```text
//!     v_add_f32_e64 v3, |v1|, -v2 clamp        // 000000001D2C: D1018103 40020501
//!     └ mnemonic    └ operands    └ modifiers     └ address     └ words: their number is its size
//! ```
//! The encoding's suffix (`_e32`, `_e64`, `_sdwa`, `_dpp`) is dropped: what it allows shows in operands and modifiers.
//! `v_dual_x .. :: v_dual_y ..` is one instruction with a second half. What is not understood is an error, never left out.

use crate::handlers::{self, Handler};
use crate::scalar;

/// Numbers of scalar registers beyond s105; those of the trap handler's temporaries hold the block's index on gfx12.
pub const VCC: u8 = 106;
pub const TTMP: u8 = 108;
pub const M0: u8 = 124;
pub const EXEC: u8 = 126;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operand {
    /// The first of its registers; accumulators come after `ACCUMULATORS`.
    Vector(u16),
    Scalar(u8),
    Integer(i64),
    Float(f64),
    Scc,
    /// Reads as zero, forgets what is written; also `off`.
    Null,
}
pub const ACCUMULATORS: u16 = 512;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source {
    pub operand: Operand,
    pub negate: bool,
    pub absolute: bool,
    /// SDWA's sign extension.
    pub extend: bool,
}

/// A part of a register that SDWA selects: its first bit and its width.
pub type Part = (u32, u32);
pub const WHOLE: Part = (0, 32);

/// Where a lane of DPP reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Move {
    Quad([u8; 4]),
    ShiftRight(u32),
    ShiftLeft(u32),
    RotateRight(u32),
    Mirror,
    HalfMirror,
    Share(u32),
    Xor(u32),
    Broadcast(u32),
    /// `dpp8`: within groups of eight.
    Eight([u8; 8]),
}

#[derive(Clone, Debug)]
pub struct Modifiers {
    pub offset: i64,
    pub offsets: [u32; 2],
    pub offen: bool,
    pub op_sel: u8,
    /// `None` where it is not written: all ones for packed operations, zero for `v_fma_mix`.
    pub op_sel_hi: Option<u8>,
    pub neg_lo: u8,
    pub neg_hi: u8,
    pub clamp: bool,
    /// What the result is multiplied by.
    pub scale: f32,
    pub sdwa: bool,
    pub dst_sel: Part,
    pub src_sel: [Part; 2],
    pub preserve: bool,
    pub dpp: Option<Move>,
    pub row_mask: u8,
    pub bank_mask: u8,
    pub bound_ctrl: bool,
    /// `sc0`, `glc`, `th:TH_ATOMIC_RETURN`: an atomic gives back what was there.
    pub returns: bool,
}

impl Default for Modifiers {
    fn default() -> Self {
        Modifiers {
            offset: 0,
            offsets: [0; 2],
            offen: false,
            op_sel: 0,
            op_sel_hi: None,
            neg_lo: 0,
            neg_hi: 0,
            clamp: false,
            scale: 1.0,
            sdwa: false,
            dst_sel: WHOLE,
            src_sel: [WHOLE; 2],
            preserve: false,
            dpp: None,
            row_mask: 15,
            bank_mask: 15,
            bound_ctrl: false,
            returns: false,
        }
    }
}

/// One operation: an instruction, or a half of a dual one.
#[derive(Clone, Debug)]
pub struct Operation {
    pub mnemonic: String,
    pub operands: Vec<Source>,
    pub modifiers: Modifiers,
    /// `s_waitcnt vmcnt(0) lgkmcnt(1)`: names and numbers.
    pub counters: Vec<(String, u32)>,
    /// What the handler reads off the mnemonic, worked out once.
    pub detail: u32,
    pub handler: Handler,
}

/// What launch.rs does with an instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    Ordinary,
    Branch,
    /// To the address in a register pair: how LLVM writes a branch too far for 16 bits.
    Jump,
    End,
    /// Both halves of a barrier at once, or one of them (gfx12).
    Barrier,
    Signal,
    Wait,
}

fn role(mnemonic: &str) -> Role {
    match mnemonic {
        "s_endpgm" => Role::End,
        "s_barrier" => Role::Barrier,
        "s_barrier_signal" => Role::Signal,
        "s_barrier_wait" => Role::Wait,
        "s_setpc_b64" => Role::Jump,
        _ if scalar::is_branch(mnemonic) => Role::Branch,
        _ => Role::Ordinary,
    }
}

#[derive(Clone, Debug)]
pub struct Instruction {
    pub address: u64,
    pub bytes: u64,
    pub text: String,
    /// Where a branch goes.
    pub target: u64,
    pub role: Role,
    pub first: Operation,
    pub second: Option<Operation>,
}

impl Instruction {
    /// Another text at the same place, with the same size and target.
    pub fn changed(&self, text: &str) -> Result<Self, String> {
        let (first, second) = parse_text(text)?;
        let role = role(&first.mnemonic);
        Ok(Instruction { text: text.to_owned(), role, first, second, ..self.clone() })
    }
}

/// A line of the disassembly, or `None` if it holds no instruction.
pub fn parse_line(line: &str) -> Option<Result<Instruction, String>> {
    let (text, comment) = line.strip_prefix('\t')?.split_once("// ")?;
    let (address, words) = comment.split_once(": ")?;
    let address = u64::from_str_radix(address.trim(), 16).ok()?;
    let words: Vec<u32> = words.split(' ').map_while(|word| u32::from_str_radix(word, 16).ok()).collect();
    let text = text.trim();
    let named = |why: String| format!("{why}: `{text}` at {address:#x}");
    Some(parse(address, &words, text).map_err(named))
}

fn parse(address: u64, words: &[u32], text: &str) -> Result<Instruction, String> {
    let bytes = 4 * words.len() as u64;
    let distance = i64::from(*words.first().ok_or("an instruction without words")? as u16 as i16);
    let target = (address + 4).wrapping_add_signed(4 * distance);
    let (first, second) = parse_text(text)?;
    let role = role(&first.mnemonic);
    Ok(Instruction { address, bytes, text: text.to_owned(), target, role, first, second })
}

fn parse_text(text: &str) -> Result<(Operation, Option<Operation>), String> {
    match text.split_once(" :: ") {
        Some((first, second)) => Ok((parse_operation(first)?, Some(parse_operation(second)?))),
        None => Ok((parse_operation(text)?, None)),
    }
}

fn parse_operation(text: &str) -> Result<Operation, String> {
    let (name, rest) = text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
    let mut mnemonic = name.to_owned();
    let mut modifiers = Modifiers::default();
    for suffix in ["_dpp", "_sdwa", "_e32", "_e64"] {
        if let Some(short) = mnemonic.strip_suffix(suffix) {
            modifiers.sdwa |= suffix == "_sdwa";
            mnemonic = short.to_owned();
        }
    }
    if let Some(half) = mnemonic.strip_prefix("v_dual_") {
        mnemonic = format!("v_{half}");
    }
    let handler = handlers::find(&mnemonic).ok_or("an instruction that is not known here")?;
    let mut counters = Vec::new();
    let mut operands = Vec::new();
    if mnemonic == "s_waitcnt" {
        for word in rest.split_whitespace() {
            let (name, number) = word.trim_end_matches(')').split_once('(').ok_or("a counter without a number")?;
            counters.push((name.to_owned(), number.parse().map_err(|_| "a counter without a number")?));
        }
    } else if !handlers::is_idle(&mnemonic) && !scalar::is_branch(&mnemonic) {
        let (plain, rest) = split_modifiers(rest);
        for word in rest {
            modifiers.read(word)?;
        }
        for operand in split_operands(plain) {
            operands.push(parse_source(operand)?);
        }
    }
    let detail = handlers::detail(&mnemonic)?;
    Ok(Operation { mnemonic, operands, modifiers, counters, detail, handler })
}

/// Operands are separated by commas, modifiers follow by spaces.
fn split_modifiers(text: &str) -> (&str, Vec<&str>) {
    let mut depth = 0;
    let mut after_comma = true;
    let mut end = text.len();
    for (at, character) in text.char_indices() {
        match character {
            '[' | '(' => depth += 1,
            ']' | ')' => depth -= 1,
            ',' if depth == 0 => after_comma = true,
            ' ' if depth == 0 && !after_comma => {
                end = at;
                break;
            }
            ' ' => {}
            _ => after_comma = false,
        }
    }
    (&text[..end], text[end..].split_whitespace().collect())
}

fn split_operands(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut operands) = (0, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '[' | '(' => depth += 1,
            ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                operands.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    if !text[start..].trim().is_empty() {
        operands.push(text[start..].trim());
    }
    operands
}

fn parse_source(text: &str) -> Result<Source, String> {
    let mut source = Source { operand: Operand::Null, negate: false, absolute: false, extend: false };
    let mut text = text;
    if let Some(inner) = text.strip_prefix("sext(").and_then(|rest| rest.strip_suffix(')')) {
        source.extend = true;
        text = inner;
    }
    if let Some(inner) = text.strip_prefix('-').filter(|rest| !rest.starts_with(|c: char| c.is_ascii_digit())) {
        source.negate = true;
        text = inner;
    }
    if let Some(inner) = text.strip_prefix("neg(").and_then(|rest| rest.strip_suffix(')')) {
        source.negate = true;
        text = inner;
    }
    let bars = text.strip_prefix('|').and_then(|rest| rest.strip_suffix('|'));
    if let Some(inner) = bars.or_else(|| text.strip_prefix("abs(").and_then(|rest| rest.strip_suffix(')'))) {
        source.absolute = true;
        text = inner;
    }
    source.operand = parse_operand(text)?;
    Ok(source)
}

fn parse_operand(text: &str) -> Result<Operand, String> {
    let unknown = || format!("operand {text} is not known here");
    let scalar = match text {
        "vcc" | "vcc_lo" => Some(VCC),
        "vcc_hi" => Some(VCC + 1),
        "m0" => Some(M0),
        "exec" | "exec_lo" => Some(EXEC),
        "exec_hi" => Some(EXEC + 1),
        "flat_scratch" | "flat_scratch_lo" => Some(102),
        "flat_scratch_hi" => Some(103),
        _ => None,
    };
    if let Some(number) = scalar {
        return Ok(Operand::Scalar(number));
    }
    match text {
        "null" | "off" => return Ok(Operand::Null),
        "scc" | "src_scc" => return Ok(Operand::Scc),
        _ => {}
    }
    for (prefix, first) in [("ttmp", u16::from(TTMP)), ("v", 0), ("s", 0), ("a", ACCUMULATORS)] {
        let Some(rest) = text.strip_prefix(prefix) else { continue };
        let digits: String = rest.trim_start_matches('[').chars().take_while(char::is_ascii_digit).collect();
        let number: u16 = digits.parse().map_err(|_| unknown())?;
        return match prefix {
            "v" | "a" => Ok(Operand::Vector(first + number)),
            _ if number < 106 => Ok(Operand::Scalar((first + number) as u8)),
            _ => Err(unknown()),
        };
    }
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    if let Some(hex) = digits.strip_prefix("0x") {
        return i64::from_str_radix(hex, 16).map(|number| Operand::Integer(sign * number)).map_err(|_| unknown());
    }
    if let Ok(number) = text.parse::<i64>() {
        return Ok(Operand::Integer(number));
    }
    text.parse::<f64>().map(Operand::Float).map_err(|_| unknown())
}

/// `[1,0,1]`: bit 0 comes first.
fn bits(text: &str) -> u8 {
    let digits = text.chars().filter(char::is_ascii_digit);
    digits.enumerate().fold(0, |bits, (at, digit)| bits | u8::from(digit == '1') << at)
}

fn lanes<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let digits: Vec<u8> = text.chars().filter_map(|digit| digit.to_digit(8)).map(|digit| digit as u8).collect();
    digits.try_into().map_err(|_| format!("{text} does not name {N} lanes"))
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u32::from_str_radix(hex, 16));
    parsed.map_err(|_| format!("{text} is no number"))
}

/// The pattern of ds_swizzle_b32 from the words it is printed as: `swizzle(SWAP,16)`.
fn swizzle(text: &str) -> Result<u32, String> {
    let unknown = || format!("{text} is not known here");
    let inner = text.strip_prefix("swizzle(").and_then(|rest| rest.strip_suffix(')')).ok_or_else(unknown)?;
    let (kind, rest) = inner.split_once(',').ok_or_else(unknown)?;
    if kind == "BITMASK_PERM" {
        // A letter for each bit of the lane, the highest first: 0, 1, p(reserve), i(nvert).
        let letters = rest.trim_matches('"').chars().rev().enumerate();
        return Ok(letters.fold(0, |pattern, (bit, letter)| {
            let [and, or, xor] = match letter {
                '0' => [0, 0, 0],
                '1' => [0, 1, 0],
                'p' => [1, 0, 0],
                _ => [1, 0, 1],
            };
            pattern | and << bit | or << (5 + bit) | xor << (10 + bit)
        }));
    }
    let numbers = rest.split(',').map(number).collect::<Result<Vec<_>, _>>()?;
    match (kind, &numbers[..]) {
        ("SWAP", [by]) => Ok(0x1f | by << 10),
        ("REVERSE", [size]) => Ok(0x1f | (size - 1) << 10),
        ("BROADCAST", [size, lane]) => Ok((32 - size) | lane << 5),
        ("QUAD_PERM", [a, b, c, d]) => Ok(0x8000 | a | b << 2 | c << 4 | d << 6),
        _ => Err(unknown()),
    }
}

impl Modifiers {
    fn read(&mut self, word: &str) -> Result<(), String> {
        let (key, value) = word.split_once(':').unwrap_or((word, ""));
        let part = || -> Result<Part, String> {
            match value {
                "DWORD" => Ok(WHOLE),
                "BYTE_0" | "BYTE_1" | "BYTE_2" | "BYTE_3" => Ok((8 * number(&value[5..])?, 8)),
                "WORD_0" | "WORD_1" => Ok((16 * number(&value[5..])?, 16)),
                _ => Err(format!("modifier {word} is not known here")),
            }
        };
        match key {
            "offset" if value.starts_with("swizzle(") => self.offset = swizzle(value)?.into(),
            "offset" => {
                let (sign, digits) = value.strip_prefix('-').map_or((1, value), |rest| (-1, rest));
                self.offset = sign * i64::from(number(digits)?);
            }
            "offset0" => self.offsets[0] = number(value)?,
            "offset1" => self.offsets[1] = number(value)?,
            "offen" => self.offen = true,
            "op_sel" => self.op_sel = bits(value),
            "op_sel_hi" => self.op_sel_hi = Some(bits(value)),
            "neg_lo" => self.neg_lo = bits(value),
            "neg_hi" => self.neg_hi = bits(value),
            "clamp" => self.clamp = true,
            "mul" => self.scale = number(value)? as f32,
            "div" => self.scale = 1.0 / number(value)? as f32,
            "dst_sel" => self.dst_sel = part()?,
            "src0_sel" => self.src_sel[0] = part()?,
            "src1_sel" => self.src_sel[1] = part()?,
            "dst_unused" if value == "UNUSED_PAD" => {}
            "dst_unused" if value == "UNUSED_PRESERVE" => self.preserve = true,
            "quad_perm" => self.dpp = Some(Move::Quad(lanes(value)?)),
            "dpp8" => self.dpp = Some(Move::Eight(lanes(value)?)),
            "row_shr" => self.dpp = Some(Move::ShiftRight(number(value)?)),
            "row_shl" => self.dpp = Some(Move::ShiftLeft(number(value)?)),
            "row_ror" => self.dpp = Some(Move::RotateRight(number(value)?)),
            "row_mirror" => self.dpp = Some(Move::Mirror),
            "row_half_mirror" => self.dpp = Some(Move::HalfMirror),
            "row_share" | "row_newbcast" => self.dpp = Some(Move::Share(number(value)?)),
            "row_xmask" => self.dpp = Some(Move::Xor(number(value)?)),
            "row_bcast" => self.dpp = Some(Move::Broadcast(number(value)?)),
            "row_mask" => self.row_mask = number(value)? as u8,
            "bank_mask" => self.bank_mask = number(value)? as u8,
            // Zero is how gfx9 writes that it is set.
            "bound_ctrl" => self.bound_ctrl = true,
            "sc0" | "glc" => self.returns = true,
            "th" if value == "TH_ATOMIC_RETURN" => self.returns = true,
            // Where a line of a cache is kept changes no value.
            "sc1" | "nt" | "slc" | "dlc" | "scope" | "th" => {}
            _ => return Err(format!("modifier {word} is not known here")),
        }
        Ok(())
    }
}
