//! Work that splits itself over the caller's rayon pool.
//!
//! A [`Job`] owns, exclusively, the part of the output it writes; splitting it splits those
//! borrows (`split_at_mut`), so no two threads can write one element and nothing here is unsafe.
//! What a job computes for an element never depends on where it was split: results are the same
//! for any number of threads, and without the `parallel` feature.

/// Bytes read and written below which a second thread costs more than it saves: waking one takes
/// some microseconds, in which a core moves about this much.
const BYTES_PER_PART: usize = 128 << 10;

/// A divisible piece of work.
pub(super) trait Job: Send + Sized {
    /// Divides the work so that about `left` of `parts` equal parts are in the first piece.
    fn split(self, left: usize, parts: usize) -> (Self, Self);

    /// Does the work on this thread.
    fn run(self);
}

/// Does `job`, which reads and writes about `bytes` bytes, on as many threads as that is worth.
pub(super) fn run<J: Job>(job: J, bytes: usize) {
    run_parts(job, parts_for(bytes));
}

/// How many parts work on `bytes` bytes is cut into: a few a thread, so that a thread that is
/// late (or a part that is larger) can be made up for.
pub(super) fn parts_for(bytes: usize) -> usize {
    (bytes / BYTES_PER_PART).min(4 * num_threads()).max(1)
}

#[cfg(feature = "parallel")]
fn num_threads() -> usize {
    match rayon::current_num_threads() {
        // One thread gains nothing from more parts.
        1 => 0,
        threads => threads,
    }
}

#[cfg(not(feature = "parallel"))]
fn num_threads() -> usize {
    0
}

fn run_parts<J: Job>(job: J, parts: usize) {
    if parts <= 1 {
        return job.run();
    }
    let left = parts / 2;
    let (first, second) = job.split(left, parts);
    join(|| run_parts(first, left), || run_parts(second, parts - left));
}

/// Runs both, at the same time where there are threads.
#[cfg(feature = "parallel")]
pub(super) fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    rayon::join(a, b)
}

/// Runs both, at the same time where there are threads.
#[cfg(not(feature = "parallel"))]
pub(super) fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    (a(), b())
}

/// Splits a buffer of rows `stride` elements apart before row `row`. The last row may be shorter
/// than the stride, so the cut is clamped to the buffer.
pub(super) fn split_rows<T>(rows: &mut [T], row: usize, stride: usize) -> (&mut [T], &mut [T]) {
    let at = row.saturating_mul(stride).min(rows.len());
    rows.split_at_mut(at)
}
