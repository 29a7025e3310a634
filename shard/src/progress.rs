//! How far a rank's work is: numbers that any thread may read while the rank loads and runs.
//!
//! A watchdog looks at whether they move. So they count what takes microseconds to milliseconds, within a kernel and within a
//! tensor: a step, a layer or a matrix may take longer than anybody should wait for a sign of life.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that one thread counts and all may read. It has a cache line of its own, so that counting disturbs nobody.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more. For one thread only: so it is a load and a store, which cost nothing beside any piece of work.
    #[inline]
    pub fn count(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Begins again at 0. For the thread that counts.
    pub fn reset(&self) {
        self.0.store(0, Relaxed);
    }
}

/// The numbers of a rank.
#[derive(Debug)]
pub struct Progress {
    pieces: Box<[Counter]>,
    /// Meetings with the other ranks that were begun in this epoch. Counted by the thread that owns the device.
    pub collectives: Counter,
    /// Steps that were answered in this epoch. Counted by the thread that owns the device.
    pub steps: Counter,
}

impl Progress {
    /// All zeros, for a rank whose device has so many threads.
    pub fn new(threads: usize) -> Self {
        let pieces = (0..threads.max(1)).map(|_| Counter::default()).collect();
        Self { pieces, collectives: Counter::default(), steps: Counter::default() }
    }

    /// Where thread `thread` of the device counts pieces of work. Thread 0 owns the device.
    ///
    /// # Panics
    /// There are fewer threads.
    #[inline]
    pub fn pieces_of(&self, thread: usize) -> &Counter {
        &self.pieces[thread]
    }

    /// Threads that may count.
    pub fn num_threads(&self) -> usize {
        self.pieces.len()
    }

    /// Pieces of work that all threads have done.
    pub fn work_pieces(&self) -> u64 {
        self.pieces.iter().map(Counter::get).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_count_apart_and_are_read_together() {
        let progress = Progress::new(3);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let counter = progress.pieces_of(thread);
                scope.spawn(move || (0..1000).for_each(|_| counter.count()));
            }
        });
        assert_eq!(progress.work_pieces(), 3000);
        assert_eq!((progress.collectives.get(), progress.steps.get()), (0, 0));
    }
}
