//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn run<T: Element>(op: MergeStates<'_, CpuBackend, T>) {
    scalar::merge_states(op)
}
