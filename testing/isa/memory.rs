//! Device memory: the allocations of the runtime around the simulator, and the launch's arguments, which may only be read.
//!
//! Every access must lie in one allocation with all its bytes.

use std::cell::Cell;

use crate::wave::Step;

/// The allocation that holds an address: its first byte and the one after its last.
pub type FindAllocation = Box<dyn Fn(u64) -> Option<(u64, u64)>>;

pub struct DeviceMemory {
    find: FindAllocation,
    arguments: Vec<u8>,
    /// Where the last access lay: most accesses lie there too.
    last: Cell<(u64, u64)>,
}

impl DeviceMemory {
    pub fn new(find: FindAllocation, arguments: Vec<u8>) -> Self {
        DeviceMemory { find, arguments, last: Cell::new((0, 0)) }
    }

    pub fn arguments(&self) -> u64 {
        self.arguments.as_ptr() as u64
    }

    fn is_argument(&self, address: u64, bytes: usize) -> bool {
        let start = self.arguments();
        address >= start && address + bytes as u64 <= start + self.arguments.len() as u64
    }

    fn check(&self, address: u64, bytes: usize, what: &str) -> Step {
        let inside = |(start, end): (u64, u64)| address >= start && address < end && bytes as u64 <= end - address;
        if inside(self.last.get()) {
            return Ok(());
        }
        match (self.find)(address) {
            Some(range) if inside(range) => {
                self.last.set(range);
                Ok(())
            }
            Some((start, end)) => Err(format!(
                "{what} of {bytes} bytes at {address:#x}, which goes past the allocation [{start:#x}, {end:#x})"
            )),
            None => Err(format!("{what} of {bytes} bytes at {address:#x}, which is in no allocation")),
        }
    }

    pub fn read(&self, address: u64, out: &mut [u8]) -> Step {
        if !self.is_argument(address, out.len()) {
            self.check(address, out.len(), "a load")?;
        }
        // SAFETY: the bytes lie in an allocation of the runtime's, or in the arguments; the runtime keeps them for as
        // long as a launch goes on.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    pub fn write(&self, address: u64, bytes: &[u8]) -> Step {
        self.check(address, bytes.len(), "a store")?;
        // SAFETY: as above; the arguments are in no allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }

    /// A word that several waves change: read, changed, written.
    pub fn update(&self, address: u64, f: impl Fn(u32) -> u32) -> Result<u32, String> {
        if !address.is_multiple_of(4) {
            return Err(format!("an atomic at {address:#x}, which is no multiple of 4"));
        }
        let mut word = [0; 4];
        self.check(address, 4, "an atomic")?;
        self.read(address, &mut word)?;
        let old = u32::from_le_bytes(word);
        self.write(address, &f(old).to_le_bytes())?;
        Ok(old)
    }
}
