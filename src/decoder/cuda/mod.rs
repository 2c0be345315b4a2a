//! The decoder on CUDA: [`Compute`](super::Compute) for [`CudaBackend`], with activations in f32, f16 or
//! bf16.
//!
//! ```text
//! ops        the small kernels of csrc/quantkv_decoder.h: checked lengths, then one call
//! products   linear layers by cuBLASLt, or by our own kernel where it is not there
//! weights    matrices on the device, streamed there through page-locked memory, or made there
//! graph      a decode step is recorded once for each batch size and replayed
//! ```
//!
//! # Products
//!
//! cuBLASLt is loaded at run time ([`Products`] chooses). It multiplies 16-bit weights with f32 sums, and f32
//! weights in f32 (not TF32). It picks its kernel by the shape of the product, so that the last bits of a
//! row may depend on how many rows there are; [`Products::Portable`] keeps the promise of
//! [`Compute`](super::Compute) that they do not. Weights stored in another type than the activations are
//! always multiplied by our own kernel, which converts on the way.

mod graph;
mod ops;
mod products;
mod weights;

use std::sync::{Arc, Mutex};

pub use graph::Recording;
pub use weights::CudaMatrix;

use crate::cuda::CudaBackend;

/// Who multiplies matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Products {
    /// cuBLASLt where its library is found, else the portable kernel.
    #[default]
    Auto,
    /// cuBLASLt; an error where its library is not found.
    CublasLt,
    /// This crate's own kernel: no library, no tensor cores; a row gives the same bits in every batch.
    Portable,
}

/// Switches of the decoder on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderOptions {
    /// Who multiplies matrices.
    pub products: Products,
    /// Whether decode steps are recorded as CUDA graphs and replayed.
    pub graphs: bool,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        DecoderOptions { products: Products::Auto, graphs: true }
    }
}

/// What the decoder keeps with a backend.
#[derive(Debug, Default)]
pub(crate) struct State {
    options: DecoderOptions,
    library: Mutex<products::Library>,
    staging: Mutex<Option<weights::Staging>>,
}

impl CudaBackend {
    /// The same stream, for decoders with these options. Models made with other handles keep theirs.
    pub fn with_decoder_options(&self, options: DecoderOptions) -> Self {
        let mut backend = self.clone();
        backend.decoder = Arc::new(State { options, ..State::default() });
        backend
    }

    /// Whether products are cuBLASLt's, or will be when the first one is computed.
    ///
    /// # Errors
    /// [`crate::Error::NoKernel`] if [`Products::CublasLt`] is asked for and the library is not found.
    pub fn uses_cublaslt(&self) -> crate::Result<bool> {
        products::is_used(self.decoder.options.products)
    }
}
