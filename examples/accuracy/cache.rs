//! The cache of one row, and what two devices make of one cache.
//!
//! ```text
//! prompt ──> [ writer: FNUZ ] ── swap_out ──> host bytes ── swap_in ──> [ reader: OCP ] <── what follows
//! ```
//! A row that hands its cache over has two caches of the same geometry. The bytes move through host memory
//! as between two machines of a cluster: nothing in them says what their codes are.

use std::sync::Arc;

use quantkv::args::BlockPair;
use quantkv::cache::HostPool;
use quantkv::scale::LayerScales;
use quantkv::{Backend, CacheSpec, PagedKvCache, Result};

/// Format and scales of a cache.
#[derive(Clone, Debug)]
pub struct CachePlan {
    pub spec: CacheSpec,
    pub scales: Vec<LayerScales>,
}

impl CachePlan {
    pub fn allocate<B: Backend>(&self, backend: &Arc<B>, num_blocks: usize) -> Result<PagedKvCache<B>> {
        PagedKvCache::new(Arc::clone(backend), self.spec, num_blocks, &self.scales)
    }

    /// Bytes of one token in all layers.
    pub fn bytes_per_token(&self) -> Result<usize> {
        Ok(self.spec.bytes_per_token()? * self.scales.len())
    }
}

/// The cache that prompts are written to, and the one that reads them, if that is another.
pub struct RowCache<B: Backend> {
    writer: PagedKvCache<B>,
    reader: Option<Reader<B>>,
}

struct Reader<B: Backend> {
    cache: PagedKvCache<B>,
    sent: HostPool,
    received: HostPool,
}

impl<B: Backend> RowCache<B> {
    pub fn new(backend: &Arc<B>, writer: &CachePlan, reader: Option<&CachePlan>, num_blocks: usize) -> Result<Self> {
        let reader = match reader {
            None => None,
            Some(plan) => Some(Reader {
                cache: plan.allocate(backend, num_blocks)?,
                sent: HostPool::new(writer.spec, writer.scales.len(), num_blocks)?,
                received: HostPool::new(plan.spec, plan.scales.len(), num_blocks)?,
            }),
        };
        Ok(RowCache { writer: writer.allocate(backend, num_blocks)?, reader })
    }

    /// Whether prompts are written by one device and read by another.
    pub fn is_handed_over(&self) -> bool {
        self.reader.is_some()
    }

    /// Where prompts are computed.
    pub fn writer(&mut self) -> &mut PagedKvCache<B> {
        &mut self.writer
    }

    /// Where what follows them is computed.
    pub fn reader(&mut self) -> &mut PagedKvCache<B> {
        match &mut self.reader {
            Some(reader) => &mut reader.cache,
            None => &mut self.writer,
        }
    }

    /// Gives the bytes of these blocks to the reader, if it is another.
    pub fn hand_over(&mut self, blocks: &[u32]) -> Result<()> {
        let Some(Reader { cache, sent, received }) = &mut self.reader else { return Ok(()) };
        let pairs: Vec<BlockPair> = blocks.iter().map(|&block| BlockPair { src: block, dst: block }).collect();
        self.writer.swap_out(sent, &pairs)?;
        for layer in 0..sent.num_layers() {
            let (from, to) = (sent.layer_ref(layer)?, received.layer_mut(layer)?);
            to.k.copy_from_slice(from.k);
            to.v.copy_from_slice(from.v);
        }
        cache.swap_in(received, &pairs)
    }
}
