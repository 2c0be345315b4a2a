//! The CPU backend: the default, and the specification of all others.
//!
//! `scalar/` holds each operation as straight loops, written for reading. Beside it each operation
//! has a fast form (SIMD over channels, threads over blocks or heads) that gives the same bytes,
//! or for attention the same numbers within the tolerance `docs/numerics.md` derives.
//! [`CpuBackend::scalar`] runs the specification, [`CpuBackend::new`] the fastest form this
//! machine has.

mod absmax;
mod attention;
mod cache_write;
mod convert;
mod copy;
mod gather;
mod merge_states;
mod ragged;
mod rows;
mod scalar;
mod threads;

use std::alloc::Layout;

use crate::args::{
    Absmax, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, MergeStates, PagedAttention, Quantize, SwapBlocks,
    UpdateScales,
};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::faults::{FaultWord, Faults};
use crate::format::{Element, KvFormat, Pod};
use crate::isa::Isa;
use crate::layout::{CacheShape, checked_product};
use crate::memory::{Host, Memory};

/// A handle to the CPU: an instruction set and a fault word.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    faults: FaultWord,
}

impl CpuBackend {
    /// The fastest kernels this machine can run.
    pub fn new() -> Self {
        CpuBackend { isa: Isa::detect(), faults: FaultWord::default() }
    }

    /// The specification: scalar, single-threaded, slow.
    pub fn scalar() -> Self {
        CpuBackend { isa: Isa::Scalar, faults: FaultWord::default() }
    }

    /// Kernels of one instruction set, or `None` if this machine cannot run it.
    pub fn with_isa(isa: Isa) -> Option<Self> {
        isa.is_available().then(|| CpuBackend { isa, faults: FaultWord::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory for CpuBackend {
    type Ref<'a, T: Pod> = &'a [T];
    type Mut<'a, T: Pod> = &'a mut [T];

    fn shorten<'short, 'long: 'short, T: Pod>(buffer: &'long [T]) -> &'short [T] {
        buffer
    }

    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: &'long mut [T]) -> &'short mut [T] {
        buffer
    }
}

impl Backend for CpuBackend {
    type Buffer<T: Pod> = Vec<T>;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn zeros<T: Pod>(&self, what: &'static str, len: usize) -> Result<Vec<T>> {
        let bytes = checked_product(what, &[len, size_of::<T>()])?;
        if bytes == 0 {
            return Ok(vec![T::default(); len]);
        }
        // Zero pages come from the operating system untouched: a cache of many gigabytes is made at
        // once, and resident only as far as it is used. (`Vec::resize` would write all of it, and
        // `vec![]` aborts where there is no memory.)
        let layout = Layout::array::<T>(len).map_err(|_| Error::Overflow { what })?;
        // SAFETY: the layout has a size other than zero.
        let buffer = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<T>();
        if buffer.is_null() {
            return Err(Error::OutOfMemory { what, bytes });
        }
        advise_huge_pages(buffer.cast(), bytes);
        // SAFETY: allocated just now by the global allocator with the layout of `len` elements of T, a
        // `Pod`, for which zero bits are a value.
        Ok(unsafe { Vec::from_raw_parts(buffer, len, len) })
    }

    fn upload<T: Pod>(&self, src: &[T], dst: &mut Vec<T>) -> Result<()> {
        let got = dst.len();
        match dst.get_mut(..src.len()) {
            Some(dst) => dst.copy_from_slice(src),
            None => return Err(Error::BufferTooSmall { what: "upload", needed: src.len(), got }),
        }
        Ok(())
    }

    fn download<T: Pod>(&self, src: &Vec<T>, dst: &mut [T]) -> Result<()> {
        match src.get(..dst.len()) {
            Some(src) => dst.copy_from_slice(src),
            None => return Err(Error::BufferTooSmall { what: "download", needed: dst.len(), got: src.len() }),
        }
        Ok(())
    }

    fn view<'a, T: Pod>(&self, buffer: &'a Vec<T>) -> &'a [T] {
        buffer
    }

    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut Vec<T>) -> &'a mut [T] {
        buffer
    }

    fn cache_write<T: Element>(&self, op: CacheWrite<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::cache_write(op, &self.faults),
            isa => cache_write::run(op, isa, &self.faults),
        }
        Ok(())
    }

    fn copy_blocks(&self, op: CopyBlocks<'_, '_, Self>) -> Result<()> {
        op.validate()?;
        copy::copy_blocks(op);
        Ok(())
    }

    fn swap_out(&self, op: SwapBlocks<'_, '_, Self, Host>) -> Result<()> {
        op.validate()?;
        copy::swap_blocks(op);
        Ok(())
    }

    fn swap_in(&self, op: SwapBlocks<'_, '_, Host, Self>) -> Result<()> {
        op.validate()?;
        copy::swap_blocks(op);
        Ok(())
    }

    fn attention_workspace_len(&self, shape: &CacheShape, num_heads: usize, num_tokens: usize) -> usize {
        attention::workspace_len(shape, num_heads, num_tokens)
    }

    fn paged_attention<T: Element>(&self, op: PagedAttention<'_, Self, T>) -> Result<()> {
        op.validate()?;
        let needed = attention::workspace_len(&op.shape, op.num_heads, op.num_tokens);
        if op.workspace.len() < needed {
            return Err(Error::BufferTooSmall { what: "attention workspace", needed, got: op.workspace.len() });
        }
        match self.isa {
            Isa::Scalar => scalar::paged_attention(op, &self.faults),
            isa => attention::run(op, isa, &self.faults),
        }
        Ok(())
    }

    fn merge_states<T: Element>(&self, op: MergeStates<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::merge_states(op),
            isa => merge_states::run(op, isa),
        }
        Ok(())
    }

    fn gather<T: Element>(&self, op: Gather<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::gather(op, &self.faults),
            isa => gather::run(op, isa, &self.faults),
        }
        Ok(())
    }

    fn gather_bytes(&self, op: GatherBytes<'_, Self>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::gather_bytes(op, &self.faults),
            _ => gather::run_bytes(op, &self.faults),
        }
        Ok(())
    }

    fn absmax<T: Element>(&self, op: Absmax<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::absmax(op),
            isa => absmax::run(op, isa),
        }
        Ok(())
    }

    fn update_scales(&self, op: UpdateScales<'_, Self>) -> Result<()> {
        op.validate()?;
        scalar::update_scales(op);
        Ok(())
    }

    fn quantize<T: Element>(&self, op: Quantize<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::quantize(op),
            isa => convert::quantize(op, isa),
        }
        Ok(())
    }

    fn dequantize<T: Element>(&self, op: Dequantize<'_, Self, T>) -> Result<()> {
        op.validate()?;
        match self.isa {
            Isa::Scalar => scalar::dequantize(op),
            isa => convert::dequantize(op, isa),
        }
        Ok(())
    }

    fn faults(&self) -> Result<Faults> {
        Ok(self.faults.take())
    }
}

/// Asks for 2 MiB pages where a buffer is large: blocks lie in no order, and looking up the 4 KiB
/// pages of a block costs a fifth of reading it. Advice only; refusal changes nothing.
#[cfg(target_os = "linux")]
fn advise_huge_pages(buffer: *mut u8, bytes: usize) {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    const HUGE_PAGE: usize = 2 << 20;
    const MADV_HUGEPAGE: c_int = 14;
    if bytes >= 4 * HUGE_PAGE {
        let skipped = buffer.align_offset(HUGE_PAGE);
        let length = (bytes - skipped) & !(HUGE_PAGE - 1);
        // SAFETY: whole pages inside a buffer just allocated; the advice changes no contents.
        unsafe { madvise(buffer.wrapping_add(skipped).cast(), length, MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: *mut u8, _: usize) {}
