//! Which registers a load has not yet filled, as far as the program has made sure of it.
//!
//! The simulator does loads at once. What it checks is that the program waited for the counter that says so before it
//! touches the register: each load is enqueued under one or two counters, and a wait for a count takes entries off.
//!
//! ```text
//!            gfx9                gfx11               gfx12
//! Load       vmcnt               vmcnt               loadcnt      in order
//! Store      vmcnt               vscnt               storecnt     in order
//! Shared     lgkmcnt             lgkmcnt             dscnt        in order
//! Scalar     lgkmcnt             lgkmcnt             kmcnt        in any order: only zero says anything
//! ```
//! FLAT instructions count as device memory and as shared memory. On gfx9 one of the two may be told early: they are in no
//! order with the rest of either. Later devices keep the order.

use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    Load = 0,
    Store = 1,
    Shared = 2,
    Scalar = 3,
}

#[derive(Clone, Copy)]
pub enum Registers {
    Vectors(u16, u16),
    Scalars(u8, u8),
    None,
}

struct Entry {
    registers: Registers,
    /// Counters that have not been waited for.
    left: u8,
    in_order: bool,
    stores_shared: bool,
}

pub struct Waits {
    queues: [VecDeque<u64>; 4],
    entries: VecDeque<Entry>,
    /// Number of the first of `entries`.
    first: u64,
    vectors: Vec<u8>,
    scalars: [u8; 128],
    /// Whether FLAT instructions keep the order of both counters.
    orders_flat: bool,
}

impl Waits {
    pub fn new(vectors: usize, orders_flat: bool) -> Self {
        Waits {
            queues: Default::default(),
            entries: VecDeque::new(),
            first: 0,
            vectors: vec![0; vectors],
            scalars: [0; 128],
            orders_flat,
        }
    }

    pub fn vector_is_pending(&self, slot: usize) -> bool {
        self.vectors[slot] != 0
    }

    pub fn scalars_pending(&self, first: usize, count: usize) -> bool {
        self.scalars[first..first + count].iter().any(|&pending| pending != 0)
    }

    /// Whether stores to shared memory may not have arrived.
    pub fn shared_stores_pending(&self) -> bool {
        self.entries.iter().any(|entry| entry.left > 0 && entry.stores_shared)
    }

    pub fn enqueue(&mut self, counters: &[Counter], registers: Registers, stores_shared: bool) {
        let in_order = if counters.len() == 1 { counters[0] != Counter::Scalar } else { self.orders_flat };
        self.count(registers, 1);
        let number = self.first + self.entries.len() as u64;
        self.entries.push_back(Entry { registers, left: counters.len() as u8, in_order, stores_shared });
        for &counter in counters {
            self.queues[counter as usize].push_back(number);
        }
    }

    fn count(&mut self, registers: Registers, step: i8) {
        match registers {
            Registers::Vectors(first, count) => {
                for pending in &mut self.vectors[usize::from(first)..usize::from(first + count)] {
                    *pending = pending.saturating_add_signed(step);
                }
            }
            Registers::Scalars(first, count) => {
                for pending in &mut self.scalars[usize::from(first)..usize::from(first) + usize::from(count)] {
                    *pending = pending.saturating_add_signed(step);
                }
            }
            Registers::None => {}
        }
    }

    /// Waits until the counters together are at most `limit`. Several share one on older devices.
    pub fn wait(&mut self, counters: &[Counter], limit: usize) {
        loop {
            let outstanding: usize = counters.iter().map(|&counter| self.queues[counter as usize].len()).sum();
            if outstanding <= limit {
                return;
            }
            // Kinds that overtake each other: that some have arrived does not say which.
            let all_in_order = counters.iter().all(|&counter| {
                self.queues[counter as usize]
                    .iter()
                    .all(|&number| self.entries[(number - self.first) as usize].in_order)
            });
            let kinds = counters.iter().filter(|&&counter| !self.queues[counter as usize].is_empty()).count();
            let load_and_store = counters.contains(&Counter::Load) && counters.contains(&Counter::Store);
            if limit > 0 && !(all_in_order && (kinds == 1 || load_and_store)) {
                return;
            }
            let oldest = counters
                .iter()
                .filter_map(|&counter| Some((*self.queues[counter as usize].front()?, counter)))
                .min_by_key(|pair| pair.0);
            let Some((number, counter)) = oldest else { return };
            self.queues[counter as usize].pop_front();
            self.arrive(number);
        }
    }

    fn arrive(&mut self, number: u64) {
        let entry = &mut self.entries[(number - self.first) as usize];
        entry.left -= 1;
        if entry.left == 0 {
            let registers = entry.registers;
            self.count(registers, -1);
        }
        while self.entries.front().is_some_and(|entry| entry.left == 0) {
            self.entries.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_arrive_in_order_and_scalars_only_all_together() {
        let mut waits = Waits::new(8, false);
        waits.enqueue(&[Counter::Load], Registers::Vectors(0, 2), false);
        waits.enqueue(&[Counter::Load], Registers::Vectors(4, 1), false);
        waits.wait(&[Counter::Load, Counter::Store], 1);
        assert!(!waits.vector_is_pending(1) && waits.vector_is_pending(4));
        waits.enqueue(&[Counter::Scalar], Registers::Scalars(10, 2), false);
        waits.enqueue(&[Counter::Shared], Registers::Vectors(6, 1), true);
        waits.wait(&[Counter::Shared, Counter::Scalar], 1);
        assert!(waits.scalars_pending(11, 1) && waits.vector_is_pending(6) && waits.shared_stores_pending());
        waits.wait(&[Counter::Shared, Counter::Scalar], 0);
        assert!(!waits.scalars_pending(10, 2) && !waits.vector_is_pending(6) && !waits.shared_stores_pending());
        assert!(waits.vector_is_pending(4));
    }

    #[test]
    fn flat_needs_both_counters_at_zero() {
        let mut waits = Waits::new(4, false);
        waits.enqueue(&[Counter::Load, Counter::Shared], Registers::Vectors(0, 1), false);
        waits.enqueue(&[Counter::Load], Registers::Vectors(1, 1), false);
        waits.wait(&[Counter::Load], 1);
        assert!(waits.vector_is_pending(0));
        waits.wait(&[Counter::Load], 0);
        assert!(waits.vector_is_pending(0) && !waits.vector_is_pending(1));
        waits.wait(&[Counter::Shared], 0);
        assert!(!waits.vector_is_pending(0));
    }

    #[test]
    fn flat_keeps_the_order_on_later_devices() {
        let mut waits = Waits::new(4, true);
        waits.enqueue(&[Counter::Load, Counter::Shared], Registers::Vectors(0, 1), false);
        waits.enqueue(&[Counter::Load, Counter::Shared], Registers::Vectors(1, 1), false);
        waits.wait(&[Counter::Load], 1);
        assert!(waits.vector_is_pending(0));
        waits.wait(&[Counter::Shared], 1);
        assert!(!waits.vector_is_pending(0) && waits.vector_is_pending(1));
    }
}
