//! The public functions of a GPU's module, declared and documented once for all vendors: each calls its namesake in
//! [`super::gpu`] with the vendor's [`Library`](super::gpu::Library).

/// Declares the public functions of a vendor's module over its [`Library`].
macro_rules! entry_points {
    ($library:ty) => {
        /// Quantizes keys and values and scatters them to their slots. If tokens name one slot, any of them may
        /// win, of each row another.
        ///
        /// # Errors
        /// [`CacheWrite::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn cache_write<T: Element>(op: CacheWrite<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::cache_write::<$library, T>(op, launch) }
        }

        /// Copies blocks of all layers onto others, in one launch.
        ///
        /// # Errors
        /// [`Error::LengthMismatch`] for half a pair; [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self); `memories` describe live device memory of `num_blocks` blocks
        /// each, aligned to 4 bytes where they hold scales, that nothing else uses until the copies are done.
        pub unsafe fn copy_blocks(plan: CopyPlan, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::copy_blocks::<$library>(plan, launch) }
        }

        /// Moves blocks between a pool in device memory and one in host memory, either way, or between two
        /// devices' pools. Returns at once: host memory must stay as it is until the stream has done the copies.
        /// Copies from and to pageable memory are slower and may wait.
        ///
        /// # Errors
        /// [`SwapBlocks::validate`]; [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self), for buffers in either memory; the pools share no block.
        pub unsafe fn swap_blocks(op: SwapBlocks<'_, '_, Pointers, Pointers>, stream: *mut c_void) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::swap_blocks::<$library>(op, stream) }
        }

        /// Bytes of workspace [`paged_attention`] needs for at most `num_tokens` query rows of `num_heads` heads
        /// in `num_seqs` sequences, on the device of the current context.
        ///
        /// # Errors
        /// [`CacheShape::validate`]; [`Error::Unsupported`] for more heads than an `i32` counts;
        /// [`Error::NoDevice`], [`Error::Device`], [`Error::NotCompiled`].
        pub fn attention_workspace_bytes(
            shape: &CacheShape,
            activations: DType,
            num_heads: usize,
            num_tokens: usize,
            num_seqs: usize,
        ) -> Result<usize> {
            $crate::raw::gpu::attention_workspace_bytes::<$library>(shape, activations, num_heads, num_tokens, num_seqs)
        }

        /// Attends over the cache. The workspace is aligned to 256 bytes, as every allocation of the driver is.
        ///
        /// # Errors
        /// [`PagedAttention::validate`]; [`Error::BufferTooSmall`] for the workspace;
        /// [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn paged_attention<T: Element>(
            op: PagedAttention<'_, Pointers, T>,
            kernel: AttentionKernel,
            launch: Launch,
        ) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::paged_attention::<$library, T>(op, kernel, launch) }
        }

        /// Merges two partial outputs by LSE.
        ///
        /// # Errors
        /// [`MergeStates::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self); the output may be `a` or `b` itself.
        pub unsafe fn merge_states<T: Element>(op: MergeStates<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::merge_states::<$library, T>(op, launch) }
        }

        /// Paged to dense, dequantized.
        ///
        /// # Errors
        /// [`Gather::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn gather<T: Element>(op: Gather<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::gather::<$library, T>(op, launch) }
        }

        /// Paged to dense, raw codes.
        ///
        /// # Errors
        /// [`GatherBytes::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self); `key` and `value` are aligned as their formats' elements are.
        pub unsafe fn gather_bytes(op: GatherBytes<'_, Pointers>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::gather_bytes::<$library>(op, launch) }
        }

        /// Updates running maxima of |x|.
        ///
        /// # Errors
        /// [`Absmax::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn absmax<T: Element>(op: Absmax<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::absmax::<$library, T>(op, launch) }
        }

        /// Turns running maxima into scales.
        ///
        /// # Errors
        /// [`UpdateScales::validate`]; [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn update_scales(op: UpdateScales<'_, Pointers>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::update_scales::<$library>(op, launch) }
        }

        /// Dense quantization.
        ///
        /// # Errors
        /// [`Quantize::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self); `codes` are aligned as the format's elements are.
        pub unsafe fn quantize<T: Element>(op: Quantize<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::quantize::<$library, T>(op, launch) }
        }

        /// Dense dequantization.
        ///
        /// # Errors
        /// [`Dequantize::validate`]; [`Error::NoKernel`], [`Error::Device`], [`Error::NotCompiled`].
        ///
        /// # Safety
        /// The contract of [this module](self); `codes` are aligned as the format's elements are.
        pub unsafe fn dequantize<T: Element>(op: Dequantize<'_, Pointers, T>, launch: Launch) -> Result<()> {
            // SAFETY: the caller's.
            unsafe { $crate::raw::gpu::dequantize::<$library, T>(op, launch) }
        }
    };
}
pub(super) use entry_points;
