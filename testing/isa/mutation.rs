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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instruction::parse_line;

    #[test]
    fn the_one_named_is_changed_and_no_other() {
        let line = |text: &str, at: u32| parse_line(&format!("\t{text} // {at:012X}: BF8A0000")).unwrap();
        let program = || vec![line("s_barrier", 0), line("v_add_u32_e32 v1, 3, v2", 4), line("s_barrier", 8)];
        let texts = |text: &str, kernel: &str| -> Vec<String> {
            let mut lines = program();
            Mutation::parse(text).unwrap().apply(kernel, &mut lines);
            lines.into_iter().map(|line| line.unwrap().text).collect()
        };
        let add = "v_add_u32_e32 v1, 3, v2";
        assert_eq!(texts("gather | s_barrier | = s_nop 0 | 1", "a_gather_b"), ["s_barrier", add, "s_nop 0"]);
        assert_eq!(texts("gather | s_barrier | = s_nop 0 | *", "a_gather_b"), ["s_nop 0", add, "s_nop 0"]);
        assert_eq!(texts("gather | v1, 3 | v1, 4 | 0", "gather")[1], "v_add_u32_e32 v1, 4, v2");
        assert_eq!(texts("gather | s_barrier | = s_nop 0 | *", "scatter"), ["s_barrier", add, "s_barrier"]);
        assert!(Mutation::parse("gather | s_barrier | 1").is_none());
    }
}
