//! The local data share of a block. It starts undefined (and as NaN). Accesses are checked for bounds, for alignment, and
//! for races: between two barriers no wave may read or write what another wrote, nor write what another read.

use crate::wave::Step;

pub struct Shared {
    bytes: Vec<u8>,
    undefined: Vec<bool>,
    /// Of each byte: who wrote and read it last, and between which barriers.
    written: Vec<Mark>,
    read: Vec<Mark>,
    /// Barriers so far.
    epoch: u32,
}

#[derive(Clone, Copy, Default)]
struct Mark {
    epoch: u32,
    wave: u32,
}
/// More waves than one.
const SEVERAL: u32 = u32::MAX;

impl Shared {
    pub fn new(bytes: usize) -> Self {
        Shared {
            bytes: vec![0xff; bytes],
            undefined: vec![true; bytes],
            written: vec![Mark::default(); bytes],
            read: vec![Mark::default(); bytes],
            epoch: 1,
        }
    }

    pub fn pass_barrier(&mut self) {
        self.epoch += 1;
    }

    fn range(&self, address: u64, bytes: usize, alignment: usize) -> Result<std::ops::Range<usize>, String> {
        if address + bytes as u64 > self.bytes.len() as u64 {
            return Err(format!("shared memory at {address}, {bytes} bytes: the block has {}", self.bytes.len()));
        }
        if !address.is_multiple_of(alignment as u64) {
            return Err(format!("shared memory at {address}, which is no multiple of {alignment}"));
        }
        Ok(address as usize..address as usize + bytes)
    }

    /// Reads; returns whether any byte is undefined.
    pub fn load(&mut self, wave: usize, address: u64, out: &mut [u8], alignment: usize) -> Result<bool, String> {
        let range = self.range(address, out.len(), alignment)?;
        out.copy_from_slice(&self.bytes[range.clone()]);
        let wave = wave as u32;
        for at in range.clone() {
            let mark = self.written[at];
            if mark.epoch == self.epoch && mark.wave != wave {
                return Err(format!(
                    "race: wave {wave} reads byte {at} of shared memory, which wave {} wrote since the last barrier",
                    mark.wave
                ));
            }
            let read = &mut self.read[at];
            let several = read.epoch == self.epoch && read.wave != wave;
            *read = Mark { epoch: self.epoch, wave: if several { SEVERAL } else { wave } };
        }
        Ok(self.undefined[range].contains(&true))
    }

    pub fn store(&mut self, wave: usize, address: u64, bytes: &[u8], undefined: bool, alignment: usize) -> Step {
        let range = self.range(address, bytes.len(), alignment)?;
        self.bytes[range.clone()].copy_from_slice(bytes);
        self.undefined[range.clone()].fill(undefined);
        let wave = wave as u32;
        for at in range {
            for (mark, did) in [(self.written[at], "wrote"), (self.read[at], "read")] {
                if mark.epoch == self.epoch && mark.wave != wave {
                    let other = if mark.wave == SEVERAL { "another".to_owned() } else { format!("wave {}", mark.wave) };
                    return Err(format!(
                        "race: wave {wave} writes byte {at} of shared memory, which {other} {did} since the last barrier"
                    ));
                }
            }
            self.written[at] = Mark { epoch: self.epoch, wave };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_barrier_is_a_race_in_every_order() {
        let mut shared = Shared::new(64);
        let mut word = [0; 4];
        assert!(shared.load(0, 0, &mut word, 4).unwrap(), "nothing is defined yet");
        shared.store(0, 0, &[1, 2, 3, 4], false, 4).unwrap();
        assert!(!shared.load(0, 0, &mut word, 4).unwrap());
        assert!(shared.load(1, 0, &mut word, 4).is_err());
        shared.pass_barrier();
        shared.load(1, 0, &mut word, 4).unwrap();
        assert_eq!(word, [1, 2, 3, 4]);
        assert!(shared.store(0, 0, &[0; 4], false, 4).is_err(), "wave 1 has read it");
        shared.pass_barrier();
        shared.store(0, 0, &[0; 4], false, 4).unwrap();
        assert!(shared.store(1, 3, &[0], false, 1).is_err());
        assert!(shared.load(0, 62, &mut word, 2).is_err() && shared.load(0, 2, &mut word, 4).is_err());
    }
}
