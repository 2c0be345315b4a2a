//! The CUDA backend, timed on the device by replayed graphs and held against what the device can do.
//!
//! ```text
//! cargo bench --features cuda --bench cuda -- [options] [words]
//!   --quick             a few shapes of each operation, under a minute
//!   --verify-only       small versions of all shapes, checked, not timed (runs in the emulator)
//!   --kernel NAME       attention kernel: auto (default), portable, tensor-core
//!   --replays N         replays a timing (default 30)
//!   --pool-mb N         caches take turns until they hold this much (default 200: several times the L2)
//!   --out DIR           where cuda.csv and cuda.svg go (default: $OUT, else target/bench-cuda)
//!   words               only shapes whose operation and name hold all of them
//! ```
//! "of limit" is the time of a plain read (attention) or a plain copy (the rest) of as many bytes,
//! measured in the same run, over the time of the operation: 1 is the most there is. Every shape is
//! checked before it is timed. Without a device it says so and succeeds.

#[cfg(not(quantkv_stub))]
mod attention;
#[cfg(not(quantkv_stub))]
mod cache_ops;
#[cfg(not(quantkv_stub))]
mod command;
#[cfg(not(quantkv_stub))]
mod device;
#[cfg(not(quantkv_stub))]
mod report;
#[cfg(not(quantkv_stub))]
mod shapes;

#[cfg(quantkv_stub)]
fn main() {
    println!("skipped: built without kernels (QUANTKV_STUB)");
}

#[cfg(not(quantkv_stub))]
fn main() {
    command::main();
}
