//! Block bookkeeping against a naive model: random sequences start, grow, fork, are preempted and
//! come back, over a pool a little too small, while a simulated cache executes the plans.
//!
//! What a slot holds is modelled as everything a real value depends on: the scale epoch, the extra
//! key and all tokens up to its own. After every operation each sequence must read exactly its own
//! values; reference counts must be sums; free blocks are poisoned, so that nothing is found by
//! luck in a block that was given back.

use std::collections::HashSet;
use std::rc::Rc;

use proptest::prelude::*;
use quantkv::Error;
use quantkv::args::BlockPair;
use quantkv::blocks::{BlockAllocator, BlockPool, BlockTable, SwappedTable, WritePlan};

/// What one slot holds: (epoch, extra, tokens up to and including this one).
type Value = Option<Rc<(u32, u64, Vec<u32>)>>;

/// What the model knows of a sequence.
#[derive(Clone, Debug)]
struct Expected {
    extra: u64,
    tokens: Vec<u32>,
    /// The scale epoch in which each token was written.
    epochs: Vec<u32>,
    /// The epoch in which the sequence began; it publishes in no other.
    born: u32,
}

impl Expected {
    fn value(&self, position: usize) -> Value {
        Some(Rc::new((self.epochs[position], self.extra, self.tokens[..=position].to_vec())))
    }
}

#[derive(Clone, Debug)]
enum Op {
    Start {
        extra: u64,
        tokens: Vec<u32>,
    },
    /// Several sequences get tokens in one plan.
    Step(Vec<(usize, Vec<u32>)>),
    Fork(usize),
    Release(usize),
    SwapOut(usize),
    SwapIn(usize),
    DropSwapped(usize),
    Flush,
    DoubleFree(u32),
}

struct Sim {
    block_size: usize,
    pool: BlockPool,
    host: BlockAllocator,
    device_values: Vec<Value>,
    host_values: Vec<Value>,
    running: Vec<(BlockTable, Expected)>,
    swapped: Vec<(SwappedTable, Vec<u32>, Expected)>,
    epoch: u32,
    /// (extra, tokens) of every prefix of whole blocks published in this epoch.
    published: HashSet<(u64, Vec<u32>)>,
    peak: usize,
    prefix_cache: bool,
}

impl Sim {
    fn new(num_blocks: usize, host_blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        let pool = if prefix_cache { BlockPool::with_prefix_cache } else { BlockPool::new };
        Sim {
            block_size,
            pool: pool(num_blocks, block_size).unwrap(),
            host: BlockAllocator::new(host_blocks).unwrap(),
            device_values: vec![None; num_blocks * block_size],
            host_values: vec![None; host_blocks * block_size],
            running: Vec::new(),
            swapped: Vec::new(),
            epoch: 0,
            published: HashSet::new(),
            peak: 0,
            prefix_cache,
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Start { extra, tokens } => self.start(extra, tokens),
            Op::Step(appends) => self.step(appends),
            Op::Fork(pick) if !self.running.is_empty() => {
                let (table, expected) = &self.running[pick % self.running.len()];
                let fork = (table.fork(&mut self.pool).unwrap(), expected.clone());
                self.running.push(fork);
            }
            Op::Release(pick) if !self.running.is_empty() => {
                let (table, _) = self.running.swap_remove(pick % self.running.len());
                table.release(&mut self.pool).unwrap();
            }
            Op::SwapOut(pick) if !self.running.is_empty() => self.swap_out(pick % self.running.len()),
            Op::SwapIn(pick) if !self.swapped.is_empty() => self.swap_in(pick % self.swapped.len()),
            Op::DropSwapped(pick) if !self.swapped.is_empty() => {
                let (table, ..) = self.swapped.swap_remove(pick % self.swapped.len());
                table.release(&mut self.host).unwrap();
            }
            Op::Flush => {
                self.pool.flush_prefixes().unwrap();
                self.epoch += 1;
                self.published.clear();
            }
            Op::DoubleFree(block) => {
                if self.distinct_blocks().contains(&block) {
                    return;
                }
                let before = (self.pool.num_available(), self.pool.ref_count(block));
                assert!(matches!(self.pool.release(block), Err(Error::NotAllocated { block: b }) if b == block));
                assert_eq!((self.pool.num_available(), self.pool.ref_count(block)), before);
            }
            _ => {}
        }
    }

    fn start(&mut self, extra: u64, tokens: Vec<u32>) {
        let table = BlockTable::with_prefix_of(&mut self.pool, extra, &tokens).unwrap();
        let found = table.len();
        assert!(found < tokens.len() && found.is_multiple_of(self.block_size));
        assert!(
            found == 0 || self.published.contains(&(extra, tokens[..found].to_vec())),
            "found what nobody published"
        );
        if self.prefix_cache && self.pool.prefix_stats().blocks_evicted == 0 {
            let all = (0..tokens.len()).step_by(self.block_size);
            let longest = all.take_while(|&n| n == 0 || self.published.contains(&(extra, tokens[..n].to_vec()))).last();
            assert_eq!(Some(found), longest, "missed a published prefix");
        }
        let known = tokens[..found].to_vec();
        let expected = Expected { extra, tokens: known, epochs: vec![self.epoch; found], born: self.epoch };
        self.running.push((table, expected));
        self.check();
        let last = self.running.len() - 1;
        self.step(vec![(last, tokens[found..].to_vec())]);
    }

    fn step(&mut self, appends: Vec<(usize, Vec<u32>)>) {
        if self.running.is_empty() {
            return;
        }
        let mut plan = WritePlan::default();
        let mut writes: Vec<Value> = Vec::new();
        for (pick, tokens) in appends {
            let pick = pick % self.running.len();
            let needed = self.blocks_needed(pick, tokens.len());
            let in_use = self.distinct_blocks().len();
            let (table, expected) = &mut self.running[pick];
            let before = (table.blocks().to_vec(), plan.clone());
            assert_eq!(table.blocks_needed(&self.pool, tokens.len()), needed);
            match table.append(&mut self.pool, &tokens, &mut plan) {
                Ok(()) => {
                    for token in tokens {
                        expected.tokens.push(token);
                        expected.epochs.push(self.epoch);
                        writes.push(expected.value(expected.tokens.len() - 1));
                    }
                }
                Err(Error::NoFreeBlocks { requested, free }) => {
                    assert_eq!((requested, free), (needed, self.pool.num_blocks() - in_use));
                    assert!(requested > free);
                    assert_eq!((table.blocks().to_vec(), plan.clone()), before, "a refused append changes nothing");
                }
                Err(other) => panic!("{other}"),
            }
            assert_eq!(self.running[pick].0.len(), self.running[pick].1.tokens.len());
            self.note_peak();
        }
        let mut sources = plan.copies.iter().map(|pair| pair.src);
        let targets: HashSet<u32> = plan.copies.iter().map(|pair| pair.dst).collect();
        assert_eq!(targets.len(), plan.copies.len(), "a block copied to twice");
        assert!(sources.all(|src| !targets.contains(&src)), "a block both source and destination");
        copy(&self.device_values.clone(), &mut self.device_values, &plan.copies, self.block_size);
        assert_eq!(plan.slots.len(), writes.len());
        assert_eq!(plan.slots.iter().collect::<HashSet<_>>().len(), writes.len(), "two tokens in one slot");
        for (&slot, value) in plan.slots.iter().zip(writes) {
            self.device_values[slot as usize] = value;
        }
        for (table, expected) in &mut self.running {
            table.publish(&mut self.pool).unwrap();
            if self.prefix_cache && expected.born == self.epoch {
                for end in (self.block_size..=expected.tokens.len()).step_by(self.block_size) {
                    self.published.insert((expected.extra, expected.tokens[..end].to_vec()));
                }
            }
        }
    }

    /// What `append` must take, computed from the tables alone.
    fn blocks_needed(&self, pick: usize, tokens: usize) -> usize {
        let (table, _) = &self.running[pick];
        let partial = table.len() % self.block_size != 0;
        let shared = partial
            && self
                .running
                .iter()
                .enumerate()
                .any(|(other, (t, _))| other != pick && t.blocks().contains(table.blocks().last().unwrap()));
        let grown = (table.len() + tokens).div_ceil(self.block_size) - table.len().div_ceil(self.block_size);
        grown + usize::from(shared && tokens > 0)
    }

    fn swap_out(&mut self, pick: usize) {
        let (mut table, expected) = self.running.swap_remove(pick);
        let (blocks, free) = (table.blocks().to_vec(), self.host.num_free());
        let mut pairs = Vec::new();
        match table.swap_out(&mut self.pool, &mut self.host, &mut pairs) {
            Ok(swapped) => {
                assert_eq!(pairs.iter().map(|pair| pair.src).collect::<Vec<_>>(), blocks);
                assert_eq!((table.len(), table.blocks().len()), (0, 0));
                assert_eq!((swapped.len(), swapped.num_blocks()), (expected.tokens.len(), blocks.len()));
                copy(&self.device_values, &mut self.host_values, &pairs, self.block_size);
                self.swapped.push((swapped, pairs.iter().map(|pair| pair.dst).collect(), expected));
            }
            Err(Error::NoFreeBlocks { requested, free: reported }) => {
                assert_eq!((requested, reported, pairs.len()), (blocks.len(), free, 0));
                assert!(requested > free);
                assert_eq!(table.blocks(), blocks);
                self.running.push((table, expected));
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn swap_in(&mut self, pick: usize) {
        let (mut swapped, host_blocks, expected) = self.swapped.swap_remove(pick);
        let free = self.pool.num_blocks() - self.distinct_blocks().len();
        let mut pairs = Vec::new();
        match swapped.swap_in(&mut self.pool, &mut self.host, &mut pairs) {
            Ok(table) => {
                assert_eq!(pairs.iter().map(|pair| pair.src).collect::<Vec<_>>(), host_blocks);
                copy(&self.host_values, &mut self.device_values, &pairs, self.block_size);
                self.running.push((table, expected));
            }
            Err(Error::NoFreeBlocks { requested, free: reported }) => {
                assert_eq!((requested, reported, pairs.len()), (host_blocks.len(), free, 0));
                assert!(requested > free);
                self.swapped.push((swapped, host_blocks, expected));
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn distinct_blocks(&self) -> HashSet<u32> {
        self.running.iter().flat_map(|(table, _)| table.blocks()).copied().collect()
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(self.distinct_blocks().len());
    }

    fn check(&mut self) {
        self.note_peak();
        for (table, expected) in &self.running {
            let mut row = vec![i32::MIN; table.blocks().len() + 2];
            table.write_row(&mut row).unwrap();
            assert_eq!(row[table.blocks().len()..], [-1, -1]);
            for position in 0..table.len() {
                let slot = row[position / self.block_size] as usize * self.block_size + position % self.block_size;
                assert_eq!(self.device_values[slot], expected.value(position), "position {position} of {expected:?}");
            }
        }
        for (_, blocks, expected) in &self.swapped {
            for position in 0..expected.tokens.len() {
                let slot = blocks[position / self.block_size] as usize * self.block_size + position % self.block_size;
                assert_eq!(self.host_values[slot], expected.value(position));
            }
        }
        for block in 0..self.pool.num_blocks() as u32 {
            let tables = self.running.iter().filter(|(table, _)| table.blocks().contains(&block)).count();
            let cached = self.pool.is_cached(block);
            assert_eq!(self.pool.ref_count(block) as usize, tables + usize::from(cached), "references of {block}");
            if self.pool.ref_count(block) == 0 {
                let start = block as usize * self.block_size;
                self.device_values[start..start + self.block_size].fill(None);
            }
        }
        let in_use = self.distinct_blocks().len();
        assert_eq!((self.pool.num_in_use(), self.pool.num_available()), (in_use, self.pool.num_blocks() - in_use));
        assert_eq!(self.pool.peak_in_use(), self.peak);
        assert_eq!(self.host.num_allocated(), self.swapped.iter().map(|(_, blocks, _)| blocks.len()).sum::<usize>());
    }

    fn finish(mut self) {
        for (table, _) in self.running.drain(..) {
            table.release(&mut self.pool).unwrap();
        }
        for (table, ..) in self.swapped.drain(..) {
            table.release(&mut self.host).unwrap();
        }
        assert_eq!((self.pool.num_in_use(), self.host.num_allocated()), (0, 0), "leaked");
        self.pool.flush_prefixes().unwrap();
        assert!((0..self.pool.num_blocks() as u32).all(|block| self.pool.ref_count(block) == 0));
        // Idle or free, every block can be had.
        (0..self.pool.num_blocks()).for_each(|_| assert!(self.pool.alloc().is_ok()));
        assert!(matches!(self.pool.alloc(), Err(Error::NoFreeBlocks { .. })));
    }
}

/// Copies whole blocks from a snapshot, as `copy_blocks` and `swap_blocks` do in no order.
fn copy(src: &[Value], dst: &mut [Value], pairs: &[BlockPair], block_size: usize) {
    for pair in pairs {
        let (from, to) = (pair.src as usize * block_size, pair.dst as usize * block_size);
        dst[to..to + block_size].clone_from_slice(&src[from..from + block_size]);
    }
}

/// Tokens from an alphabet of two, so that prefixes coincide often.
fn tokens(max: usize) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0u32..2, 1..=max)
}

fn op(num_blocks: usize) -> impl Strategy<Value = Op> {
    let pick = 0..16usize;
    prop_oneof![
        6 => (0u64..2, tokens(14)).prop_map(|(extra, tokens)| Op::Start { extra, tokens }),
        8 => prop::collection::vec((pick.clone(), prop::collection::vec(0u32..2, 0..6)), 1..5).prop_map(Op::Step),
        4 => pick.clone().prop_map(Op::Fork),
        4 => pick.clone().prop_map(Op::Release),
        2 => pick.clone().prop_map(Op::SwapOut),
        3 => pick.clone().prop_map(Op::SwapIn),
        1 => pick.prop_map(Op::DropSwapped),
        1 => Just(Op::Flush),
        2 => (0..num_blocks as u32 + 2).prop_map(Op::DoubleFree),
    ]
}

fn history() -> impl Strategy<Value = (usize, usize, usize, bool, Vec<Op>)> {
    // Some pools are ample, so that nothing is evicted and no prefix may be missed.
    (prop_oneof![3usize..24, Just(200)], 0usize..16, 1usize..5, prop::bool::weighted(0.8)).prop_flat_map(
        |(blocks, host, size, prefix)| {
            (Just(blocks), Just(host), Just(size), Just(prefix), prop::collection::vec(op(blocks), 1..60))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_reads_its_own_tokens((blocks, host, size, prefix, ops) in history()) {
        let mut sim = Sim::new(blocks, host, size, prefix);
        for op in ops {
            sim.apply(op);
            sim.check();
        }
        sim.finish();
    }
}

#[test]
fn sharing_copying_and_evicting_by_hand() {
    let mut sim = Sim::new(4, 4, 2, true);
    sim.start(0, vec![1, 0, 1, 1, 0]);
    sim.start(0, vec![1, 0, 1, 1, 1]);
    sim.check();
    assert_eq!(sim.running[0].0.blocks()[..2], sim.running[1].0.blocks()[..2]);
    assert_eq!((sim.pool.prefix_stats().tokens_found, sim.pool.num_in_use()), (4, 4));

    sim.apply(Op::Release(1));
    sim.apply(Op::Fork(0));
    let mut plan = WritePlan::default();
    let shared = sim.running[1].0.blocks()[2];
    sim.running[1].0.append(&mut sim.pool, &[1], &mut plan).unwrap();
    let own = sim.running[1].0.blocks()[2];
    assert_eq!(plan, WritePlan { slots: vec![own as i64 * 2 + 1], copies: vec![BlockPair::new(shared, own)] });
    plan.clear();
    sim.running[0].0.append(&mut sim.pool, &[0], &mut plan).unwrap();
    assert_eq!(
        plan,
        WritePlan { slots: vec![shared as i64 * 2 + 1], copies: vec![] },
        "the last holder writes in place"
    );

    for (table, _) in sim.running.drain(..) {
        table.release(&mut sim.pool).unwrap();
    }
    assert_eq!((sim.pool.num_available(), sim.pool.is_cached(own)), (4, false), "nothing unpublished is kept");
    // Idle are [1, 0] and [1, 1] after it. Three blocks, two of them free, push out the second.
    sim.start(0, vec![0, 0, 0, 0, 0]);
    assert_eq!((sim.pool.prefix_stats().blocks_evicted, sim.pool.num_available()), (1, 1));
    sim.start(0, vec![1, 0, 1, 1, 0]);
    assert_eq!((sim.running[1].0.len(), sim.pool.prefix_stats().tokens_found), (2, 6), "the shorter prefix is left");
}

#[test]
fn tables_refuse_short_rows_and_zero_blocks() {
    assert!(matches!(BlockPool::new(4, 0), Err(Error::Zero { .. })));
    assert!(matches!(BlockPool::with_prefix_cache(usize::MAX, 16), Err(Error::Unsupported { .. })));
    // Blocks that were never used take no memory.
    assert_eq!(BlockPool::with_prefix_cache(i32::MAX as usize, 16).unwrap().num_available(), i32::MAX as usize);
    let mut pool = BlockPool::new(4, 8).unwrap();
    let mut table = BlockTable::new(&pool, 0);
    table.append(&mut pool, &[7; 9], &mut WritePlan::default()).unwrap();
    assert!(matches!(table.write_row(&mut [0]), Err(Error::BufferTooSmall { needed: 2, got: 1, .. })));
    let mut plan = WritePlan::default();
    assert!(matches!(table.append(&mut pool, &[7; 24], &mut plan), Err(Error::NoFreeBlocks { requested: 3, free: 2 })));
    assert_eq!((table.len(), pool.num_available(), plan), (9, 2, WritePlan::default()));
    table.release(&mut pool).unwrap();
}
