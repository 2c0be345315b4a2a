//! The independent truth the parity tests compare every backend with.
//!
//! Written from the documentation of `src/args`, `src/layout.rs` and the numerics contract, not
//! from any kernel: decode tables come from a fixture made by torch, encoding searches them,
//! addresses are the index formulas of the layouts written out, and sums are f64. Nothing here is
//! fast and nothing here calls the code under test for a number.
//!
//! | file | what it holds |
//! |---|---|
//! | `formats` | FP8 tables, nearest-even encoding, rounding to f16 and bf16 |
//! | `geometry` | one layer's cache as host bytes, and where each element lies |
//! | `rows` | cache_write, copies, gathers, convert, absmax: exact |
//! | `attention` | paged_attention and merge_states in f64, with derived tolerances |
//! | `run` | the same cases through any [`quantkv::Backend`] |
//! | `strategy` | random cases for proptest |
//!
//! Include it with `#[path = "../testing/oracle/mod.rs"] mod oracle;`.
#![allow(dead_code)]

pub mod attention;
#[path = "../fixtures.rs"]
pub mod fixtures;
pub mod formats;
pub mod geometry;
pub mod rows;
pub mod run;
pub mod strategy;

/// Runs `$body` with `$T` naming the element type of a run-time [`quantkv::DType`].
#[macro_export]
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            quantkv::DType::F32 => {
                type $T = f32;
                $body
            }
            quantkv::DType::F16 => {
                type $T = half::f16;
                $body
            }
            quantkv::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
