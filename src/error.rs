//! The one error type of the crate.
//!
//! Every variant is a sentence with its numbers in fields, so that a caller can match on the
//! cause and a log line is enough to act on. Nothing in this crate exits, aborts or panics on
//! user input.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A KV cache dtype string that is none of the known ones.
    #[error(
        "unknown KV cache dtype {given:?}; known: auto, fp8 (= fp8_e4m3), fp8_e4m3, fp8_e5m2, fp8_e4m3_fnuz, f32, f16, bf16"
    )]
    UnknownKvCacheDtype {
        /// What was given.
        given: String,
    },

    /// A size that must not be zero is.
    #[error("{what} must not be zero")]
    Zero {
        /// The name of the size.
        what: &'static str,
    },

    /// A size outside the range the library supports.
    #[error("{what} is {value}; supported: {supported}")]
    Unsupported {
        /// The name of the size or option.
        what: &'static str,
        /// The value given.
        value: usize,
        /// What is supported, in words.
        supported: &'static str,
    },

    /// A size computed from the arguments does not fit in `usize`.
    #[error("{what} overflows the address space")]
    Overflow {
        /// The name of the size.
        what: &'static str,
    },

    /// A buffer is shorter than its shape and strides need.
    #[error("{what} needs {needed} elements, its buffer has {got}")]
    BufferTooSmall {
        /// The buffer's name.
        what: &'static str,
        /// Elements needed.
        needed: usize,
        /// Elements there.
        got: usize,
    },

    /// A device buffer that starts where its elements may not: a part of another one, cut in between.
    #[error("{what} must be aligned to {align} bytes")]
    Misaligned {
        /// The buffer's name.
        what: &'static str,
        /// The alignment needed, in bytes.
        align: usize,
    },

    /// Two lengths that must agree do not.
    #[error("{what} must be {expected}, it is {got}")]
    LengthMismatch {
        /// What is compared.
        what: &'static str,
        /// The length expected.
        expected: usize,
        /// The length given.
        got: usize,
    },

    /// A stride so small that rows would overlap.
    #[error("stride {what} is {stride}; rows overlap below {min}")]
    StrideTooSmall {
        /// The stride's name.
        what: &'static str,
        /// The stride given.
        stride: usize,
        /// The smallest stride allowed.
        min: usize,
    },

    /// Query heads are not a multiple of KV heads.
    #[error("{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")]
    HeadsNotDivisible {
        /// Query heads.
        num_heads: usize,
        /// KV heads.
        num_kv_heads: usize,
    },

    /// A number that must be finite (and, where stated, positive) is not.
    #[error("{what} is {value}; it must be {expected}")]
    InvalidNumber {
        /// The parameter's name.
        what: &'static str,
        /// The value given.
        value: f64,
        /// What is expected, in words.
        expected: &'static str,
    },

    /// A quantization scale that is not finite and greater than zero.
    #[error("{what}: scale {value} at index {index} must be finite and greater than zero")]
    InvalidScale {
        /// Which tensor (and layer) the scale belongs to.
        what: String,
        /// The index in the scale tensor.
        index: usize,
        /// The value found.
        value: f32,
    },

    /// A model whose heads cannot be dealt out to tensor-parallel ranks like this.
    #[error("rank {rank} of {world} has no part of {num_heads} query heads and {num_kv_heads} KV heads: {reason}")]
    Shard {
        /// The rank asked for.
        rank: usize,
        /// How many ranks there are.
        world: usize,
        /// Query heads.
        num_heads: usize,
        /// KV heads.
        num_kv_heads: usize,
        /// Why not.
        reason: &'static str,
    },

    /// A checkpoint or scales file that has scales for a part of its layers.
    #[error(
        "{}: layer {layer} has no {what} scale, {missing} such scales are missing in all, but others are there; \
         1.0 in their place must be asked for", path.display()
    )]
    MissingScales {
        /// The file, or the index of the files.
        path: PathBuf,
        /// The first layer concerned.
        layer: usize,
        /// "K" or "V".
        what: &'static str,
        /// How many scales of K and V are missing in all layers.
        missing: usize,
    },

    /// Dynamic scales are missing where the cache needs them, or given where it has none.
    #[error("{what}: {reason}")]
    DynamicScales {
        /// Which tensor, K or V.
        what: &'static str,
        /// What is wrong.
        reason: &'static str,
    },

    /// Two caches that must have the same geometry do not.
    #[error("{what} differ: {reason}")]
    GeometryMismatch {
        /// What is compared.
        what: &'static str,
        /// How they differ.
        reason: String,
    },

    /// A host-side block id outside the cache.
    #[error("{what}: block {block} is outside the cache of {num_blocks} blocks")]
    BlockOutOfRange {
        /// Where the id stands.
        what: &'static str,
        /// The id.
        block: u64,
        /// Blocks in the cache.
        num_blocks: usize,
    },

    /// A layer outside the cache.
    #[error("layer {layer} is outside the cache of {num_layers} layers")]
    LayerOutOfRange {
        /// The layer.
        layer: usize,
        /// Layers in the cache.
        num_layers: usize,
    },

    /// An error in what belongs to one layer.
    #[error("layer {layer}: {source}")]
    InLayer {
        /// The layer.
        layer: usize,
        /// What is wrong there.
        source: Box<Error>,
    },

    /// In a list of copies a block is written twice, or is both read and written.
    #[error("{what}: block {block} is {conflict} in one call; copies run in no order")]
    OverlappingPairs {
        /// The operation.
        what: &'static str,
        /// The block.
        block: u32,
        /// "written twice" or "both source and destination".
        conflict: &'static str,
    },

    /// The pool has too few free blocks.
    #[error("{requested} blocks requested, {free} are free")]
    NoFreeBlocks {
        /// Blocks asked for.
        requested: usize,
        /// Blocks free.
        free: usize,
    },

    /// A block was released more often than it was acquired.
    #[error("block {block} is not allocated (freed twice, or never allocated)")]
    NotAllocated {
        /// The block.
        block: u32,
    },

    /// A budget too small for even one block.
    #[error("a budget of {budget_bytes} bytes holds no block of {block_bytes} bytes")]
    BudgetTooSmall {
        /// The budget.
        budget_bytes: usize,
        /// Bytes one block needs.
        block_bytes: usize,
    },

    /// Memory could not be allocated.
    #[error("could not allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },

    /// There is no device to run on: no driver, no GPU, or a driver too old for this build.
    #[error("no {backend} device: {reason}")]
    NoDevice {
        /// The backend's name.
        backend: &'static str,
        /// What is missing, in words.
        reason: String,
    },

    /// This build has the backend's interface but not its kernels.
    #[error("{call}: this build holds no {backend} kernels (it was built with QUANTKV_STUB or DOCS_RS set)")]
    NotCompiled {
        /// The backend's name.
        backend: &'static str,
        /// What was called.
        call: &'static str,
    },

    /// The arguments are possible, but no kernel takes them on this device.
    #[error("{call}: no {backend} kernel for these arguments on this device: {message}")]
    NoKernel {
        /// The backend's name.
        backend: &'static str,
        /// What was called.
        call: &'static str,
        /// The library's own words.
        message: String,
    },

    /// The device, its driver or its runtime refused a call. After some errors (an invalid access by any
    /// kernel of the process, say) the device refuses everything that follows.
    #[error("{call}: {backend} error {code}: {message}")]
    Device {
        /// The backend's name.
        backend: &'static str,
        /// What was called.
        call: &'static str,
        /// The driver's or the C library's status.
        code: i64,
        /// What it stands for.
        message: String,
    },

    /// A device buffer that was made by another stream's backend: nothing would order the two.
    #[error("{what} belongs to another stream than this backend's")]
    OtherStream {
        /// The buffer's name.
        what: &'static str,
    },

    /// A call that reads or writes host memory, while the stream records a graph: the graph would keep the
    /// host pointer.
    #[error("{call} reads or writes host memory and cannot be captured in a graph")]
    InCapture {
        /// What was called.
        call: &'static str,
    },

    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// A file was read but does not say what it must.
    #[error("{}: {reason}", path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with field, tensor or line.
        reason: String,
    },

    /// A model the reference decoder does not implement.
    #[error("{}: {field} {value:?} is not supported; supported: {supported}", path.display())]
    UnsupportedModel {
        /// The file that names it.
        path: PathBuf,
        /// The field of that file.
        field: String,
        /// The value found.
        value: String,
        /// What is supported, in words.
        supported: String,
    },

    /// A request to the reference decoder that cannot be served.
    #[error("{0}")]
    InvalidRequest(String),
}

impl Error {
    /// The same error, saying which layer it is about.
    pub(crate) fn in_layer(self, layer: usize) -> Error {
        Error::InLayer { layer, source: Box::new(self) }
    }
}
