//! Preemption: a sequence's blocks move to host memory, others take its place, and it comes back to
//! different blocks with the same bytes.
//!
//!     cargo run --example 04_swap

use std::sync::Arc;

use quantkv::args::RowStrides;
use quantkv::blocks::{BlockAllocator, BlockPool, BlockTable, WritePlan};
use quantkv::scale::LayerScales;
use quantkv::{CacheSpec, CpuBackend, HostPool, KvFormat, PagedKvCache, Result};

const BLOCK_BYTES: usize = 8 * 2 * 64;

/// A sequence's keys of layer 0, block after block.
fn keys(cache: &PagedKvCache<CpuBackend>, table: &BlockTable) -> Result<Vec<u8>> {
    let k = cache.layer_ref(0)?.k;
    Ok(table.blocks().iter().flat_map(|&block| &k[block as usize * BLOCK_BYTES..][..BLOCK_BYTES]).copied().collect())
}

fn main() -> Result<()> {
    let spec = CacheSpec::new(2, 64, 8, KvFormat::Fp8E5M2)?;
    let mut cache = PagedKvCache::new(Arc::new(CpuBackend::new()), spec, 4, &[LayerScales::one()])?;
    let mut host = HostPool::new(spec, 1, 8)?;
    // Who has which block: of the cache, and of the host pool.
    let (mut pool, mut host_blocks) = (BlockPool::new(4, 8)?, BlockAllocator::new(8)?);

    let mut plan = WritePlan::default();
    let mut table = BlockTable::new(&pool, 0);
    table.append(&mut pool, &[1; 20], &mut plan)?;
    let (rows, strides) =
        ((0..20 * 128).map(|i| (i as f32).cos()).collect::<Vec<f32>>(), RowStrides::contiguous(2, 64));
    cache.write(0, &rows, strides, &rows, strides, &plan.slots)?;
    let before = (table.blocks().to_vec(), keys(&cache, &table)?);

    // Out: the pairs name blocks, swap_out moves their bytes, in all layers and with dynamic scales.
    let mut pairs = vec![];
    let mut swapped = table.swap_out(&mut pool, &mut host_blocks, &mut pairs)?;
    cache.swap_out(&mut host, &pairs)?;
    assert_eq!((pool.num_available(), swapped.num_blocks()), (4, 3));

    // Somebody else takes a block and overwrites it.
    let mut other = BlockTable::new(&pool, 0);
    plan.clear();
    other.append(&mut pool, &[2; 8], &mut plan)?;
    cache.write(0, &rows, strides, &rows, strides, &plan.slots)?;

    // And back.
    pairs.clear();
    let table = swapped.swap_in(&mut pool, &mut host_blocks, &mut pairs)?;
    cache.swap_in(&host, &pairs)?;
    assert_ne!(table.blocks(), before.0);
    assert_eq!((table.len(), keys(&cache, &table)?), (20, before.1));
    println!("blocks {:?} came back as {:?}, byte for byte", before.0, table.blocks());
    table.release(&mut pool)?;
    other.release(&mut pool)
}
