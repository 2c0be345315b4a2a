//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn run<T: Element>(op: Absmax<'_, CpuBackend, T>, _isa: Isa) {
    scalar::absmax(op)
}
