//! A bug planted in the code that is run: `QUANTKV_ISA_MUTATION="kernel | old | new | which"`.
//!
//! In kernels whose name holds the first word, of the instructions whose text holds the second the one with that number
//! (from 0 on, or `*` for all) gets the third in its place, or becomes it if that begins with `=`: `s_barrier` becomes
//! `= s_nop 0`, a bound another one. A test must then fail: testing/isa/mutations.txt.

use std::env;

use crate::instruction::Instruction;
use crate::program::Line;

pub struct Mutation {
    kernel: String,
    old: String,
    new: String,
    /// All, if there is none.
    which: Option<usize>,
}

impl Mutation {
    pub fn from_environment() -> Option<Self> {
        Self::parse(&env::var("QUANTKV_ISA_MUTATION").ok()?)
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split('|').map(|word| word.trim().to_owned());
        let mut next = || words.next();
        let (kernel, old, new, which) = (next()?, next()?, next()?, next()?);
        let which = if which == "*" { None } else { Some(which.parse().ok()?) };
        Some(Mutation { kernel, old, new, which })
    }

    pub fn apply(&self, kernel: &str, lines: &mut [Line]) {
        if !kernel.contains(&self.kernel) {
            return;
        }
        let holds = |line: &&mut Line| line.as_ref().is_ok_and(|instruction| instruction.text.contains(&self.old));
        for (number, line) in lines.iter_mut().filter(holds).enumerate() {
            if self.which.is_some_and(|which| which != number) {
                continue;
            }
            if let Ok(instruction) = line {
                let text = match self.new.strip_prefix('=') {
                    Some(whole) => whole.trim().to_owned(),
                    None => instruction.text.replacen(&self.old, &self.new, 1),
                };
                eprintln!("isa: planted in {kernel}: `{}` at {:#x} is `{text}`", instruction.text, instruction.address);
                *line = Instruction::changed(instruction, &text);
            }
        }
    }
}
