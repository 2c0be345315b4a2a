//! A small cache and the `refused!` macro, shared by the tests of hostile arguments.
#![allow(dead_code)] // each test file uses its part

use quantkv::args::{LayerMut, LayerRef, RowStrides};
use quantkv::scale::{ScaleRef, ScaleStrides};
use quantkv::{CacheShape, CacheSpec, CpuBackend, KvFormat};

/// Asserts the variant and that the message holds each of the texts.
macro_rules! refused {
    ($result:expr, $variant:pat, $($text:expr),+ $(,)?) => {
        let error = $result.expect_err("must be refused");
        let message = error.to_string();
        assert!(matches!(error, $variant), "{error:?}");
        $(assert!(message.contains(&$text.to_string()), "{:?} is not in: {message}", $text.to_string());)+
    };
}

/// 2 heads of 16 channels, blocks of 8, 4 blocks, E4M3 with per-tensor scales: enough for every
/// refusal.
pub fn spec() -> CacheSpec {
    CacheSpec::new(2, 16, 8, KvFormat::Fp8E4M3).unwrap()
}

pub fn shape() -> CacheShape {
    spec().shape(4).unwrap()
}

pub const HALF_BYTES: usize = 4 * 8 * 2 * 16;
pub const ROWS: RowStrides = RowStrides::contiguous(2, 16);
pub const ONE: [f32; 1] = [1.0];

pub fn unit_scale<'a>() -> ScaleRef<'a, CpuBackend> {
    ScaleRef { values: &ONE, strides: ScaleStrides::default() }
}

/// Owned bytes of one layer.
pub struct Cache {
    pub k: Vec<u8>,
    pub v: Vec<u8>,
    pub dynamic: Option<Vec<f32>>,
}

impl Cache {
    pub fn new() -> Self {
        Cache { k: vec![0; HALF_BYTES], v: vec![0; HALF_BYTES], dynamic: None }
    }

    pub fn view(&self) -> LayerRef<'_, CpuBackend> {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.dynamic.as_deref(), v_dynamic: None }
    }

    pub fn view_mut(&mut self) -> LayerMut<'_, CpuBackend> {
        LayerMut { k: &mut self.k, v: &mut self.v, k_dynamic: self.dynamic.as_deref_mut(), v_dynamic: None }
    }
}

pub(crate) use refused;
