//! What the example programs share: `device.rs` chooses the backend, `program.rs` is the outermost
//! layer (errors as one line, exit codes).
//!
//! A program includes it with `#[path = "../common/mod.rs"]`.

pub mod device;
pub mod program;
