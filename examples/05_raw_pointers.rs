//! The unsafe storey: an engine that owns its memory passes addresses. Its cache is one allocation
//! in which K and V blocks take turns, `[blocks, 2, heads, block, dim]`.
//!
//!     cargo run --example 05_raw_pointers

use quantkv::args::{CacheWrite, Gather, LayerMut, LayerRef, RowStrides};
use quantkv::layout::Half;
use quantkv::raw::{self, PtrMut, PtrRef};
use quantkv::scale::{ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheSpec, CpuBackend, Faults, KvFormat, Result};

/// A pointer and a length: what an engine in another language would hand over.
fn read<T>(data: &[T]) -> PtrRef<T> {
    PtrRef::new(data.as_ptr(), data.len())
}

fn main() -> Result<()> {
    let cpu = CpuBackend::new();
    let spec = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?;
    // In elements: from one K block to the next lies a V block as well.
    let block = spec.elements_per_block(Half::K)?;
    let shape = spec.shape(4)?.with_block_strides(2 * block, 2 * block)?;
    let mut allocation = vec![0u8; 4 * 2 * block];
    let (k_len, v_len) = (shape.buffer_bytes(Half::K), shape.buffer_bytes(Half::V));
    let base = allocation.as_mut_ptr();
    let (k, v) = (base, base.wrapping_add(block));

    let rows = RowStrides::contiguous(2, 64);
    let (key, value) = ([1.5f32; 128], [-0.25f32; 128]);
    let scale = ScaleRef { values: read(&[1.0]), strides: ScaleStrides::default() };
    let write = CacheWrite {
        shape,
        cache: LayerMut { k: PtrMut::new(k, k_len), v: PtrMut::new(v, v_len), k_dynamic: None, v_dynamic: None },
        key: read(&key),
        key_strides: rows,
        value: read(&value),
        value_strides: rows,
        slot_mapping: read(&[3 * 16 + 9]),
        k_scale: scale,
        v_scale: scale,
    };
    // SAFETY: every pointer is to that many elements of ours, and nobody else uses them; K and V
    // ranges overlap, but their blocks do not.
    unsafe { raw::cache_write(&cpu, write)? };

    // Back to dense rows: position 9 of a sequence whose only block is block 3.
    let (mut dense_k, mut dense_v) = ([0.0f32; 128], [0.0f32; 128]);
    let gather = Gather {
        shape,
        cache: LayerRef { k: PtrRef::new(k, k_len), v: PtrRef::new(v, v_len), k_dynamic: None, v_dynamic: None },
        k_scale: scale,
        v_scale: scale,
        block_tables: read(&[3]),
        block_table_stride: 1,
        cu_seq_lens: read(&[0, 1]),
        starts: Some(read(&[9])),
        num_tokens: 1,
        key: PtrMut::new(dense_k.as_mut_ptr(), 128),
        key_strides: rows,
        value: PtrMut::new(dense_v.as_mut_ptr(), 128),
        value_strides: rows,
    };
    // SAFETY: as above; the cache is only read.
    unsafe { raw::gather(&cpu, gather)? };

    assert_eq!((dense_k, dense_v, cpu.faults()?), (key, value, Faults::NONE));
    println!("wrote and gathered one token through {} bytes of interleaved cache", allocation.len());
    Ok(())
}
