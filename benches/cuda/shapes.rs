//! What is measured.

use std::collections::HashSet;

use quantkv::{CacheLayout, KvFormat};

use crate::attention::Shape;
use crate::cache_ops::{CopyBlocks, Swap, Way, Write};

/// One line of the report to be.
pub enum Work {
    Decode(Shape),
    Prefill(Shape),
    Schedule(Shape),
    Write(Write),
    Copy(CopyBlocks),
    Swap(Swap),
}

impl Work {
    pub fn operation(&self) -> &'static str {
        match self {
            Work::Decode(_) => "decode",
            Work::Prefill(_) => "prefill",
            Work::Schedule(_) => "schedule",
            Work::Write(_) => "cache_write",
            Work::Copy(_) => "copy_blocks",
            Work::Swap(_) => "swap_blocks",
        }
    }

    pub fn name(&self) -> String {
        match self {
            Work::Decode(shape) | Work::Prefill(shape) | Work::Schedule(shape) => shape.name(),
            Work::Write(write) => write.name(),
            Work::Copy(copy) => copy.name(),
            Work::Swap(swap) => swap.name(),
        }
    }
}

const E4M3: KvFormat = KvFormat::Fp8E4M3;
const K: usize = 1024;

/// All shapes, or the few of `--quick`.
pub fn all(quick: bool) -> Vec<Work> {
    let mut work = vec![];
    let formats = [E4M3, KvFormat::BF16, KvFormat::Fp8E5M2];
    // Uniform batches: the grid.
    let few = [(1, K), (1, 32 * K), (8, 4 * K), (16, 16 * K), (32, 4 * K), (256, K)];
    for format in formats {
        for batch in [1, 8, 16, 32, 64, 128, 256] {
            for context in [K, 4 * K, 16 * K, 32 * K] {
                if !quick || (format != KvFormat::Fp8E5M2 && few.contains(&(batch, context))) {
                    work.push(Work::Decode(Shape::uniform(batch, context, format)));
                }
            }
        }
        if !quick || format == E4M3 {
            work.extend(skewed(format).map(Work::Decode));
        }
    }
    if !quick {
        variations(&mut work);
    }
    for shape in [Shape::uniform(1, K, E4M3), Shape::uniform(256, K, E4M3)].into_iter().chain(skewed(E4M3)) {
        work.push(Work::Schedule(shape));
    }
    prefill(&mut work, quick);
    moves(&mut work, quick);
    work
}

/// Small versions of all shapes, each kind once: to be checked, not timed.
pub fn small() -> Vec<Work> {
    let mut seen = HashSet::new();
    let shrunk = |work| match work {
        Work::Decode(shape) => Work::Decode(shape.shrunk()),
        Work::Prefill(shape) => Work::Prefill(shape.shrunk()),
        Work::Schedule(shape) => Work::Schedule(shape.shrunk()),
        Work::Write(write) => Work::Write(Write { tokens: write.tokens.min(301), ..write }),
        Work::Copy(copy) => Work::Copy(CopyBlocks { pairs: copy.pairs.min(9), tables: copy.tables.min(6), ..copy }),
        Work::Swap(swap) => Work::Swap(Swap { blocks: swap.blocks.min(20), ..swap }),
    };
    let new = move |work: &Work| seen.insert((work.operation(), work.name()));
    all(false).into_iter().map(shrunk).filter(new).collect()
}

/// Half short, half long; one very long among long ones.
fn skewed(format: KvFormat) -> [Shape; 2] {
    let sets = [
        ("32 x 128 + 32 x 4k", [vec![128; 32], vec![4 * K; 32]]),
        ("1 x 128k + 31 x 4k", [vec![128 * K], vec![4 * K; 31]]),
    ];
    sets.map(|(label, lens)| Shape::of(label.into(), lens.concat(), format))
}

/// One thing at a time is other than in the grid.
fn variations(work: &mut Vec<Work>) {
    let mut push = |shape: Shape| work.push(Work::Decode(shape));
    for (batch, context) in [(8, 16 * K), (64, 4 * K)] {
        let base = |format| Shape::uniform(batch, context, format);
        for format in [E4M3, KvFormat::BF16] {
            for block in [32, 64, 128] {
                push(Shape { block, ..base(format) });
            }
            for (group, kv_heads) in [(1, 32), (1, 8), (8, 8), (16, 4)] {
                push(Shape { group, kv_heads, ..base(format) });
            }
            for dim in [64, 96, 192, 256] {
                push(Shape { dim, ..base(format) });
            }
            push(Shape { layout: CacheLayout::Nhd, ..base(format) });
        }
        for queries in [2, 4, 8] {
            push(Shape { queries, group: 8, ..base(E4M3) });
            push(Shape { queries, ..base(E4M3) });
        }
        push(Shape { dynamic: true, ..base(E4M3) });
        push(Shape { dynamic: true, queries: 4, group: 8, ..base(E4M3) });
        push(Shape { layout: CacheLayout::VllmPacked, ..base(E4M3) });
        push(base(KvFormat::Fp8E4M3Fnuz));
        push(base(KvFormat::F16));
    }
}

/// Chunks of a prompt, the newest tokens of a longer context.
fn prefill(work: &mut Vec<Work>, quick: bool) {
    let shapes: &[(usize, usize)] = if quick {
        &[(2 * K, 8 * K), (2 * K, 32 * K)]
    } else {
        &[(512, 512), (2 * K, 2 * K), (2 * K, 8 * K), (64, 32 * K), (512, 32 * K), (2 * K, 32 * K), (8 * K, 8 * K)]
    };
    for format in [E4M3, KvFormat::BF16, KvFormat::Fp8E5M2] {
        for &(queries, context) in shapes {
            work.push(Work::Prefill(Shape { queries, ..Shape::uniform(1, context, format) }));
        }
    }
    if !quick {
        for context in [8 * K, 32 * K] {
            let dynamic = Shape { dynamic: true, queries: 2 * K, ..Shape::uniform(1, context, E4M3) };
            work.push(Work::Prefill(dynamic));
        }
        for dynamic in [false, true] {
            let layout = CacheLayout::VllmPacked;
            work.push(Work::Prefill(Shape { layout, dynamic, queries: 2 * K, ..Shape::uniform(1, 32 * K, E4M3) }));
        }
        // Short prompts of several sequences; Gemma's heads, and its capped scores.
        for (batch, context) in [(16, 512), (8, K), (4, 2 * K)] {
            work.push(Work::Prefill(Shape { queries: context, ..Shape::uniform(batch, context, E4M3) }));
        }
        for format in [E4M3, KvFormat::BF16] {
            for context in [2 * K, 8 * K, 32 * K] {
                work.push(Work::Prefill(Shape { queries: 2 * K, dim: 256, ..Shape::uniform(1, context, format) }));
            }
        }
        for dim in [128, 256] {
            let capped = Shape { capped: true, queries: 2 * K, dim, ..Shape::uniform(1, 8 * K, E4M3) };
            work.push(Work::Prefill(capped));
        }
    }
}

fn moves(work: &mut Vec<Work>, quick: bool) {
    let base = |tokens| Write { tokens, format: E4M3, layout: CacheLayout::Hnd, dynamic: false };
    let tokens: &[usize] = if quick { &[256, 8 * K] } else { &[1, 32, 256, K, 4 * K, 8 * K, 32 * K] };
    work.extend(tokens.iter().map(|&tokens| Work::Write(base(tokens))));
    if !quick {
        let write = base(8 * K);
        for format in [KvFormat::Fp8E5M2, KvFormat::BF16] {
            work.push(Work::Write(Write { format, ..write }));
        }
        work.push(Work::Write(Write { layout: CacheLayout::Nhd, ..write }));
        work.push(Work::Write(Write { layout: CacheLayout::VllmPacked, ..write }));
        work.push(Work::Write(Write { dynamic: true, ..write }));
    }
    // 16 KB: a page of 16 tokens, 8 heads of 128, FP8. Two tables a layer.
    let copies: &[(usize, usize)] = if quick { &[(K, 2)] } else { &[(1, 64), (16, 64), (64, 64), (K, 2), (K, 64)] };
    for &(pairs, tables) in copies {
        work.push(Work::Copy(CopyBlocks { pairs, tables, block_bytes: 16 * K }));
    }
    for way in [Way::Out, Way::In, Way::Both] {
        work.push(Work::Swap(Swap { blocks: K, block_bytes: 16 * K, way }));
        if !quick {
            work.push(Work::Swap(Swap { blocks: 256, block_bytes: 128 * K, way }));
        }
    }
}
