//! Two samples share a prompt's blocks until one of them writes: the pool decides which block has to
//! be copied, `copy_blocks` copies it in every layer.
//!
//!     cargo run --example 03_copy_on_write

use std::sync::Arc;

use quantkv::args::RowStrides;
use quantkv::blocks::{BlockPool, BlockTable, WritePlan};
use quantkv::scale::LayerScales;
use quantkv::{CacheSpec, CpuBackend, KvFormat, PagedKvCache, Result};

const LAYERS: usize = 2;
const ROW: usize = 2 * 64;

/// What the plan asks for: copies first, then the new rows, here `x` everywhere.
fn step(cache: &mut PagedKvCache<CpuBackend>, plan: &mut WritePlan, x: f32) -> Result<()> {
    cache.copy_blocks(&plan.copies)?;
    let (rows, strides) = (vec![x; plan.slots.len() * ROW], RowStrides::contiguous(2, 64));
    for layer in 0..LAYERS {
        cache.write(layer, &rows, strides, &rows, strides, &plan.slots)?;
    }
    plan.clear();
    Ok(())
}

fn main() -> Result<()> {
    let spec = CacheSpec::new(2, 64, 8, KvFormat::Fp8E4M3)?;
    let mut cache = PagedKvCache::new(Arc::new(CpuBackend::new()), spec, 16, &vec![LayerScales::one(); LAYERS])?;
    let mut pool = BlockPool::new(16, 8)?;
    let mut plan = WritePlan::default();

    // A prompt of 10 tokens: one full block and two slots of the next.
    let mut first = BlockTable::new(&pool, 0);
    first.append(&mut pool, &[7; 10], &mut plan)?;
    step(&mut cache, &mut plan, 1.0)?;
    let mut second = first.fork(&mut pool)?;
    assert_eq!((pool.num_in_use(), second.blocks()), (2, first.blocks()));

    // The first to go on gets a copy of the partly filled block; the full one stays shared.
    first.append(&mut pool, &[8], &mut plan)?;
    assert_eq!(plan.copies.len(), 1);
    step(&mut cache, &mut plan, 2.0)?;
    // The second is now alone with the original and writes in place.
    second.append(&mut pool, &[9], &mut plan)?;
    assert!(plan.copies.is_empty());
    step(&mut cache, &mut plan, 4.0)?;

    // Slots 1 and 2 of their last blocks: the same prompt, then each its own token.
    for (table, own) in [(&first, 0x40), (&second, 0x48)] {
        for layer in 0..LAYERS {
            let (block, keys) = (table.blocks()[1] as usize, cache.layer_ref(layer)?.k);
            let code = |slot: usize| keys[block * 8 * ROW + slot * 64];
            assert_eq!((code(1), code(2)), (0x38, own), "E4M3: 1.0 is 0x38, 2.0 is 0x40, 4.0 is 0x48");
        }
    }
    assert_eq!(first.blocks()[0], second.blocks()[0]);
    println!("two samples of 11 tokens in {} blocks: {:?}, {:?}", pool.num_in_use(), first.blocks(), second.blocks());
    first.release(&mut pool)?;
    second.release(&mut pool)
}
