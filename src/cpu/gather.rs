//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn run<T: Element>(op: Gather<'_, CpuBackend, T>, _isa: Isa, faults: &FaultWord) {
    scalar::gather(op, faults)
}

pub(super) fn run_bytes(op: GatherBytes<'_, CpuBackend>, faults: &FaultWord) {
    scalar::gather_bytes(op, faults)
}
