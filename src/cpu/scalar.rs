//! The specification: every operation as straight loops.
#![allow(unused_variables)]
use super::*;

pub(super) fn cache_write<T: Element>(op: CacheWrite<'_, CpuBackend, T>, faults: &FaultWord) {
    unimplemented!()
}
pub(super) fn paged_attention<T: Element>(op: PagedAttention<'_, CpuBackend, T>, faults: &FaultWord) {
    unimplemented!()
}
pub(super) fn merge_states<T: Element>(op: MergeStates<'_, CpuBackend, T>) {
    unimplemented!()
}
pub(super) fn gather<T: Element>(op: Gather<'_, CpuBackend, T>, faults: &FaultWord) {
    unimplemented!()
}
pub(super) fn gather_bytes(op: GatherBytes<'_, CpuBackend>, faults: &FaultWord) {
    unimplemented!()
}
pub(super) fn absmax<T: Element>(op: Absmax<'_, CpuBackend, T>) {
    unimplemented!()
}
pub(super) fn update_scales(op: UpdateScales<'_, CpuBackend>) {
    unimplemented!()
}
pub(super) fn quantize<T: Element>(op: Quantize<'_, CpuBackend, T>) {
    unimplemented!()
}
pub(super) fn dequantize<T: Element>(op: Dequantize<'_, CpuBackend, T>) {
    unimplemented!()
}
