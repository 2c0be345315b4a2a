//! Fast form; being written.
#![allow(unused_imports)]
use super::*;

pub(super) fn copy_blocks(_op: CopyBlocks<'_, '_, CpuBackend>) {
    unimplemented!()
}

pub(super) fn swap_blocks<S, D>(_op: SwapBlocks<'_, '_, S, D>)
where
    S: for<'a> Memory<Ref<'a, u8> = &'a [u8], Ref<'a, f32> = &'a [f32]>,
    D: for<'a> Memory<Mut<'a, u8> = &'a mut [u8], Mut<'a, f32> = &'a mut [f32]>,
{
    unimplemented!()
}
