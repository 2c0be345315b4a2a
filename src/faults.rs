//! What a kernel found wrong in data that only it could see.
//!
//! Slot mappings, block tables and sequence lengths may live on a device, where the host cannot
//! read them before a launch. Kernels therefore check every id against the cache they were given,
//! skip what lies outside, and set a bit in a *sticky* fault word of the backend. Polling it is
//! the caller's choice; memory safety does not depend on it.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// A set of faults.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Faults(u32);

impl Faults {
    /// Nothing went wrong.
    pub const NONE: Faults = Faults(0);
    /// `cache_write` met a slot at or past the end of the cache; the token was skipped.
    pub const SLOT_OUT_OF_RANGE: Faults = Faults(1);
    /// A block table named a block outside the cache; its tokens were skipped.
    pub const BLOCK_OUT_OF_RANGE: Faults = Faults(1 << 1);
    /// A sequence length was negative, or longer than its row of the block table can hold; the
    /// length was clamped (`gather`: the rows outside are zero).
    pub const SEQ_LEN_OUT_OF_RANGE: Faults = Faults(1 << 2);
    /// Query starts (of `gather`: `cu_seq_lens`) decreased, pointed past the rows, or were more than
    /// `max_query_len` apart; the sequence was skipped.
    pub const QUERY_START_OUT_OF_RANGE: Faults = Faults(1 << 3);

    /// A workspace said to hold the plan of a call (`plan_is_ready`) held something else; rows of the output were left
    /// alone. Not every such workspace is found out.
    pub const NOT_THE_PLAN: Faults = Faults(1 << 4);

    const NAMES: [(Faults, &'static str); 5] = [
        (Faults::SLOT_OUT_OF_RANGE, "slot out of range"),
        (Faults::BLOCK_OUT_OF_RANGE, "block out of range"),
        (Faults::SEQ_LEN_OUT_OF_RANGE, "sequence length out of range"),
        (Faults::QUERY_START_OUT_OF_RANGE, "query start out of range"),
        (Faults::NOT_THE_PLAN, "not the plan of this call"),
    ];

    /// Whether nothing went wrong.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every fault of `other` is set here.
    pub const fn contains(self, other: Faults) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets.
    pub const fn union(self, other: Faults) -> Faults {
        Faults(self.0 | other.0)
    }

    /// The raw word, as device code sets it.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// From a raw word; unknown bits are kept.
    pub const fn from_bits(bits: u32) -> Faults {
        Faults(bits)
    }
}

impl std::ops::BitOr for Faults {
    type Output = Faults;

    fn bitor(self, other: Faults) -> Faults {
        self.union(other)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faults({self})")
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let names: Vec<_> =
            Self::NAMES.iter().filter(|(fault, _)| self.contains(*fault)).map(|(_, name)| *name).collect();
        f.write_str(&names.join(", "))
    }
}

/// The sticky word itself, shared by the threads of one backend.
#[derive(Debug, Default)]
pub struct FaultWord(AtomicU32);

impl FaultWord {
    /// Sets faults; they stay set until taken.
    pub fn set(&self, faults: Faults) {
        if !faults.is_empty() {
            self.0.fetch_or(faults.0, Ordering::Relaxed);
        }
    }

    /// Returns the faults set since the last call, and clears them.
    pub fn take(&self) -> Faults {
        Faults(self.0.swap(0, Ordering::Relaxed))
    }
}
