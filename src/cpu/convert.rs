//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn quantize<T: Element>(op: Quantize<'_, CpuBackend, T>, _isa: Isa) {
    scalar::quantize(op)
}

pub(super) fn dequantize<T: Element>(op: Dequantize<'_, CpuBackend, T>, _isa: Isa) {
    scalar::dequantize(op)
}
