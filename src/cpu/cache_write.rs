//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn run<T: Element>(op: CacheWrite<'_, CpuBackend, T>, _isa: Isa, faults: &FaultWord) {
    scalar::cache_write(op, faults)
}
