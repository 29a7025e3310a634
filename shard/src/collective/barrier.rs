//! A barrier between processes, in memory that they share.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::futex;

use super::api::GroupLost;

/// Rounds of waiting before a rank goes to sleep: some tens of microseconds, about what waking up costs. More
/// would take the processor from the rank that is waited for, where ranks share processors.
const SPINS: usize = 1000;

/// How long a rank sleeps before it looks again. Wakes end sleep; this only bounds what a lost one costs.
const NAP: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A number on a cache line of its own.
#[repr(C, align(64))]
#[derive(Debug, Default)]
struct Line(AtomicU32);

/// The barrier. All zeros is a fresh one.
///
/// Everything that a rank did before [`Barrier::wait`] is seen by every rank after it.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Barrier {
    /// Ranks that have come to the present barrier.
    arrived: Line,
    /// Barriers that are over.
    generation: Line,
    /// Ranks that sleep, or are about to.
    sleepers: Line,
    /// Not zero: the group fell apart.
    aborted: Line,
}

impl Barrier {
    /// Returns when `world_size` ranks have called it.
    pub fn wait(&self, world_size: u32) -> Result<(), GroupLost> {
        // The generation cannot change before this rank arrives.
        let generation = self.generation.0.load(Ordering::Acquire);
        if self.is_aborted() {
            return Err(GroupLost);
        }
        // Each arrival releases what its rank wrote, and the last one acquires all of it.
        if self.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == world_size {
            self.arrived.0.store(0, Ordering::Relaxed);
            self.generation.0.store(generation.wrapping_add(1), Ordering::SeqCst);
            if self.sleepers.0.load(Ordering::SeqCst) > 0 {
                self.wake();
            }
            return Ok(());
        }
        let is_over = || self.generation.0.load(Ordering::SeqCst) != generation;
        for _ in 0..SPINS {
            if is_over() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        // A barrier that is over stays so, even if the group fell apart since: that comes first.
        let result = loop {
            if is_over() {
                break Ok(());
            }
            if self.is_aborted() {
                break Err(GroupLost);
            }
            // Every outcome (woken, value changed, interrupted, timed out) means to look again.
            let _ = futex::wait(&self.generation.0, futex::Flags::empty(), generation, Some(&NAP));
        };
        self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Ends this and every later wait of all ranks, for good.
    pub fn abort(&self) {
        self.aborted.0.store(1, Ordering::SeqCst);
        self.wake();
    }

    /// Whether the group fell apart.
    pub fn is_aborted(&self) -> bool {
        self.aborted.0.load(Ordering::SeqCst) != 0
    }

    fn wake(&self) {
        // Waking ranks of other processes needs the shared kind of futex, which is what no flags mean. It
        // cannot fail on a valid address.
        let _ = futex::wake(&self.generation.0, futex::Flags::empty(), i32::MAX as u32);
    }
}
