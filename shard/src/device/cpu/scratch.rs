//! Memory of each thread for what a kernel keeps while it works.
#![allow(unsafe_code)]

use super::memory::Region;
use crate::device::Result;
use crate::progress::Counter;

/// Elements of f32 of each thread: 256 KiB, which the second-level cache holds.
pub const SCRATCH_LEN: usize = 1 << 16;

/// [`SCRATCH_LEN`] elements for each thread.
pub struct Scratch {
    region: Region,
    num_threads: usize,
}

/// Bytes of [`Scratch`] for so many threads.
pub fn scratch_bytes(num_threads: usize) -> usize {
    num_threads * SCRATCH_LEN * size_of::<f32>()
}

impl Scratch {
    /// Reserves and touches it, counting the work on `pieces`.
    pub fn new(num_threads: usize, pieces: &Counter) -> Result<Self> {
        let region = Region::new(scratch_bytes(num_threads), "the scratch of threads", pieces)?;
        Ok(Self { region, num_threads })
    }

    /// The scratch of thread `thread`.
    ///
    /// # Safety
    /// The thread must have no other borrow of it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn of_thread(&self, thread: usize) -> &mut [f32] {
        assert!(thread < self.num_threads);
        // SAFETY: the region has `SCRATCH_LEN` elements for each thread, and this thread borrows its own only once.
        unsafe {
            let start = self.region.as_ptr().cast::<f32>().add(thread * SCRATCH_LEN);
            std::slice::from_raw_parts_mut(start, SCRATCH_LEN)
        }
    }
}
