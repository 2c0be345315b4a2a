//! Where buffers live.
//!
//! The operations of [`crate::args`] are described once, for every backend. What differs is how a
//! backend addresses its buffers: the CPU by slices, CUDA by typed device views, the raw storey by
//! pointers. [`Memory`] names those two types, borrowed shared and borrowed exclusively, and the
//! one thing validation needs of them: their length.

use crate::format::Pod;

/// A borrowed buffer that knows its length.
pub trait BufferLen {
    /// Elements (not bytes) in the buffer.
    fn buffer_len(&self) -> usize;
}

impl<T> BufferLen for &[T] {
    #[inline(always)]
    fn buffer_len(&self) -> usize {
        self.len()
    }
}

impl<T> BufferLen for &mut [T] {
    #[inline(always)]
    fn buffer_len(&self) -> usize {
        self.len()
    }
}

/// A kind of memory, by its two borrowed buffer types.
///
/// An argument struct has one lifetime for all its buffers. Slices shorten theirs by themselves;
/// code generic over `Memory` asks for it with [`Memory::shorten`] and [`Memory::shorten_mut`],
/// both of which return what they are given.
pub trait Memory {
    /// A buffer borrowed for reading.
    type Ref<'a, T: Pod>: BufferLen + Copy + std::fmt::Debug;
    /// A buffer borrowed for writing.
    type Mut<'a, T: Pod>: BufferLen + std::fmt::Debug;

    /// The same buffer, borrowed for a shorter time.
    fn shorten<'short, 'long: 'short, T: Pod>(buffer: Self::Ref<'long, T>) -> Self::Ref<'short, T>;

    /// The same buffer, borrowed for a shorter time.
    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: Self::Mut<'long, T>) -> Self::Mut<'short, T>;
}

/// Host memory that a device reaches directly, for as long as this lives: page-locked, in CUDA's
/// words. See [`crate::Backend::page_lock`].
#[must_use = "dropping it unlocks the memory"]
pub struct PageLock(Option<Box<dyn FnOnce() + Send + Sync>>);

impl PageLock {
    /// For a backend that has nothing to lock.
    pub const fn none() -> Self {
        PageLock(None)
    }

    /// `unlock` is called once, when this is dropped.
    pub fn new(unlock: impl FnOnce() + Send + Sync + 'static) -> Self {
        PageLock(Some(Box::new(unlock)))
    }

    /// Whether there is anything locked.
    pub const fn is_some(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for PageLock {
    fn drop(&mut self) {
        if let Some(unlock) = self.0.take() {
            unlock();
        }
    }
}

impl std::fmt::Debug for PageLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_some() { "PageLock(locked)" } else { "PageLock(none)" })
    }
}

/// Ordinary memory of this process, addressed by slices: what the CPU backend computes in and what
/// `swap_blocks` moves device blocks to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl Memory for Host {
    type Ref<'a, T: Pod> = &'a [T];
    type Mut<'a, T: Pod> = &'a mut [T];

    fn shorten<'short, 'long: 'short, T: Pod>(buffer: &'long [T]) -> &'short [T] {
        buffer
    }

    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: &'long mut [T]) -> &'short mut [T] {
        buffer
    }
}
